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

// Words of a tile, a vector at a time, as draw() gives them: each(whole, i, words).
template <int kCount, class Each>
static ELLE_INLINE void over_words(const Call& call, const Tile& tile, int64_t triplet, Scratch& scratch,
                                   const Each& each) {
  if (!call.tiling.matrix) return draw<kCount>(call.keys, call.sample(tile), triplet, tile.place, tile.places, each);
  arrange<kCount>(call, tile, triplet, scratch.noise, stay_words);
  for (int i = 0; i < tile.size(); i += kSpan) {
    Narrow words[kCount];
    for (int k = 0; k < kCount; ++k) words[k] = vector_at<Narrow>(scratch.noise[k].values + i);
    each(Constant<true>(), i, words);
  }
}

// The attack's start, and with kStep its step from there.
template <class S, bool kStep>
__attribute__((noinline)) static void from_start(const Call& call, const Tile& tile, const float* x, const float* grad,
                                                 void* to, Scratch& scratch) {
  const Cube<S> cube(call.plan, tile);  // its own, which no store to memory can change
  const bool project = call.plan.project;
  const auto body = [&](auto whole, int i, const Narrow(&words)[1]) __attribute__((always_inline)) {
    const Floats at = cube.template get<whole.value>(x, i), start = cube.noisy(at, words[0], cube.start);
    Floats point = start;
    if (kStep) point = cube.after_step(at, start, cube.template get<whole.value>(grad, i), project);
    cube.template put<whole.value>(to, i, point);
  };
  over_words<1>(call, tile, 0, scratch, body);
}

template <class S>
static const float* cube_adv(const Call& call, const Tile& tile, const float* x, const float* given, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  const Cube<S> cube(plan, tile);
  void* to = place_of(call, tile, tile.row, scratch.adv);
  if (plan.adv == Adv::kStart) {
    from_start<S, false>(call, tile, x, given, to, scratch);
  } else if (plan.adv == Adv::kStep && plan.start) {
    from_start<S, true>(call, tile, x, given, to, scratch);
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
  const auto body = [&](auto whole, int i, const Narrow(&words)[2]) __attribute__((always_inline)) {
    constexpr bool kWhole = whole.value;
    const Floats at = cube.template get<kWhole>(x, i);
    if (kFused)
      cube.template put<kWhole>(to_adv, i, cube.after_step(at, at, cube.template get<kWhole>(given, i), false));
    const Floats x_a = cube.noisy(at, words[0], cube.around);
    const Floats x_b =
        kPoints == Points::kElle2p ? cube.template get<kWhole>(given, i) : cube.noisy(at, words[1], cube.around);
#pragma GCC unroll 8
    for (int k = 0; k < kBlocks; ++k) cube.template put<kWhole>(to[k], i, triplet_point(kPoints, k, x_a, x_b, alpha));
  };
  over_words<2>(call, tile, triplet, scratch, body);
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
    const float* given = plan.adv == Adv::kStart ? nullptr : loaded_given(call, tile, scratch);
    if (kPoints == Points::kElle && plan.adv == Adv::kStep && !plan.start && !plan.project && triplets > 0)
      cube_triplet<S, kPoints, kPoints == Points::kElle>(call, tile, t++, x, given, scratch);
    else
      adv = cube_adv<S>(call, tile, x, given, scratch);
  }
  for (; t < triplets; ++t) cube_triplet<S, kPoints, false>(call, tile, t, x, adv, scratch);
}

using OneTile = void (*)(const Call&, const Tile&, Scratch&);

static int over_tiles(const Call& call, int threads, OneTile body) {
  const int64_t elements = call.plan.batch * call.plan.elements(), tiles = call.plan.batch * call.tiling.each;
  // Several tasks for each thread, so that none waits long for the last.
  const int64_t share = (tiles - 1) / (kShares * int64_t{threads}) + 1;
  const int64_t chunk = elements <= kSerial ? tiles : least(kChunk * tiles / elements + 1, share);
  parallel_ranges(tiles, chunk, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i) body(call, tile_of(call.tiling, i), scratch);
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

}  // namespace elle_fast::ELLE_ISA
