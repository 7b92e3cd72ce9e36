// elle_loss on a GPU: a launch over the rows and one that reduces them (and moves lam); one for the gradient.
//
// The forward reads each logit once (with probabilities or label smoothing twice, the second time out of the cache),
// the backward reads it again and writes its gradient; bound by memory. A team of threads has a row: a warp, or a block
// if there are many classes. A thread has 16 bytes of a row at a time, or one logit where rows are not aligned to that.
//
// Sums run in a fixed order: over a team, and in the reduction, which is one block. A row's maximum and the logarithm
// of its sum are kept apart: their sum would round away the difference between logits that share a large offset.
#include "../common/elle_loss.h"

#include "kernels.h"
#include "launch.cuh"
#include "vectors.cuh"

namespace elle_fast {
namespace cuda {
namespace {

constexpr int kRowsPerBlock = 4;                            // of teams that are warps
constexpr int kBlockTeam = 256, kMostClassesOfWarp = 1024;  // more classes than this: a block for a row
constexpr int kReduceThreads = 512;
constexpr float kLowest = -3.4028234663852886e38f;  // a maximum that starts here meets no inf - inf

struct Forward {
  LossPlan plan;
  LossTensors tensors;
};

struct Backward {
  LossPlan plan;
  GradTensors tensors;
};

struct Reduction {
  LossPlan plan;
  LossTensors tensors;
  LamRule rule;
  LamState state;
};

// ---- Teams: blockDim.x threads, a warp or a whole block

inline __device__ float warp_largest(float value) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

template <bool kBlock>
inline __device__ float team_largest(float value) {
  value = warp_largest(value);
  if constexpr (!kBlock) return value;
  __shared__ float partial[kBlockTeam / kWarp];
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < kBlockTeam / kWarp; ++warp) value = fmaxf(value, partial[warp]);
  __syncthreads();  // before the next row overwrites these
  return value;
}

template <bool kBlock, int kCount>
inline __device__ void team_sum(float (&values)[kCount]) {
  if constexpr (kBlock) {
    block_sum(values);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
  }
}

// ---- Logits and targets

template <int kVec, class T>
inline __device__ void read(const T* from, float (&values)[kVec]) {
  if constexpr (kVec == 1) {
    values[0] = to_float(*from);
  } else {
    load(from, values);
  }
}

template <int kVec, class T>
inline __device__ void write(T* to, const float (&values)[kVec]) {
  if constexpr (kVec == 1) {
    *to = from_float<T>(values[0]);
  } else {
    store(to, values);
  }
}

// A row's target as probabilities.
struct RowTarget {
  const float* probabilities = nullptr;  // null: a label
  int64_t label = -1;
  bool known = true;
  float keep, spread;

  inline __device__ RowTarget(const LossPlan& plan, const void* target, int64_t sample)
      : keep(1.0f - plan.label_smoothing), spread(plan.label_smoothing / static_cast<float>(plan.classes)) {
    if (plan.target_stride >= 0) {
      probabilities = static_cast<const float*>(target) + sample * plan.target_stride;
    } else {
      label = static_cast<const int64_t*>(target)[sample];
      known = label >= 0 && label < plan.classes;
    }
  }

  template <int kVec>
  inline __device__ void read_at(int64_t column, float (&q)[kVec]) const {
    if (probabilities != nullptr) {
      read(probabilities + column, q);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) q[i] = column + i == label ? 1.0f : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) q[i] = keep * q[i] + spread;
  }
};

// The sums of the targets are 1 but for probabilities, and rounded where labels are smoothed.
inline __device__ bool has_target_sums(const LossPlan& plan) {
  return plan.target_stride >= 0 || plan.label_smoothing != 0.0f;
}

// ---- The forward over rows

// The sum of exp(z - largest) of what a thread has seen.
struct Exponentials {
  float largest = kLowest, total = 0.0f;

  template <int kVec>
  inline __device__ void add(const float (&z)[kVec]) {
    float next = largest;
#pragma unroll
    for (int i = 0; i < kVec; ++i) next = fmaxf(next, z[i]);
    total *= __expf(largest - next);
#pragma unroll
    for (int i = 0; i < kVec; ++i) total += __expf(z[i] - next);
    largest = next;
  }
};

template <class T, int kVec, bool kBlock>
inline __device__ void loss_of_row(const Forward& call, int64_t row) {
  const LossPlan& plan = call.plan;
  const Saved<float> saved(call.tensors.saved, plan);
  const T* z = static_cast<const T*>(call.tensors.logits) + row * plan.stride;
  const RowTarget target(plan, call.tensors.target, sample_of(row, plan.first, plan.part));
  const int64_t begin = threadIdx.x * kVec, step = static_cast<int64_t>(blockDim.x) * kVec;
  Exponentials seen;
  for (int64_t c = begin; c < plan.classes; c += step) {
    float values[kVec];
    read(z + c, values);
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
      read(z + c, values);
      target.read_at(c, q);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
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

template <class T, int kVec>
inline __device__ void weighted_sum(const LossPlan& plan, const void* logits, const Residual& residual, int64_t column,
                                    float (&r)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) r[i] = 0.0f;
#pragma unroll
  for (int p = 0; p < kMostPoints; ++p) {
    if (p >= points_of(plan.points)) break;
    float values[kVec];
    read(static_cast<const T*>(logits) + residual.rows[p] * plan.stride + column, values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) r[i] += residual.weights[p] * values[i];
  }
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
#pragma unroll
    for (int i = 0; i < kVec; ++i) squares[0] += r[i] * r[i];
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

// A sample's penalties of losses, and the slopes of E_lin with respect to them. ELLE-2p's residuals share the sample's
// first row, so a thread has all of a sample's residuals.
inline __device__ float penalties_of_sample(const LossPlan& plan, const LossTensors& tensors, int64_t sample) {
  const Saved<float> saved(tensors.saved, plan);
  const float scale = static_cast<float>(plan.residuals);
  float sum = 0.0f, first = 0.0f;
  for (int64_t triplet = 0; sample < plan.part && triplet < plan.triplets; ++triplet) {
    const Residual residual = residual_of(plan, triplet, sample, tensors.alpha[triplet * plan.part + sample]);
    float r = 0.0f;
#pragma unroll
    for (int p = 0; p < kMostPoints; ++p) {
      if (p < points_of(plan.points)) r += residual.weights[p] * saved.losses[residual.rows[p]];
    }
    const Penalised penalised = penalise_loss(r, plan.penalty);
    sum += penalised.value;
#pragma unroll
    for (int p = 0; p < kMostPoints; ++p) {
      if (p >= points_of(plan.points)) break;
      const float slope = residual.weights[p] * (penalised.slope / scale);
      if (residual.rows[p] < plan.first) {
        first += slope;
      } else {
        saved.slopes[residual.rows[p]] = slope;
      }
    }
  }
  if (sample < plan.first) saved.slopes[sample] = first;
  return sum;
}

// A thread's share of the penalties of logits; squared sizes are replaced by the s with dE_lin / dr = s * r.
inline __device__ float penalties_of_logits(const LossPlan& plan, float* slopes) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < plan.residuals; i += blockDim.x) {
    const Penalised penalised = penalise_square(slopes[i], plan.penalty);
    sum += penalised.value;
    slopes[i] = penalised.slope / static_cast<float>(plan.residuals);
  }
  return sum;
}

// ce, E_lin, the new lam, loss = ce + lam * E_lin, and the slopes and the lam that the backward needs; one block.
__global__ void __launch_bounds__(kReduceThreads) reduce_forward(const __grid_constant__ Reduction call) {
  const LossPlan& plan = call.plan;
  const LossTensors& tensors = call.tensors;
  const Saved<float> saved(tensors.saved, plan);
  float sums[2] = {0.0f, 0.0f};  // of the penalties, and of the first rows' losses
  if (plan.of_logits) {
    sums[0] = penalties_of_logits(plan, saved.slopes);
  } else {
    const int64_t samples = plan.first > plan.part ? plan.first : plan.part;
    for (int64_t i = threadIdx.x; i < samples; i += blockDim.x) sums[0] += penalties_of_sample(plan, tensors, i);
  }
  for (int64_t row = threadIdx.x; row < plan.first; row += blockDim.x) sums[1] += saved.losses[row];
  block_sum(sums);
  if (threadIdx.x != 0) return;
  const float e_lin = sums[0] / static_cast<float>(plan.residuals);
  const float ce = plan.first == 0 ? 0.0f : sums[1] / static_cast<float>(plan.first);
  float lam = tensors.lam_value;
  if (tensors.lam != nullptr) lam = *tensors.lam;
  if (call.state.lam != nullptr) lam = next_lam(e_lin, call.rule, call.state);
  *tensors.ce = ce;
  *tensors.e_lin = e_lin;
  *tensors.loss = ce + lam * e_lin;
  *saved.lam = lam;
}

__global__ void next_lam_alone(const void* e_lin, bool is_double, const LamRule rule, const LamState state,
                               float* used_lam) {
  *used_lam = next_lam(is_double ? *static_cast<const double*>(e_lin) : *static_cast<const float*>(e_lin), rule, state);
}

// ---- The backward

// factor * (sum(q) softmax(z) - q) of a row.
template <class T, int kVec>
struct RowGradient {
  const T* z;
  const RowTarget target;
  float factor, maximum, log_sum, sum;

  inline __device__ RowGradient(const Backward& call, int64_t row, float factor)
      : z(static_cast<const T*>(call.tensors.logits) + row * call.plan.stride),
        target(call.plan, call.tensors.target, sample_of(row, call.plan.first, call.plan.part)),
        factor(factor) {
    const Saved<const float> saved(call.tensors.saved, call.plan);
    maximum = saved.maxima[row];
    log_sum = saved.log_sums[row];
    sum = has_target_sums(call.plan) ? saved.target_sums[row] : 1.0f;
  }

  inline __device__ void read_at(int64_t column, float (&gradient)[kVec]) const {
    float values[kVec], q[kVec];
    read(z + column, values);
    target.read_at(column, q);
#pragma unroll
    for (int i = 0; i < kVec; ++i) gradient[i] = factor * (sum * __expf((values[i] - maximum) - log_sum) - q[i]);
  }
};

template <class T, int kVec>
inline __device__ void gradient_of_row(const Backward& call, const Upstream& upstream, int64_t row) {
  const LossPlan& plan = call.plan;
  const float factor = factor_of(plan, upstream, Saved<const float>(call.tensors.saved, plan).slopes, row);
  const RowGradient<T, kVec> gradient(call, row, factor);
  T* to = static_cast<T*>(call.tensors.grad) + row * plan.classes;
  for (int64_t c = threadIdx.x * kVec; c < plan.classes; c += static_cast<int64_t>(blockDim.x) * kVec) {
    float values[kVec];
    gradient.read_at(c, values);
    write(to + c, values);
  }
}

// A residual's share of the gradient at some columns: written, or added to that of the sample's first row.
template <class T, int kVec>
inline __device__ void spread_residual(const Backward& call, const Upstream& upstream, int64_t triplet, int64_t sample,
                                       int64_t column, float (&first)[kVec]) {
  const LossPlan& plan = call.plan;
  const int64_t index = triplet * plan.part + sample;
  const Residual residual = residual_of(plan, triplet, sample, call.tensors.alpha[index]);
  const float slope = upstream.to_e_lin * Saved<const float>(call.tensors.saved, plan).slopes[index];
  float r[kVec];
  weighted_sum<T>(plan, call.tensors.logits, residual, column, r);
#pragma unroll
  for (int p = 0; p < kMostPoints; ++p) {
    if (p >= points_of(plan.points)) break;
    float values[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] = upstream.e_lin ? residual.weights[p] * (slope * r[i]) : 0.0f;
    if (residual.rows[p] < plan.first) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) first[i] += values[i];
    } else {
      write(static_cast<T*>(call.tensors.grad) + residual.rows[p] * plan.classes + column, values);
    }
  }
}

// The linearity of the logits: a sample with all its residuals.
template <class T, int kVec>
inline __device__ void gradient_of_sample(const Backward& call, const Upstream& upstream, int64_t sample) {
  const LossPlan& plan = call.plan;
  const bool has_first = sample < plan.first;
  const int64_t triplets = sample < plan.part ? plan.triplets : 0;
  const RowGradient<T, kVec> gradient(call, has_first ? sample : 0,
                                      has_first ? upstream.to_ce / static_cast<float>(plan.first) : 0.0f);
  for (int64_t c = threadIdx.x * kVec; c < plan.classes; c += static_cast<int64_t>(blockDim.x) * kVec) {
    float first[kVec] = {};
    if (has_first && upstream.ce) gradient.read_at(c, first);
#pragma unroll 1
    for (int64_t triplet = 0; triplet < triplets; ++triplet)
      spread_residual<T>(call, upstream, triplet, sample, c, first);
    if (has_first) write(static_cast<T*>(call.tensors.grad) + sample * plan.classes + c, first);
  }
}

// How many teams the backward has work for.
inline __host__ __device__ int64_t gradient_items(const LossPlan& plan) {
  if (!plan.of_logits) return plan.losses;
  return plan.first > plan.part ? plan.first : plan.part;
}

// The two are apart, as the linearity of logits takes twice the registers. The number of blocks leaves 128 registers to
// a thread: without it the compiler takes fewer and spills.
template <class T, int kVec, bool kBlock, bool kOfLogits>
__global__ void __launch_bounds__(kBlock ? kBlockTeam : kWarp * kRowsPerBlock, kBlock ? 2 : 4)
    rows_backward(const __grid_constant__ Backward call) {
  const LossPlan& plan = call.plan;
  const Upstream upstream = upstream_of(call.tensors, *Saved<const float>(call.tensors.saved, plan).lam);
  const int64_t items = gradient_items(plan), teams = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < items; i += teams) {
    // From the last row to the first: the forward has just read the last ones.
    const int64_t item = items - 1 - i;
    if constexpr (kOfLogits) {
      gradient_of_sample<T, kVec>(call, upstream, item);
    } else {
      gradient_of_row<T, kVec>(call, upstream, item);
    }
  }
}

// ---- Launching

// Whether each row of logits, gradient and probabilities begins at a multiple of 16 bytes, and is a whole number of
// them long.
bool wide(const LossPlan& plan, const void* logits, const void* grad, const void* target, int vec) {
  const bool rows = aligned(logits, 16) && aligned(grad, 16) && plan.stride % vec == 0 && plan.classes % vec == 0;
  return rows && (plan.target_stride < 0 || (aligned(target, 16) && plan.target_stride % 4 == 0));
}

template <class Call>
int launch_teams(void (*of_warps)(Call), void (*of_blocks)(Call), const Call& call, int64_t items, void* stream) {
  const bool block = call.plan.classes > kMostClassesOfWarp;
  const int64_t rows = block ? 1 : kRowsPerBlock, blocks = (items + rows - 1) / rows;
  const dim3 grid(static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff));
  const dim3 team(block ? kBlockTeam : kWarp, static_cast<unsigned>(rows));
  return launch(block ? of_blocks : of_warps, grid, team, stream, call);
}

template <class T, int kVec>
int launch_rows(const Forward& call, void* stream) {
  const int64_t items = call.plan.losses + (call.plan.of_logits ? call.plan.residuals : 0);
  return launch_teams<Forward>(rows_forward<T, kVec, false>, rows_forward<T, kVec, true>, call, items, stream);
}

template <class T, int kVec>
int launch_rows(const Backward& call, void* stream) {
  const int64_t items = gradient_items(call.plan);
  if (call.plan.of_logits)
    return launch_teams<Backward>(rows_backward<T, kVec, false, true>, rows_backward<T, kVec, true, true>, call, items,
                                  stream);
  return launch_teams<Backward>(rows_backward<T, kVec, false, false>, rows_backward<T, kVec, true, false>, call, items,
                                stream);
}

template <class Call>
int launch_type(const Call& call, const void* grad, void* stream) {
  return with_type(call.plan.type, [&](auto number) {
    using T = decltype(number);
    constexpr int kVec = 16 / static_cast<int>(sizeof(T));
    return wide(call.plan, call.tensors.logits, grad, call.tensors.target, kVec) ? launch_rows<T, kVec>(call, stream)
                                                                                 : launch_rows<T, 1>(call, stream);
  });
}

}  // namespace

int elle_loss(const LossPlan& plan, const LamRule& rule, const LossTensors& tensors, const LamState& state,
              void* stream) {
  const int error = launch_type(Forward{plan, tensors}, nullptr, stream);
  if (error != cudaSuccess) return error;
  const int64_t samples = plan.of_logits ? plan.residuals : plan.first > plan.part ? plan.first : plan.part;
  const int64_t most = samples > plan.first ? samples : plan.first, warps = (most + kWarp - 1) / kWarp;
  const dim3 block(static_cast<unsigned>(warps * kWarp < kReduceThreads ? warps * kWarp : kReduceThreads));
  return launch(reduce_forward, dim3(1), block, stream, Reduction{plan, tensors, rule, state});
}

int elle_loss_backward(const LossPlan& plan, const GradTensors& tensors, void* stream) {
  return launch_type(Backward{plan, tensors}, tensors.grad, stream);
}

int update_lam(const void* e_lin, bool is_double, const LamRule& rule, const LamState& state, float* used_lam,
               void* stream) {
  return launch(next_lam_alone, dim3(1), dim3(1), stream, e_lin, is_double, rule, state, used_lam);
}

}  // namespace cuda
}  // namespace elle_fast
