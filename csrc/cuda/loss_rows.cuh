// Rows of logits: the teams of threads that have one, its target, and what a residual makes of several.
#pragma once

#include "../common/elle_loss.h"
#include "launch.cuh"
#include "vectors.cuh"

namespace elle_fast::cuda {
namespace {

constexpr int kRowsPerBlock = 4;                            // of teams that are warps
constexpr int kBlockTeam = 256, kMostClassesOfWarp = 1024;  // more classes than this: a block for a row

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
    ELLE_EACH(i, kCount) values[i] = warp_sum(values[i]);
  }
}

// ---- Logits and targets

// A row's target as probabilities.
struct RowTarget {
  const float* probabilities = nullptr;  // null: a label
  int64_t label = -1;
  bool known = true;
  const Smoothing smoothing;

  inline __device__ RowTarget(const LossPlan& plan, const void* target, int64_t sample) : smoothing(plan) {
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
      load(probabilities + column, q);
    } else {
      ELLE_EACH(i, kVec) q[i] = column + i == label ? 1.0f : 0.0f;
    }
    ELLE_EACH(i, kVec) q[i] = smoothing(q[i]);
  }
};

// The sums of the targets are 1 but for probabilities, and rounded where labels are smoothed.
inline __device__ bool has_target_sums(const LossPlan& plan) {
  return plan.target_stride >= 0 || plan.label_smoothing != 0.0f;
}

// ---- Residuals

template <class T, int kVec>
inline __device__ void weighted_sum(const LossPlan& plan, const void* logits, const Residual& residual, int64_t column,
                                    float (&r)[kVec]) {
  ELLE_EACH(i, kVec) r[i] = 0.0f;
  ELLE_EACH(p, kMostPoints) {
    if (p >= points_of(plan.points)) break;
    float values[kVec];
    load(static_cast<const T*>(logits) + residual.rows[p] * plan.stride + column, values);
    ELLE_EACH(i, kVec) r[i] += residual.weights[p] * values[i];
  }
}

}  // namespace
}  // namespace elle_fast::cuda
