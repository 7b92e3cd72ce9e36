// The backward of elle_loss: a kernel over the rows or, for the linearity of logits, over the samples.
#pragma once

#include "loss_rows.cuh"

namespace elle_fast::cuda {
namespace {

struct Backward {
  LossPlan plan;
  GradTensors tensors;
};

// factor * (sum(q) softmax(z) - q) of a row.
template <class T, int kVec>
struct RowGradient {
  const T* z;
  const RowTarget target;
  float factor, maximum, log_sum, sum;

  inline __device__ RowGradient(const Backward& call, int64_t row, float factor)
      : z(static_cast<const T*>(call.tensors.logits) + row * call.plan.stride),
        target(call.plan, call.tensors.target, call.plan.sample(row)),
        factor(factor) {
    const Saved<const float> saved(call.tensors.saved, call.plan);
    maximum = saved.maxima[row];
    log_sum = saved.log_sums[row];
    sum = has_target_sums(call.plan) ? saved.target_sums[row] : 1.0f;
  }

  inline __device__ void read_at(int64_t column, float (&gradient)[kVec]) const {
    float values[kVec], q[kVec];
    load(z + column, values);
    target.read_at(column, q);
    ELLE_EACH(i, kVec) gradient[i] = factor * (sum * __expf((values[i] - maximum) - log_sum) - q[i]);
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
    store(to + c, values);
  }
}

// A residual's share of the gradient at some columns: written, or added to that of the sample's row of x_adv.
template <class T, int kVec>
inline __device__ void spread_residual(const Backward& call, const Upstream& upstream, int64_t triplet, int64_t sample,
                                       int64_t column, float (&adv)[kVec]) {
  const LossPlan& plan = call.plan;
  const int64_t index = triplet * plan.part + sample;
  const Residual residual = residual_of(plan, triplet, sample, call.tensors.alpha[index]);
  const float slope = upstream.to_e_lin * Saved<const float>(call.tensors.saved, plan).slopes[index];
  float r[kVec];
  weighted_sum<T>(plan, call.tensors.logits, residual, column, r);
  ELLE_EACH(p, kMostPoints) {
    if (p >= points_of(plan.points)) break;
    float values[kVec];
    ELLE_EACH(i, kVec) values[i] = upstream.e_lin ? residual.weights[p] * (slope * r[i]) : 0.0f;
    if (residual.rows[p] < plan.adv_rows) {
      ELLE_EACH(i, kVec) adv[i] += values[i];
    } else {
      store(static_cast<T*>(call.tensors.grad) + residual.rows[p] * plan.classes + column, values);
    }
  }
}

// The linearity of the logits: a sample with all its residuals.
template <class T, int kVec>
inline __device__ void gradient_of_sample(const Backward& call, const Upstream& upstream, int64_t sample) {
  const LossPlan& plan = call.plan;
  const bool has_adv = sample < plan.adv_rows;
  const int64_t triplets = sample < plan.part ? plan.triplets : 0;
  const RowGradient<T, kVec> gradient(call, has_adv ? sample : 0,
                                      has_adv ? upstream.to_ce / static_cast<float>(plan.adv_rows) : 0.0f);
  for (int64_t c = threadIdx.x * kVec; c < plan.classes; c += static_cast<int64_t>(blockDim.x) * kVec) {
    float adv[kVec] = {};
    if (has_adv && upstream.ce) gradient.read_at(c, adv);
#pragma unroll 1
    for (int64_t triplet = 0; triplet < triplets; ++triplet)
      spread_residual<T>(call, upstream, triplet, sample, c, adv);
    if (has_adv) store(static_cast<T*>(call.tensors.grad) + sample * plan.classes + c, adv);
  }
}

// How many teams the backward has work for.
inline __host__ __device__ int64_t gradient_items(const LossPlan& plan) {
  if (!plan.of_logits) return plan.losses;
  return plan.adv_rows > plan.part ? plan.adv_rows : plan.part;  // plan.samples() costs rows_backward 7 registers
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

}  // namespace
}  // namespace elle_fast::cuda
