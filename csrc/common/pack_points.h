// One element of pack_points; T is float, or on the CPU a vector of floats. Each operation is rounded on its own, in
// the reference's order: the points of the linf ball have its bits (unless they are normalized), so files that use this
// are compiled without contraction to fused multiply-adds; nvcc, whose flag for that would also concern the loss, is
// told by product().
#pragma once

#include "plans.h"

namespace elle_fast {

// a * b, rounded: no part of a fused multiply-add.
template <class T>
ELLE_INLINE T product(T a, T b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// NaN stays, as in torch.
template <class T>
ELLE_INLINE T clamp(T value, T low, T high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

template <bool kClamp, class T>
ELLE_INLINE T bounded(T value, T low, T high) {
  return kClamp ? clamp(value, low, high) : value;
}

// step_size * sign(grad), 0 for NaN as torch.sign has it.
template <class T>
ELLE_INLINE T signed_step(T grad, T step_size) {
  const T zero{};
  const T back = grad < zero ? -step_size : zero;
  return grad > zero ? step_size : back;
}

// x + radius * noise, noise in [-1, 1): a corner of the triplet, or the attack's start.
template <bool kClamp, class T>
ELLE_INLINE T drawn(T x, T noise, T radius, T low, T high) {
  return bounded<kClamp>(x + product(radius, noise), low, high);
}

// The attack's point after its step, in the linf ball.
template <bool kClamp, class T>
ELLE_INLINE T kept(T x, T point, bool project, T eps, T low, T high) {
  if (project) point = x + clamp(point - x, -eps, eps);
  return bounded<kClamp>(point, low, high);
}

// x_c = (1 - alpha) x_a + alpha x_b.
template <class T>
ELLE_INLINE T between(T x_a, T x_b, T alpha) {
  return product(1.0f - alpha, x_a) + product(alpha, x_b);
}

constexpr ELLE_INLINE int block_of_b(Points points) { return points == Points::kElle ? 1 : 4; }  // ELLE-2p has none

// A point of a triplet, in the order of elle_fast/ops/layout.py: a corner, or between them.
template <class T>
ELLE_INLINE T triplet_point(Points points, int block, T x_a, T x_b, T alpha) {
  if (block == 0) return x_a;
  if (block == block_of_b(points)) return x_b;
  return between(x_a, x_b, points == Points::kFivePoint ? T{} + 0.25f * static_cast<float>(block) : alpha);
}

// The points as the model takes them.
ELLE_INLINE float normalized(float point, float mean, float scale) { return (point - mean) * scale; }

}  // namespace elle_fast
