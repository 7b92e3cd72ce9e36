// pack_points in the l2 ball, a sample at a time: its norms have to be known before it can be written.
#pragma once

#include <cstdlib>

#include "../common/ball.h"
#include "tiles.h"

namespace elle_fast::ELLE_ISA {

// Numbers of one sample, tile by tile.
struct Sample {
  float *adv, *a, *b;
};

// Sum of squares in float64, which no square of a float32 overflows; in an order that depends on nothing but n.
struct Length {
  double sums[8] = {};

  void add(const float* values, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8)
      for (int k = 0; k < 8; ++k) sums[k] += static_cast<double>(values[i + k]) * values[i + k];
    for (; i < n; ++i) sums[i % 8] += static_cast<double>(values[i]) * values[i];
  }

  // NaN if it is not finite: there is no direction then.
  float value() const {
    double total = 0.0;
    for (int k = 0; k < 8; ++k) total += sums[k];
    const float length = static_cast<float>(__builtin_sqrt(total));
    return length - length == 0.0f ? length : length - length;
  }
};

// Calls each(tile, offset) for the tiles of a sample.
template <class Each>
static ELLE_INLINE void over_sample(const Call& call, int64_t row, const Each& each) {
  int64_t offset = 0;
  for (int64_t i = 0; i < call.tiling.each; ++i) {
    const Tile tile = tile_of(call.tiling, row * call.tiling.each + i);
    each(tile, offset);
    offset += tile.size();
  }
}

// Normal noise: Box-Muller on neighbours.
static void make_normals(int count, float* numbers) {
  for (int i = 0; i < count; i += 2) {
    uint32_t words[2];
    std::memcpy(words, numbers + i, sizeof words);
    const Normals pair = normals(words[0], words[1]);
    numbers[i] = pair.even;
    numbers[i + 1] = pair.odd;
  }
}

// Normal noise of a sample, as in draw(); and what it has to be multiplied by to be uniform in the ball.
template <int kCount>
static void ball_noise(const Call& call, int64_t row, int64_t triplet, float radius, float* const (&to)[kCount],
                       float (&scales)[kCount], Scratch& scratch) {
  Length lengths[kCount];
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    arrange<kCount>(call, tile, triplet, scratch.noise, make_normals);
    for (int k = 0; k < kCount; ++k) {
      lengths[k].add(scratch.noise[k].values, tile.size());
      std::memcpy(to[k] + offset, scratch.noise[k].values, sizeof(float) * tile.size());
    }
  });
  const Words words = block_words(call.keys.seed(), 0, call.plan.sample(row), kSample, static_cast<uint32_t>(triplet));
  const uint32_t own[2] = {kCount == 1 ? words.w3 : words.w1, words.w2};
  for (int k = 0; k < kCount; ++k) scales[k] = ball_scale(radius, own[k], lengths[k].value(), call.plan.elements());
}

// Noise, in place, becomes x + scale * noise, in the bounds.
template <bool kClamp>
static void make_noisy(const PackPlan& plan, int n, const float* x, float scale, float* noise) {
  for (int i = 0; i < n; ++i) noise[i] = bounded<kClamp>(x[i] + scale * noise[i], plan.low, plan.high);
}

// The attack's start, to sample.adv.
template <bool kClamp>
static void ball_start(const Call& call, int64_t row, const Sample& sample, Scratch& scratch) {
  float scale[1];
  ball_noise<1>(call, row, 0, call.plan.radius, {sample.adv}, scale, scratch);
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    make_noisy<kClamp>(call.plan, tile.size(), loaded_x(call, tile, scratch), scale[0], sample.adv + offset);
  });
}

// The attack's point, to sample.adv.
template <bool kClamp>
static void ball_adv(const Call& call, int64_t row, const Sample& sample, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  if (plan.adv == Adv::kGiven) {
    over_sample(call, row, [&](const Tile& tile, int64_t offset) {
      std::memcpy(sample.adv + offset, loaded_given(call, tile, scratch), sizeof(float) * tile.size());
    });
    return;
  }
  if (plan.start || plan.adv == Adv::kStart) ball_start<kClamp>(call, row, sample, scratch);
  if (plan.adv == Adv::kStart) return;
  Length gradient, moved;
  over_sample(call, row,
              [&](const Tile& tile, int64_t) { gradient.add(loaded_given(call, tile, scratch), tile.size()); });
  const float length = gradient.value();
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    const float *x = loaded_x(call, tile, scratch), *given = loaded_given(call, tile, scratch);
    float *to = sample.adv + offset, *offsets = scratch.noise[0].values;
    const float* from = plan.start ? to : x;
    const int n = tile.size();
    for (int i = 0; i < n; ++i) to[i] = ball_stepped(from[i], given[i], length, plan.step_size);
    if (!plan.project) return;
    for (int i = 0; i < n; ++i) offsets[i] = to[i] - x[i];
    moved.add(offsets, n);
  });
  const float pull = plan.project ? ball_pull(moved.value(), plan.eps) : 1.0f;
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    const float* x = loaded_x(call, tile, scratch);
    float* to = sample.adv + offset;
    for (int i = 0, n = tile.size(); i < n; ++i)
      to[i] = bounded<kClamp>(ball_projected(x[i], to[i], pull), plan.low, plan.high);
  });
}

template <bool kClamp>
static void ball_triplet(const Call& call, int64_t row, int64_t triplet, const Sample& sample, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  float scales[2];
  ball_noise<2>(call, row, triplet, plan.eps, {sample.a, sample.b}, scales, scratch);
  const float alpha = call.tensors.alpha[triplet * plan.part + row];
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    if (plan.normalize) fill_statistics(call, tile, scratch);
    const int n = tile.size();
    const float* x = loaded_x(call, tile, scratch);
    float *x_a = sample.a + offset, *x_b = sample.b + offset, *point = scratch.points[0].values;
    make_noisy<kClamp>(plan, n, x, scales[0], x_a);
    if (plan.points == Points::kElle2p) {
      x_b = sample.adv + offset;
    } else {
      make_noisy<kClamp>(plan, n, x, scales[1], x_b);
    }
    for (int k = 0; k < blocks_of(plan.points); ++k) {
      const float* made = k == 0 ? x_a : k == block_of_b(plan.points) ? x_b : point;
      for (int i = 0; made == point && i < n; ++i) point[i] = triplet_point(plan.points, k, x_a[i], x_b[i], alpha);
      store_point(call, tile, call.row_of(tile, triplet) + k * plan.part, made, scratch);
    }
  });
}

template <bool kClamp>
static void ball_sample(const Call& call, int64_t row, const Sample& sample, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  if (plan.adv != Adv::kNone) {
    ball_adv<kClamp>(call, row, sample, scratch);
    over_sample(call, row, [&](const Tile& tile, int64_t offset) {
      if (plan.normalize) fill_statistics(call, tile, scratch);
      store_point(call, tile, row, sample.adv + offset, scratch);
    });
  }
  for (int64_t t = 0; row < plan.part && t < plan.triplets; ++t) ball_triplet<kClamp>(call, row, t, sample, scratch);
}

using OneSample = void (*)(const Call&, int64_t, const Sample&, Scratch&);

// 0, or 1 without memory for the numbers of a sample.
static int over_samples(const Call& call, int threads, OneSample body) {
  const int64_t batch = call.plan.batch, elements = call.plan.elements();
  const int64_t chunk = batch * elements <= kSerial ? batch : kChunk / elements + 1;
  int failed = 0;
  parallel_ranges(batch, chunk, threads, [&](int64_t begin, int64_t end) {
    float* numbers = static_cast<float*>(std::malloc(3 * elements * sizeof(float)));
    if (numbers == nullptr) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    Scratch scratch;
    const Sample sample = {numbers, numbers + elements, numbers + 2 * elements};
    for (int64_t row = begin; row < end; ++row) body(call, row, sample, scratch);
    if (call.stream) end_of_stream();
    std::free(numbers);
  });
  return failed;
}

}  // namespace elle_fast::ELLE_ISA
