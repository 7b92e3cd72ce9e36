// pack_points in the linf ball, a vector at a time.
#pragma once

#include "tiles.h"

namespace elle_fast::ELLE_ISA {

// How points are made and written: clamped to bounds or not, with radii that are scalable or not, past the cache or
// not, in which type.
template <bool kClampValue, bool kScalableValue, bool kStreamValue, DType kTypeValue>
struct Style {
  static constexpr bool kClamp = kClampValue, kScalable = kScalableValue, kStream = kStreamValue;
  static constexpr DType kType = kTypeValue;
};

// point + step_size * sign(grad).
static ELLE_INLINE Floats after_sign(Floats point, Floats grad, Floats step_size) {
#if defined(__AVX512F__)
  // By kinds of numbers, four bits each: NaN (two kinds) and 0 become 0; 1, inf, others above 0 become 1, below -1.
  const __m512i signs = _mm512_set1_epi32(static_cast<int>(0xA9A9A888));
  const __m512 sign = _mm512_maskz_fixupimm_ps(0xFFFF, (__m512)grad, (__m512)grad, signs, 0);
  return multiply_add((Floats)sign, step_size, point);  // the product is exact
#else
  return point + signed_step(grad, step_size);
#endif
}

// The options as vectors, and a tile's numbers at their places; kWhole: all of a vector is in the tile.
template <class S>
struct Cube {
  const int n;
  const Radius around, start;  // of the corners, and of the attack's start
  const Floats eps, step_size, low, high;

  Cube(const PackPlan& plan, const Tile& tile)
      : n(tile.size()),
        around(plan.eps),
        start(plan.radius),
        eps(Floats{} + plan.eps),
        step_size(Floats{} + plan.step_size),
        low(Floats{} + plan.low),
        high(Floats{} + plan.high) {}

  template <bool kWhole>
  ELLE_INLINE Floats get(const float* from, int i) const {
    if (kWhole || i + kSpan <= n) return load<DType::kFloat32>(from + i);
    return load_some<DType::kFloat32>(from + i, n - i);
  }

  template <bool kWhole>
  ELLE_INLINE void put(void* to, int i, Floats value) const {
    void* there = at<S::kType>(to, i);
    if (S::kStream)  // whole vectors alone
      stream<S::kType>(there, value);
    else if (kWhole || i + kSpan <= n)
      store<S::kType>(there, value);
    else
      store_some<S::kType>(there, value, n - i);
  }

  ELLE_INLINE Floats noisy(Floats x, Narrow words, const Radius& radius) const {
    return bounded<S::kClamp>(x + spread<S::kScalable>(words, radius), low, high);
  }

  ELLE_INLINE Floats after_step(Floats x, Floats point, Floats grad, bool project) const {
    return kept<S::kClamp>(x, after_sign(point, grad, step_size), project, eps, low, high);
  }
};

// Words of a tile, a vector at a time: each(whole, i, words).
template <class Each>
static ELLE_INLINE void over_start(const Call& call, const Tile& tile, Scratch& scratch, const Each& each) {
  const uint32_t sample = call.sample(tile);
  if (!call.tiling.matrix) return draw_start(call.keys, sample, tile.place, tile.places, each);
  arrange_start(call, tile, scratch.noise[0].values, stay_words);
  for (int i = 0; i < tile.size(); i += kSpan)
    each(Constant<true>(), i, vector_at<Narrow>(scratch.noise[0].values + i));
}

// The same for both corners of a triplet: each(whole, i, words_a, words_b).
template <class Each>
static ELLE_INLINE void over_pairs(const Call& call, const Tile& tile, int64_t triplet, Scratch& scratch,
                                   const Each& each) {
  const uint32_t sample = call.sample(tile);
  if (!call.tiling.matrix) return draw_pairs(call.keys, sample, triplet, tile.place, tile.places, each);
  const float *a = scratch.noise[0].values, *b = scratch.noise[1].values;
  arrange_pairs(call, tile, triplet, scratch.noise[0].values, scratch.noise[1].values, stay_words);
  for (int i = 0; i < tile.size(); i += kSpan)
    each(Constant<true>(), i, vector_at<Narrow>(a + i), vector_at<Narrow>(b + i));
}

template <class S>
static const float* cube_adv(const Call& call, const Tile& tile, const float* x, const float* given, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  const Cube<S> cube(plan, tile);
  void* to = place_of(call, tile, tile.row, scratch.adv);
  if (plan.adv == Adv::kStep && plan.start) {
    over_start(call, tile, scratch, [&](auto whole, int i, Narrow words) __attribute__((always_inline)) {
      const Floats at = cube.template get<whole.value>(x, i), grad = cube.template get<whole.value>(given, i);
      cube.template put<whole.value>(to, i, cube.after_step(at, cube.noisy(at, words, cube.start), grad, plan.project));
    });
  } else {
    for (int i = 0; i < cube.n; i += kSpan) {
      const Floats at = cube.template get<false>(x, i), second = cube.template get<false>(given, i);
      cube.template put<false>(to, i, plan.adv == Adv::kGiven ? second : cube.after_step(at, at, second, plan.project));
    }
  }
  finish(call, tile, tile.row, to, scratch);
  return static_cast<const float*>(to);
}

// The rows of a triplet. With kFused the attack's point is made beside them, so that all memory is used all the time;
// `given` is then the gradient, else the attack's points, which ELLE-2p looks at. A fused pass does not project: even a
// branch never taken, one for each vector, costs it a tenth of its time.
template <class S, Points kPoints, bool kFused>
static void cube_triplet(const Call& call, const Tile& tile, int64_t triplet, const float* x, const float* given,
                         Scratch& scratch) {
  constexpr int kBlocks = blocks_of(kPoints);
  const PackPlan& plan = call.plan;
  const Cube<S> cube(plan, tile);
  const int64_t row = call.row_of(tile, triplet);
  const Floats alpha = Floats{} + call.tensors.alpha[triplet * plan.part + tile.row];
  void *to[kBlocks], *to_adv = kFused ? place_of(call, tile, tile.row, scratch.adv) : nullptr;
  for (int k = 0; k < kBlocks; ++k) to[k] = place_of(call, tile, row + k * plan.part, scratch.points[k]);
  over_pairs(
      call, tile, triplet, scratch,
      [&](auto whole, int i, Narrow words_a, Narrow words_b) __attribute__((always_inline)) {
        constexpr bool kWhole = whole.value;
        const Floats at = cube.template get<kWhole>(x, i);
        if (kFused)
          cube.template put<kWhole>(to_adv, i, cube.after_step(at, at, cube.template get<kWhole>(given, i), false));
        const Floats x_a = cube.noisy(at, words_a, cube.around);
        const Floats x_b =
            kPoints == Points::kElle2p ? cube.template get<kWhole>(given, i) : cube.noisy(at, words_b, cube.around);
        cube.template put<kWhole>(to[0], i, x_a);
        if (kPoints == Points::kFivePoint) {
          for (int k = 1; k < 4; ++k) cube.template put<kWhole>(to[k], i, between(x_a, x_b, Floats{} + 0.25f * k));
          cube.template put<kWhole>(to[kBlocks - 1], i, x_b);
        } else {
          if (kPoints == Points::kElle) cube.template put<kWhole>(to[1], i, x_b);
          cube.template put<kWhole>(to[kBlocks - 1], i, between(x_a, x_b, alpha));
        }
      });
  if (kFused) finish(call, tile, tile.row, to_adv, scratch);
  for (int k = 0; k < kBlocks; ++k) finish(call, tile, row + k * plan.part, to[k], scratch);
}

template <class S, Points kPoints>
static void cube_tile(const Call& call, const Tile& tile, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  const float *x = loaded_x(call, tile, scratch), *adv = nullptr;
  if (plan.normalize) fill_statistics(call, tile, scratch);
  const int64_t triplets = tile.row < plan.part ? plan.triplets : 0;
  int64_t t = 0;
  if (plan.adv != Adv::kNone) {
    const float* given = loaded_given(call, tile, scratch);
    if (kPoints == Points::kElle && plan.adv == Adv::kStep && !plan.start && !plan.project && triplets > 0)
      cube_triplet<S, kPoints, kPoints == Points::kElle>(call, tile, t++, x, given, scratch);
    else
      adv = cube_adv<S>(call, tile, x, given, scratch);
  }
  for (; t < triplets; ++t) cube_triplet<S, kPoints, false>(call, tile, t, x, adv, scratch);
}

template <class S>
static void cube_start(const Call& call, const Tile& tile, Scratch& scratch) {
  const Cube<S> cube(call.plan, tile);
  const float* x = loaded_x(call, tile, scratch);
  void* to = place_of(call, tile, tile.row, scratch.adv);
  over_start(call, tile, scratch, [&](auto whole, int i, Narrow words) __attribute__((always_inline)) {
    const Floats at = cube.template get<whole.value>(x, i);
    cube.template put<whole.value>(to, i, cube.noisy(at, words, cube.start));
  });
  finish(call, tile, tile.row, to, scratch);
}

using OneTile = void (*)(const Call&, const Tile&, Scratch&);

static int over_tiles(const Call& call, int threads, OneTile body) {
  const int64_t elements = call.plan.batch * call.plan.elements(), tiles = call.plan.batch * call.tiling.each;
  // Several tasks for each thread, so that none waits long for the last.
  const int64_t share = (tiles - 1) / (kShares * int64_t{threads}) + 1;
  const int64_t chunk = elements <= kSerial ? tiles : least(kChunk * tiles / elements + 1, share);
  parallel_for((tiles + chunk - 1) / chunk, threads, [&](int64_t task) {
    Scratch scratch;
    for (int64_t i = task * chunk, end = least(i + chunk, tiles); i < end; ++i)
      body(call, tile_of(call.tiling, i), scratch);
    if (call.stream) end_of_stream();
  });
  return 0;
}

// Buffers hold float32 and are in the cache, wherever what is in them goes.
template <bool kClamp, bool kScalable>
using Buffered = Style<kClamp, kScalable, false, DType::kFloat32>;

template <bool kClamp, bool kStream>
static OneTile direct_tile(DType type) {
  return with_type(
      type, [](auto kind) -> OneTile { return cube_tile<Style<kClamp, true, kStream, kind.value>, Points::kElle>; });
}

template <bool kClamp, bool kScalable>
static OneTile buffered_tile(Points points) {
  if (points == Points::kElle2p) return cube_tile<Buffered<kClamp, kScalable>, Points::kElle2p>;
  if (points == Points::kFivePoint) return cube_tile<Buffered<kClamp, kScalable>, Points::kFivePoint>;
  return cube_tile<Buffered<kClamp, kScalable>, Points::kElle>;
}

template <bool kClamp>
static OneTile tile_for(const Call& call) {
  const PackPlan& plan = call.plan;
  if (!call.scalable) return buffered_tile<kClamp, false>(plan.points);
  if (!call.direct || plan.points != Points::kElle) return buffered_tile<kClamp, true>(plan.points);
  return call.stream ? direct_tile<kClamp, true>(plan.points_type) : direct_tile<kClamp, false>(plan.points_type);
}

template <bool kClamp>
static OneTile start_for(const Call& call) {
  return call.scalable ? cube_start<Buffered<kClamp, true>> : cube_start<Buffered<kClamp, false>>;
}

}  // namespace elle_fast::ELLE_ISA
