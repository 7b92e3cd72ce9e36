// elle_loss on a GPU: a launch over the rows and one that reduces them (and moves lam); one for the gradient.
//
// The forward reads each logit once (with probabilities or label smoothing twice, the second time out of the cache),
// the backward reads it again and writes its gradient; bound by memory. A team of threads has a row: a warp, or a block
// if there are many classes. A thread has 16 bytes of a row at a time, or one logit where rows are not aligned to that.
//
// Sums run in a fixed order: over a team, and in the reduction, which is one block.
#include "loss_backward.cuh"
#include "loss_forward.cuh"

namespace elle_fast::cuda {
namespace {

__global__ void next_lam_alone(const void* value, bool is_double, const LamRule rule, const LamState state,
                               float* used_lam) {
  *used_lam = next_lam(is_double ? *static_cast<const double*>(value) : *static_cast<const float*>(value), rule, state);
}

// Whether each row of logits, gradient and probabilities begins at a multiple of 16 bytes, and is a whole number of
// them long.
bool wide(const LossPlan& plan, const void* logits, const void* grad, const void* target, int vec) {
  const bool rows = aligned(logits, 16) && aligned(grad, 16) && plan.stride % vec == 0 && plan.classes % vec == 0;
  return rows && (plan.target_stride < 0 || (aligned(target, 16) && plan.target_stride % 4 == 0));
}

template <class Call>
int launch_teams(void (*of_warps)(Call), void (*of_blocks)(Call), const Call& call, int64_t items, Where stream) {
  const bool block = call.plan.classes > kMostClassesOfWarp;
  const int64_t rows = block ? 1 : kRowsPerBlock, blocks = (items + rows - 1) / rows;
  const dim3 grid(static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff));
  const dim3 team(block ? kBlockTeam : kWarp, static_cast<unsigned>(rows));
  return launch(block ? of_blocks : of_warps, grid, team, stream, call);
}

template <class T, int kVec>
int launch_rows(const Forward& call, Where stream) {
  const int64_t items = call.plan.losses + (call.plan.of_logits ? call.plan.residuals : 0);
  return launch_teams<Forward>(rows_forward<T, kVec, false>, rows_forward<T, kVec, true>, call, items, stream);
}

template <class T, int kVec>
int launch_rows(const Backward& call, Where stream) {
  const int64_t items = gradient_items(call.plan);
  if (call.plan.of_logits)
    return launch_teams<Backward>(rows_backward<T, kVec, false, true>, rows_backward<T, kVec, true, true>, call, items,
                                  stream);
  return launch_teams<Backward>(rows_backward<T, kVec, false, false>, rows_backward<T, kVec, true, false>, call, items,
                                stream);
}

template <class Call>
int launch_type(const Call& call, const void* grad, Where stream) {
  return with_type(call.plan.type, [&](auto number) {
    using T = decltype(number);
    constexpr int kVec = 16 / static_cast<int>(sizeof(T));
    return wide(call.plan, call.tensors.logits, grad, call.tensors.target, kVec) ? launch_rows<T, kVec>(call, stream)
                                                                                 : launch_rows<T, 1>(call, stream);
  });
}

}  // namespace

int elle_loss(const LossPlan& plan, const LamRule& rule, const LossTensors& tensors, const LamState& state,
              Where stream) {
  const int error = launch_type(Forward{plan, tensors}, nullptr, stream);
  if (error != cudaSuccess) return error;
  const int64_t samples = plan.of_logits ? plan.residuals : plan.samples();
  const int64_t most = samples > plan.adv_rows ? samples : plan.adv_rows, warps = (most + kWarp - 1) / kWarp;
  const dim3 block(static_cast<unsigned>(warps * kWarp < kReduceThreads ? warps * kWarp : kReduceThreads));
  return launch(reduce_forward, dim3(1), block, stream, Reduction{plan, tensors, rule, state});
}

int elle_loss_backward(const LossPlan& plan, const GradTensors& tensors, Where stream) {
  return launch_type(Backward{plan, tensors}, tensors.grad, stream);
}

int update_lam(const void* value, bool is_double, const LamRule& rule, const LamState& state, float* used_lam,
               Where stream) {
  return launch(next_lam_alone, dim3(1), dim3(1), stream, value, is_double, rule, state, used_lam);
}

}  // namespace elle_fast::cuda
