// The forward of elle_loss: a kernel over the rows, and one that reduces them.
#pragma once

#include "loss_rows.cuh"

namespace elle_fast::cuda {
namespace {

struct Forward {
  LossPlan plan;
  LossTensors tensors;
};

// The sum of exp(z - largest) of what a thread has seen.
struct Exponentials {
  float largest = kLowest, total = 0.0f;

  template <int kVec>
  inline __device__ void add(const float (&z)[kVec]) {
    float next = largest;
    ELLE_EACH(i, kVec) next = fmaxf(next, z[i]);
    total *= __expf(largest - next);
    ELLE_EACH(i, kVec) total += __expf(z[i] - next);
    largest = next;
  }
};

template <class T, int kVec, bool kBlock>
inline __device__ void loss_of_row(const Forward& call, int64_t row) {
  const LossPlan& plan = call.plan;
  const Saved<float> saved(call.tensors.saved, plan);
  const T* z = static_cast<const T*>(call.tensors.logits) + row * plan.stride;
  const RowTarget target(plan, call.tensors.target, plan.sample(row));
  const int64_t begin = threadIdx.x * kVec, step = static_cast<int64_t>(blockDim.x) * kVec;
  Exponentials seen;
  for (int64_t c = begin; c < plan.classes; c += step) {
    float values[kVec];
    load(z + c, values);
    seen.add(values);
  }
  const float maximum = team_largest<kBlock>(seen.largest);
  float total[1] = {seen.total * __expf(seen.largest - maximum)};
  team_sum<kBlock>(total);
  float log_sum = logf(total[0]), loss = nanf("");
  if (has_target_sums(plan)) {
    float sums[2] = {0.0f, 0.0f};  // of q ((maximum - z) + log_sum), and of q
    for (int64_t c = begin; c < plan.classes; c += step) {
      float values[kVec], q[kVec];
      load(z + c, values);
      target.read_at(c, q);
      ELLE_EACH(i, kVec) {
        sums[0] += q[i] * ((maximum - values[i]) + log_sum);
        sums[1] += q[i];
      }
    }
    team_sum<kBlock>(sums);
    loss = sums[0];
    if (threadIdx.x == 0) saved.target_sums[row] = sums[1];
  } else if (target.known) {
    loss = log_sum + (maximum - to_float(z[target.label]));
  }
  if (threadIdx.x != 0) return;
  // A label that is no class: an error would have to wait for the device. NaN here and in the row's gradient, as a step
  // with a wrong label should not look like a good one.
  saved.losses[row] = target.known ? loss : nanf("");
  saved.maxima[row] = maximum;
  saved.log_sums[row] = target.known ? log_sum : nanf("");
}

// ||r||^2 over the classes.
template <class T, int kVec, bool kBlock>
inline __device__ void size_of_residual(const Forward& call, int64_t index) {
  const LossPlan& plan = call.plan;
  const Residual residual = residual_of(plan, index / plan.part, index % plan.part, call.tensors.alpha[index]);
  float squares[1] = {0.0f};
  for (int64_t c = threadIdx.x * kVec; c < plan.classes; c += static_cast<int64_t>(blockDim.x) * kVec) {
    float r[kVec];
    weighted_sum<T>(plan, call.tensors.logits, residual, c, r);
    ELLE_EACH(i, kVec) squares[0] += r[i] * r[i];
  }
  team_sum<kBlock>(squares);
  if (threadIdx.x == 0) Saved<float>(call.tensors.saved, plan).slopes[index] = squares[0];
}

// One launch: losses of rows and, for the linearity of the logits, squared sizes of residuals.
template <class T, int kVec, bool kBlock>
__global__ void __launch_bounds__(kBlock ? kBlockTeam : kWarp * kRowsPerBlock)
    rows_forward(const __grid_constant__ Forward call) {
  const LossPlan& plan = call.plan;
  const int64_t items = plan.losses + (plan.of_logits ? plan.residuals : 0);
  const int64_t teams = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; item < items; item += teams) {
    if (item < plan.losses) {
      loss_of_row<T, kVec, kBlock>(call, item);
    } else {
      size_of_residual<T, kVec, kBlock>(call, item - plan.losses);
    }
  }
}

// ---- The reduction

constexpr int kReduceThreads = 512;

struct Reduction {
  LossPlan plan;
  LossTensors tensors;
  LamRule rule;
  LamState state;
};

// ce, E_lin, the new lam, loss = ce + lam * E_lin, and the slopes and the lam that the backward needs; one block.
__global__ void __launch_bounds__(kReduceThreads) reduce_forward(const __grid_constant__ Reduction call) {
  const LossPlan& plan = call.plan;
  const LossTensors& tensors = call.tensors;
  const Saved<float> saved(tensors.saved, plan);
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // of the penalties, of the losses of x_adv, and of a Triplet's squares
  if (plan.of_logits) {
    for (int64_t i = threadIdx.x; i < plan.residuals; i += blockDim.x)
      sums[0] += penalise_logits(plan, saved.slopes[i]);
  } else {
    // A thread has all of a sample's residuals, as those of ELLE-2p share a row.
    for (int64_t i = threadIdx.x; i < plan.samples(); i += blockDim.x) {
      float adv_slope = 0.0f;
      Triplet sum{0.0f, 0.0f, 0.0f};
      for (int64_t triplet = 0; i < plan.part && triplet < plan.triplets; ++triplet) {
        const Triplet one = penalise_triplet(plan, tensors, triplet, i, adv_slope);
        sum = {sum.penalty + one.penalty, sum.square + one.square, sum.rise + one.rise};
      }
      if (i < plan.adv_rows) saved.slopes[i] = adv_slope;
      sums[0] += sum.penalty;
      sums[2] += sum.square;
      sums[3] += sum.rise;
    }
  }
  for (int64_t row = threadIdx.x; row < plan.adv_rows; row += blockDim.x) sums[1] += saved.losses[row];
  block_sum(sums);
  if (threadIdx.x != 0) return;
  const float ce = plan.adv_rows == 0 ? 0.0f : sums[1] / static_cast<float>(plan.adv_rows);
  finish_loss(plan, call.rule, tensors, call.state, ce, sums[0] / static_cast<float>(plan.residuals),
              relative_e_lin(sums[2], sums[3]));
}

}  // namespace
}  // namespace elle_fast::cuda
