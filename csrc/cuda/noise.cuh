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

// Noise of x_a and x_b. Channels first, one call of Philox serves two elements. Channels last, an element's partner is
// far away, so there is a call for each.
template <bool kBall, bool kLast, int kVec>
inline __device__ void draw_pairs(const PackPlan& plan, uint64_t seed, uint32_t sample, uint32_t triplet,
                                  int64_t memory, float (&a)[kVec], float (&b)[kVec]) {
  if constexpr (kLast) {
    Place<kLast> place(plan, memory);
#pragma unroll
    for (int i = 0; i < kVec; ++i, place.advance(plan)) {
      const int64_t element = place.element(plan);
      const Words words = block_words(seed, static_cast<uint64_t>(element) / 2, sample, kPair, triplet);
      a[i] = half_of(noise_of<kBall>(words.w0, words.w2), element % 2 != 0);
      b[i] = half_of(noise_of<kBall>(words.w1, words.w3), element % 2 != 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i += 2) {
      const Words words = block_words(seed, static_cast<uint64_t>(memory + i) / 2, sample, kPair, triplet);
      const Normals pair_a = noise_of<kBall>(words.w0, words.w2), pair_b = noise_of<kBall>(words.w1, words.w3);
      a[i] = pair_a.even;
      a[i + 1] = pair_a.odd;
      b[i] = pair_b.even;
      b[i + 1] = pair_b.odd;
    }
  }
}

// Noise of the attack's start: one call of Philox for four elements, or, channels last, for each.
template <bool kBall, bool kLast, int kVec>
inline __device__ void draw_start(const PackPlan& plan, uint64_t seed, uint32_t sample, int64_t memory,
                                  float (&noise)[kVec]) {
  if constexpr (kLast) {
    Place<kLast> place(plan, memory);
#pragma unroll
    for (int i = 0; i < kVec; ++i, place.advance(plan)) {
      const int64_t element = place.element(plan);
      const Words words = block_words(seed, static_cast<uint64_t>(element) / 4, sample, kStart, 0);
      const bool high = element % 4 >= 2;
      noise[i] = half_of(noise_of<kBall>(high ? words.w2 : words.w0, high ? words.w3 : words.w1), element % 2 != 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      const Words words = block_words(seed, static_cast<uint64_t>(memory + i) / 4, sample, kStart, 0);
      const Normals low = noise_of<kBall>(words.w0, words.w1), high = noise_of<kBall>(words.w2, words.w3);
      noise[i] = low.even;
      noise[i + 1] = low.odd;
      noise[i + 2] = high.even;
      noise[i + 3] = high.odd;
    }
  }
}

}  // namespace elle_fast::cuda
