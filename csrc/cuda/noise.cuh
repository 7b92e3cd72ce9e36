// Where a thread's elements lie, and their noise: kVec neighbours in memory, from a multiple of kVec on.
#pragma once

#include <cuda_runtime.h>

#include "../common/ball.h"
#include "../common/philox.h"
#include "../common/plans.h"

namespace elle_fast::cuda {

// 64-bit divisions take many times as long, and sizes that need them are rare.
inline __device__ int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Channel and place in its plane of an element, which goes through memory in the order of the points.
template <bool kLast>
struct Place {
  int64_t channel, place;

  inline __device__ Place(const PackPlan& plan, int64_t memory) {
    const int64_t length = kLast ? plan.channels : plan.plane;
    const int64_t outer = quotient(memory, length), inner = memory - outer * length;
    channel = kLast ? inner : outer;
    place = kLast ? outer : inner;
  }

  inline __device__ void advance(const PackPlan& plan) {
    int64_t &inner = kLast ? channel : place, &outer = kLast ? place : channel;
    const bool wraps = ++inner == (kLast ? plan.channels : plan.plane);
    inner = wraps ? 0 : inner;
    outer += wraps;
  }

  // In logical order, and so in memory where channels come first.
  inline __device__ int64_t element(const PackPlan& plan) const { return channel * plan.plane + place; }
  inline __device__ int64_t element_last(const PackPlan& plan) const { return place * plan.channels + channel; }
};

// Uniform in [-1, 1), or normal: of the words of an even element and the odd one after it.
template <bool kBall>
inline __device__ Normals noise_of(uint32_t even, uint32_t odd) {
  if constexpr (kBall) return normals(even, odd);
  return {symmetric(even), symmetric(odd)};
}

inline __device__ float half_of(Normals pair, bool odd) { return odd ? pair.odd : pair.even; }

// Noise of x_a and x_b (kCount = 2), or of the attack's start. Channels first, a call of Philox serves two or four
// elements; channels last, an element's neighbours are far away, so there is a call for each.
template <bool kBall, bool kLast, int kCount, int kVec>
inline __device__ void draw_noise(const PackPlan& plan, uint64_t seed, uint32_t sample, uint32_t triplet,
                                  int64_t memory, float (&noise)[kCount][kVec]) {
  constexpr int kGroup = 4 / kCount;
  constexpr bool kPairs = kCount == 2;
  Place<kLast> place(plan, memory);
#pragma unroll
  for (int i = 0; i < kVec; i += kLast ? 1 : kGroup, place.advance(plan)) {
    const int64_t element = kLast ? place.element(plan) : memory + i;
    const Words w =
        block_words(seed, static_cast<uint64_t>(element) / kGroup, sample, kPairs ? kPair : kStart, triplet);
    const bool odd = element % 2 != 0, high = element % 4 >= 2;
    if constexpr (kLast && !kPairs) {
      noise[0][i] = half_of(noise_of<kBall>(high ? w.w2 : w.w0, high ? w.w3 : w.w1), odd);
      continue;
    }
    const Normals first = noise_of<kBall>(w.w0, kPairs ? w.w2 : w.w1);
    const Normals second = noise_of<kBall>(kPairs ? w.w1 : w.w2, w.w3);
    if constexpr (kLast) {
      noise[0][i] = half_of(first, odd);
      noise[kCount - 1][i] = half_of(second, odd);
    } else {
      const int j = kPairs ? i : i + 2;
      noise[0][i] = first.even;
      noise[0][i + 1] = first.odd;
      noise[kCount - 1][j] = second.even;
      noise[kCount - 1][j + 1] = second.odd;
    }
  }
}

}  // namespace elle_fast::cuda
