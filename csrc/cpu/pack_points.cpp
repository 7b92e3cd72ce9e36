// pack_points and random_start on the CPU: one pass over x and the gradient, one write of each point.
//
// Work goes by tiles of some places of some channels of one sample, small enough that what belongs to one stays in the
// first-level cache: draw the noise, make the points, normalise, convert, store. In fp32 8 + 16 bytes an element of x
// pass through memory; large results are stored past the cache, which would otherwise read each line before it is
// overwritten. Bound by memory for results that do not fit the cache, else by the products of Philox (20 for two
// elements of x_a and of x_b).
#include <cstdlib>

#include "../common/ball.h"
#include "../common/pack_points.h"
#include "convert.h"
#include "kernels.h"
#include "noise.h"
#include "parallel.h"

namespace elle_fast {
namespace ELLE_ISA {
namespace {

constexpr int kTile = 768;                     // elements of a tile
constexpr int kMostChannels = 64;              // of a tile where the points' channels lie last
constexpr int64_t kSerial = 16384;             // elements that are not worth a second thread
constexpr int64_t kChunk = 32768;              // elements of a task
constexpr int64_t kStream = int64_t{1} << 22;  // bytes of points from which on they are stored past the cache

static ELLE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Sizes of tiles. In the working order, that of the points, a sample is a matrix [channels, plane], or its transpose if
// channels lie last. Otherwise it is one row, as channels make no difference but to the statistics.
struct Tiling {
  bool matrix;       // whether x, the gradient or the points have channels last
  int64_t channels;  // rows and columns of the matrix
  int64_t plane;
  int channels_each, places_each;  // of a tile
  int64_t across, each;            // tiles along the channels, and in a sample

  explicit Tiling(const PackPlan& plan) {
    matrix = plan.points_last || plan.x_last || plan.given_last;
    channels = matrix ? plan.channels : 1;
    plane = matrix ? plan.plane : plan.elements();
    channels_each = static_cast<int>(least(channels, kMostChannels));
    places_each = static_cast<int>(least(kTile / channels_each, plane));
    // A whole number of groups, where there are several tiles, wastes no noise.
    if (places_each < plane && places_each > 32) places_each -= places_each % 32;
    across = (channels + channels_each - 1) / channels_each;
    each = across * ((plane + places_each - 1) / places_each);
  }
};

struct Tile {
  int64_t row;             // of x
  int64_t channel, place;  // the first
  int channels, places;

  int size() const { return channels * places; }
};

static Tile tile_of(const Tiling& tiling, int64_t index) {
  Tile tile;
  tile.row = index / tiling.each;
  const int64_t inside = index % tiling.each;
  tile.channel = inside % tiling.across * tiling.channels_each;
  tile.place = inside / tiling.across * tiling.places_each;
  tile.channels = static_cast<int>(least(tiling.channels_each, tiling.channels - tile.channel));
  tile.places = static_cast<int>(least(tiling.places_each, tiling.plane - tile.place));
  return tile;
}

// Numbers of one tile; whole vectors and groups of noise may reach beyond the last.
struct alignas(64) Buffer {
  float values[kTile + 4 * kSpan];
};

// Everything that the tasks of one call share.
struct Call {
  const PackPlan& plan;
  const PackTensors& tensors;
  Tiling tiling;
  Keys keys;
  bool stream;  // past the cache
  bool direct;  // a point is made where it belongs, in its type; else in a buffer, from which it is stored

  Call(const PackPlan& p, const PackTensors& t) : plan(p), tensors(t), tiling(p), keys(static_cast<uint64_t>(*t.seed)) {
    const int size = bytes_of(p.points_type);
    stream = p.rows() * p.elements() * size >= kStream;
    direct = !p.normalise && !tiling.matrix;
    // Others would have to read a point back, in its type or past the cache, and are rare.
    if (p.points != Points::kElle) direct = direct && !stream && size == 4;
    // A store past the cache is a whole vector.
    if (stream)
      direct = direct && p.elements() % kSpan == 0 && reinterpret_cast<uintptr_t>(t.points) % kVectorBytes == 0;
  }

  uint32_t sample(const Tile& tile) const { return static_cast<uint32_t>(plan.sample_offset + tile.row); }
  int64_t first_row(const Tile& tile, int64_t triplet) const {
    return plan.first_rows() + triplet * blocks_of(plan.points) * plan.part + tile.row;
  }
};

// What a thread needs for a tile.
struct Scratch {
  Buffer x, given, first, noise[2], points[5], other, mean, scale;
};

// ---- Between the tensors and a tile in the working order

template <class Number>
static void transpose(const Number* from, int rows, int columns, Number* to) {  // [rows, columns] -> [columns, rows]
  if (rows == 3) {
    for (int i = 0; i < columns; ++i) {
      to[3 * i] = from[i];
      to[3 * i + 1] = from[columns + i];
      to[3 * i + 2] = from[2 * columns + i];
    }
  } else if (columns == 3) {
    for (int i = 0; i < rows; ++i) {
      to[i] = from[3 * i];
      to[rows + i] = from[3 * i + 1];
      to[2 * rows + i] = from[3 * i + 2];
    }
  } else {
    for (int i = 0; i < columns; ++i)
      for (int j = 0; j < rows; ++j) to[i * rows + j] = from[j * columns + i];
  }
}

// Calls each(element of the sample in memory, place in the tile, count) for the runs of a tile that lie together in a
// tensor, whose channels are last or not; the tile's places are numbered in that order.
template <class Each>
static ELLE_INLINE void over_runs(const Call& call, const Tile& tile, bool last, const Each& each) {
  const PackPlan& plan = call.plan;
  if (!call.tiling.matrix) {
    each(tile.place, 0, tile.places);
  } else if (!last) {
    for (int c = 0; c < tile.channels; ++c)
      each((tile.channel + c) * plan.plane + tile.place, c * tile.places, tile.places);
  } else if (tile.channels == plan.channels) {
    each(tile.place * plan.channels, 0, tile.size());
  } else {
    for (int p = 0; p < tile.places; ++p)
      each((tile.place + p) * plan.channels + tile.channel, p * tile.channels, tile.channels);
  }
}

// A tensor's part of a tile as float32: in place, where it lies so already.
static const float* loaded(const Call& call, const Tile& tile, const void* tensor, DType type, bool last,
                           Buffer& buffer, Buffer& other) {
  const PackPlan& plan = call.plan;
  const int64_t base = tile.row * plan.elements();
  if (!call.tiling.matrix && type == DType::kFloat32) return static_cast<const float*>(tensor) + base + tile.place;
  const bool turned = last != plan.points_last;
  float* to = turned ? other.values : buffer.values;
  over_runs(call, tile, last,
            [&](int64_t element, int i, int count) { load_floats(tensor, type, base + element, count, to + i); });
  if (turned) {
    const int rows = last ? tile.places : tile.channels;
    transpose(to, rows, tile.size() / rows, buffer.values);
  }
  return buffer.values;
}

// Writes past the cache.
static void stream_out(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  int64_t done = least(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) % kVectorBytes));
  std::memcpy(out, in, done);
  for (; done + kVectorBytes <= bytes; done += kVectorBytes)
    stream<DType::kFloat32>(out + done, vector_at<Floats>(in + done));
  std::memcpy(out + done, in + done, bytes - done);
}

// A point's part of a tile, normalised, converted, to row `row` of the points.
static void store_point(const Call& call, const Tile& tile, int64_t row, const float* points, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  if (plan.normalise) {
    for (int i = 0, n = tile.size(); i < n; ++i)
      scratch.other.values[i] = normalised(points[i], scratch.mean.values[i], scratch.scale.values[i]);
    points = scratch.other.values;
  }
  const int64_t base = row * plan.elements();
  over_runs(call, tile, plan.points_last, [&](int64_t element, int i, int count) {
    if (!call.stream) {
      store_floats(points + i, count, call.tensors.points, plan.points_type, base + element);
    } else if (plan.points_type == DType::kFloat32) {
      stream_out(static_cast<float*>(call.tensors.points) + base + element, points + i, 4 * int64_t{count});
    } else {
      alignas(64) uint16_t narrow[kTile];
      store_floats(points + i, count, narrow, plan.points_type, 0);
      stream_out(static_cast<uint16_t*>(call.tensors.points) + base + element, narrow, 2 * int64_t{count});
    }
  });
}

// Where a row's part of a tile is made: where it belongs, or in a buffer, from which finish() stores it.
static ELLE_INLINE void* place_of(const Call& call, const Tile& tile, int64_t row, Buffer& buffer) {
  if (!call.direct) return buffer.values;
  const int64_t element = row * call.plan.elements() + tile.place;
  return static_cast<char*>(call.tensors.points) + element * bytes_of(call.plan.points_type);
}

static ELLE_INLINE void finish(const Call& call, const Tile& tile, int64_t row, const void* made, Scratch& scratch) {
  if (!call.direct) store_point(call, tile, row, static_cast<const float*>(made), scratch);
}

// Mean and 1 / std of each element of a tile.
static void fill_statistics(const Call& call, const Tile& tile, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  const float *mean = call.tensors.statistics, *scale = mean + plan.channels;
  if (call.tiling.matrix && plan.points_last) {
    for (int i = 0; i < tile.size(); i += tile.channels) {
      std::memcpy(scratch.mean.values + i, mean + tile.channel, sizeof(float) * tile.channels);
      std::memcpy(scratch.scale.values + i, scale + tile.channel, sizeof(float) * tile.channels);
    }
    return;
  }
  over_runs(call, tile, false, [&](int64_t element, int i, int count) {
    for (const int end = i + count; i < end;) {
      const int64_t channel = element / plan.plane;
      const int until = i + static_cast<int>(least(end - i, (channel + 1) * plan.plane - element));
      element += until - i;
      for (; i < until; ++i) {
        scratch.mean.values[i] = mean[channel];
        scratch.scale.values[i] = scale[channel];
      }
    }
  });
}

// Noise of a tile in the working order, drawn by draw(begin, count, to[0], to[1]) in logical order for runs that begin
// at multiples of `group`.
template <int kCount, class Draw>
static void arrange(const Call& call, const Tile& tile, int group, float* const (&to)[kCount], const Draw& draw) {
  if (!call.tiling.matrix) return draw(tile.place, tile.places, to);
  Buffer drawn[kCount], rows[kCount];
  float* ends[kCount];
  for (int k = 0; k < kCount; ++k) ends[k] = drawn[k].values;
  over_runs(call, tile, false, [&](int64_t begin, int i, int count) {
    const int late = static_cast<int>(begin % group);
    draw(begin - late, count + late, ends);
    for (int k = 0; k < kCount; ++k)
      std::memcpy((call.plan.points_last ? rows[k].values : to[k]) + i, ends[k] + late, sizeof(float) * count);
  });
  for (int k = 0; k < kCount && call.plan.points_last; ++k)
    transpose(rows[k].values, tile.channels, tile.places, to[k]);
}

// Words of a tile in the working order, their bits in floats.
static void arrange_start(const Call& call, const Tile& tile, float* words) {
  float* const to[1] = {words};
  arrange(call, tile, 4, to, [&](int64_t begin, int count, float* const(&drawn)[1]) {
    draw_start(call.keys, call.sample(tile), begin, count, [&](auto, int i, Narrow w) { put(drawn[0] + i, w); });
  });
}

static void arrange_pairs(const Call& call, const Tile& tile, int64_t triplet, float* a, float* b) {
  float* const to[2] = {a, b};
  arrange(call, tile, 2, to, [&](int64_t begin, int count, float* const(&drawn)[2]) {
    draw_pairs(call.keys, call.sample(tile), triplet, begin, count, [&](auto, int i, Narrow words_a, Narrow words_b) {
      put(drawn[0] + i, words_a);
      put(drawn[1] + i, words_b);
    });
  });
}

// ---- The linf ball, a vector at a time

// How points are written: clamped to bounds or not, past the cache or not, in which type.
template <bool kClampValue, bool kStreamValue, DType kTypeValue>
struct Style {
  static constexpr bool kClamp = kClampValue, kStream = kStreamValue;
  static constexpr DType kType = kTypeValue;
};

// The options as vectors, and a tile's numbers at their places; kWhole: all of a vector is in the tile.
template <class S>
struct Cube {
  const int n;
  const bool project;
  const Floats eps, step_size, radius, low, high;

  Cube(const PackPlan& plan, const Tile& tile)
      : n(tile.size()),
        project(plan.project),
        eps(Floats{} + plan.eps),
        step_size(Floats{} + plan.step_size),
        radius(Floats{} + plan.radius),
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

  ELLE_INLINE Floats noisy(Floats x, Narrow words, Floats reach) const {
    return drawn<S::kClamp>(x, symmetric(words), reach, low, high);
  }

  ELLE_INLINE Floats after_step(Floats x, Floats point, Floats grad) const {
    return stepped<S::kClamp>(x, point, grad, step_size, project, eps, low, high);
  }
};

// Words of a tile, a vector at a time: each(whole, i, words).
template <class Each>
static ELLE_INLINE void over_start(const Call& call, const Tile& tile, Scratch& scratch, const Each& each) {
  const uint32_t sample = call.sample(tile);
  if (!call.tiling.matrix) return draw_start(call.keys, sample, tile.place, tile.places, each);
  arrange_start(call, tile, scratch.noise[0].values);
  for (int i = 0; i < tile.size(); i += kSpan) each(Number<1>(), i, vector_at<Narrow>(scratch.noise[0].values + i));
}

// Likewise of both corners of a triplet: each(whole, i, words_a, words_b).
template <class Each>
static ELLE_INLINE void over_pairs(const Call& call, const Tile& tile, int64_t triplet, Scratch& scratch,
                                   const Each& each) {
  const uint32_t sample = call.sample(tile);
  if (!call.tiling.matrix) return draw_pairs(call.keys, sample, triplet, tile.place, tile.places, each);
  const float *a = scratch.noise[0].values, *b = scratch.noise[1].values;
  arrange_pairs(call, tile, triplet, scratch.noise[0].values, scratch.noise[1].values);
  for (int i = 0; i < tile.size(); i += kSpan) each(Number<1>(), i, vector_at<Narrow>(a + i), vector_at<Narrow>(b + i));
}

static const float* loaded_x(const Call& call, const Tile& tile, Scratch& scratch) {
  return loaded(call, tile, call.tensors.x, call.plan.x_type, call.plan.x_last, scratch.x, scratch.other);
}

static const float* loaded_given(const Call& call, const Tile& tile, Scratch& scratch) {
  return loaded(call, tile, call.tensors.given, call.plan.given_type, call.plan.given_last, scratch.given,
                scratch.other);
}

template <class S>
static const float* cube_first(const Call& call, const Tile& tile, const float* x, const float* given,
                               Scratch& scratch) {
  const PackPlan& plan = call.plan;
  const Cube<S> cube(plan, tile);
  void* to = place_of(call, tile, tile.row, scratch.first);
  if (plan.first == First::kStep && plan.start) {
    over_start(call, tile, scratch, [&](auto whole, int i, Narrow words) __attribute__((always_inline)) {
      const Floats at = cube.template get<whole.value>(x, i), grad = cube.template get<whole.value>(given, i);
      cube.template put<whole.value>(to, i, cube.after_step(at, cube.noisy(at, words, cube.radius), grad));
    });
  } else {
    for (int i = 0; i < cube.n; i += kSpan) {
      const Floats at = cube.template get<false>(x, i), second = cube.template get<false>(given, i);
      cube.template put<false>(to, i, plan.first == First::kGiven ? second : cube.after_step(at, at, second));
    }
  }
  finish(call, tile, tile.row, to, scratch);
  return static_cast<const float*>(to);
}

// The rows of a triplet. With kFused the attack's point is made beside them, so that all memory is used all the time;
// `first` is then the gradient, else the attack's points, which ELLE-2p looks at.
template <class S, Points kPoints, bool kFused>
static void cube_triplet(const Call& call, const Tile& tile, int64_t triplet, const float* x, const float* first,
                         Scratch& scratch) {
  constexpr int kBlocks = blocks_of(kPoints);
  const PackPlan& plan = call.plan;
  const Cube<S> cube(plan, tile);
  const int64_t row = call.first_row(tile, triplet);
  const Floats alpha = Floats{} + call.tensors.alpha[triplet * plan.part + tile.row];
  void *to[kBlocks], *to_first = kFused ? place_of(call, tile, tile.row, scratch.first) : nullptr;
  for (int k = 0; k < kBlocks; ++k) to[k] = place_of(call, tile, row + k * plan.part, scratch.points[k]);
  over_pairs(call, tile, triplet, scratch,
             [&](auto whole, int i, Narrow words_a, Narrow words_b) __attribute__((always_inline)) {
               constexpr bool kWhole = whole.value;
               const Floats at = cube.template get<kWhole>(x, i);
               if (kFused)
                 cube.template put<kWhole>(to_first, i, cube.after_step(at, at, cube.template get<kWhole>(first, i)));
               const Floats x_a = cube.noisy(at, words_a, cube.eps);
               const Floats x_b =
                   kPoints == Points::kElle2p ? cube.template get<kWhole>(first, i) : cube.noisy(at, words_b, cube.eps);
               cube.template put<kWhole>(to[0], i, x_a);
               if (kPoints == Points::kFivePoint) {
                 for (int k = 1; k < 4; ++k)
                   cube.template put<kWhole>(to[k], i, between(x_a, x_b, Floats{} + 0.25f * k));
                 cube.template put<kWhole>(to[kBlocks - 1], i, x_b);
               } else {
                 if (kPoints == Points::kElle) cube.template put<kWhole>(to[1], i, x_b);
                 cube.template put<kWhole>(to[kBlocks - 1], i, between(x_a, x_b, alpha));
               }
             });
  if (kFused) finish(call, tile, tile.row, to_first, scratch);
  for (int k = 0; k < kBlocks; ++k) finish(call, tile, row + k * plan.part, to[k], scratch);
}

template <class S, Points kPoints>
static void cube_tile(const Call& call, const Tile& tile, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  const float *x = loaded_x(call, tile, scratch), *first = nullptr;
  if (plan.normalise) fill_statistics(call, tile, scratch);
  const int64_t triplets = tile.row < plan.part ? plan.triplets : 0;
  int64_t t = 0;
  if (plan.first != First::kNone) {
    const float* given = loaded_given(call, tile, scratch);
    if (kPoints == Points::kElle && plan.first == First::kStep && !plan.start && triplets > 0)
      cube_triplet<S, kPoints, kPoints == Points::kElle>(call, tile, t++, x, given, scratch);
    else
      first = cube_first<S>(call, tile, x, given, scratch);
  }
  for (; t < triplets; ++t) cube_triplet<S, kPoints, false>(call, tile, t, x, first, scratch);
}

template <class S>
static void cube_start(const Call& call, const Tile& tile, Scratch& scratch) {
  const Cube<S> cube(call.plan, tile);
  const float* x = loaded_x(call, tile, scratch);
  void* to = place_of(call, tile, tile.row, scratch.first);
  over_start(call, tile, scratch, [&](auto whole, int i, Narrow words) __attribute__((always_inline)) {
    const Floats at = cube.template get<whole.value>(x, i);
    cube.template put<whole.value>(to, i, cube.noisy(at, words, cube.radius));
  });
  finish(call, tile, tile.row, to, scratch);
}

using OneTile = void (*)(const Call&, const Tile&, Scratch&);

static void over_tiles(const Call& call, int threads, OneTile body) {
  const int64_t elements = call.plan.batch * call.plan.elements(), tiles = call.plan.batch * call.tiling.each;
  const int64_t chunk = elements <= kSerial ? tiles : kChunk * tiles / elements + 1;
  parallel_for((tiles + chunk - 1) / chunk, threads, [&](int64_t task) {
    Scratch scratch;
    for (int64_t i = task * chunk, end = least(i + chunk, tiles); i < end; ++i)
      body(call, tile_of(call.tiling, i), scratch);
    if (call.stream) end_of_stream();
  });
}

template <bool kClamp, bool kStream>
static OneTile direct_tile(DType type) {
  if (type == DType::kFloat16) return cube_tile<Style<kClamp, kStream, DType::kFloat16>, Points::kElle>;
  if (type == DType::kBFloat16) return cube_tile<Style<kClamp, kStream, DType::kBFloat16>, Points::kElle>;
  return cube_tile<Style<kClamp, kStream, DType::kFloat32>, Points::kElle>;
}

template <bool kClamp>
static OneTile tile_for(const Call& call) {
  // Buffers hold float32 and are in the cache, wherever what is in them goes.
  using Buffered = Style<kClamp, false, DType::kFloat32>;
  if (call.plan.points == Points::kElle2p) return cube_tile<Buffered, Points::kElle2p>;
  if (call.plan.points == Points::kFivePoint) return cube_tile<Buffered, Points::kFivePoint>;
  if (!call.direct) return cube_tile<Buffered, Points::kElle>;
  return call.stream ? direct_tile<kClamp, true>(call.plan.points_type)
                     : direct_tile<kClamp, false>(call.plan.points_type);
}

// ---- The l2 ball, a sample at a time: its norms have to be known before it can be written

// Numbers of one sample, tile by tile.
struct Sample {
  float *first, *a, *b;
};

// Sum of squares in float64, whose range no square of a float32 leaves; in an order that depends on nothing but n.
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

// Words, drawn in whole vectors, as normal noise in place: Box-Muller on neighbours.
static void make_normals(int count, float* numbers) {
  for (int i = 0; i < count; i += 2) {
    uint32_t words[2];
    std::memcpy(words, numbers + i, sizeof words);
    const Normals pair = normals(words[0], words[1]);
    numbers[i] = pair.even;
    numbers[i + 1] = pair.odd;
  }
}

// Normal noise of a tile, in the working order.
static void start_normals(const Call& call, const Tile& tile, Buffer& to) {
  float* const ends[1] = {to.values};
  arrange(call, tile, 4, ends, [&](int64_t begin, int count, float* const(&drawn)[1]) {
    draw_start(call.keys, call.sample(tile), begin, count,
               [&](auto, int i, Narrow words) { put(drawn[0] + i, words); });
    make_normals(count, drawn[0]);
  });
}

static void pair_normals(const Call& call, const Tile& tile, int64_t triplet, Buffer& a, Buffer& b) {
  float* const ends[2] = {a.values, b.values};
  arrange(call, tile, 2, ends, [&](int64_t begin, int count, float* const(&drawn)[2]) {
    draw_pairs(call.keys, call.sample(tile), triplet, begin, count, [&](auto, int i, Narrow words_a, Narrow words_b) {
      put(drawn[0] + i, words_a);
      put(drawn[1] + i, words_b);
    });
    for (float* numbers : drawn) make_normals(count, numbers);
  });
}

static void keep(float* to, const Buffer& from, const Tile& tile) {
  std::memcpy(to, from.values, sizeof(float) * tile.size());
}

static float scale_of(const Call& call, int64_t row, int64_t triplet, int which, float radius, const Length& length) {
  const Words words =
      block_words(static_cast<uint64_t>(*call.tensors.seed), 0, static_cast<uint32_t>(call.plan.sample_offset + row),
                  kSample, static_cast<uint32_t>(triplet));
  const uint32_t word = which == 1 ? words.w1 : which == 2 ? words.w2 : words.w3;
  return ball_scale(radius, word, length.value(), call.plan.elements());
}

// x + scale * noise, in the bounds.
template <bool kClamp>
static void make_noisy(const PackPlan& plan, int n, const float* x, const float* noise, float scale, float* to) {
  for (int i = 0; i < n; ++i) to[i] = bounded<kClamp>(x[i] + scale * noise[i], plan.low, plan.high);
}

// The attack's start, to sample.first; its noise is drawn first, to see how long it is.
template <bool kClamp>
static void ball_start_of(const Call& call, int64_t row, const Sample& sample, Scratch& scratch) {
  Length length;
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    start_normals(call, tile, scratch.noise[0]);
    length.add(scratch.noise[0].values, tile.size());
    keep(sample.first + offset, scratch.noise[0], tile);
  });
  const float scale = scale_of(call, row, 0, 3, call.plan.radius, length);
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    float* to = sample.first + offset;
    make_noisy<kClamp>(call.plan, tile.size(), loaded_x(call, tile, scratch), to, scale, to);
  });
}

// The attack's point, to sample.first.
template <bool kClamp>
static void ball_first(const Call& call, int64_t row, const Sample& sample, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  if (plan.first == First::kGiven) {
    over_sample(call, row, [&](const Tile& tile, int64_t offset) {
      std::memcpy(sample.first + offset, loaded_given(call, tile, scratch), sizeof(float) * tile.size());
    });
    return;
  }
  if (plan.start) ball_start_of<kClamp>(call, row, sample, scratch);
  Length gradient, moved;
  over_sample(call, row,
              [&](const Tile& tile, int64_t) { gradient.add(loaded_given(call, tile, scratch), tile.size()); });
  const float length = gradient.value();
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    const float *x = loaded_x(call, tile, scratch), *given = loaded_given(call, tile, scratch);
    float *to = sample.first + offset, *offsets = scratch.noise[0].values;
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
    float* to = sample.first + offset;
    for (int i = 0, n = tile.size(); i < n; ++i)
      to[i] = bounded<kClamp>(ball_projected(x[i], to[i], pull), plan.low, plan.high);
  });
}

template <bool kClamp>
static void ball_triplet(const Call& call, int64_t row, int64_t triplet, const Sample& sample, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  Length length_a, length_b;
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    pair_normals(call, tile, triplet, scratch.noise[0], scratch.noise[1]);
    length_a.add(scratch.noise[0].values, tile.size());
    length_b.add(scratch.noise[1].values, tile.size());
    keep(sample.a + offset, scratch.noise[0], tile);
    keep(sample.b + offset, scratch.noise[1], tile);
  });
  const float scale_a = scale_of(call, row, triplet, 1, plan.eps, length_a);
  const float scale_b = scale_of(call, row, triplet, 2, plan.eps, length_b);
  const float alpha = call.tensors.alpha[triplet * plan.part + row];
  const int last = blocks_of(plan.points) - 1;
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    if (plan.normalise) fill_statistics(call, tile, scratch);
    const int n = tile.size();
    const int64_t first_row = call.first_row(tile, triplet);
    const float* x = loaded_x(call, tile, scratch);
    float *x_a = sample.a + offset, *x_b = sample.first + offset, *x_c = scratch.points[0].values;
    make_noisy<kClamp>(plan, n, x, x_a, scale_a, x_a);
    if (plan.points != Points::kElle2p) {
      x_b = sample.b + offset;
      make_noisy<kClamp>(plan, n, x, x_b, scale_b, x_b);
    }
    store_point(call, tile, first_row, x_a, scratch);
    const bool five = plan.points == Points::kFivePoint;
    for (int k = five ? 1 : last; k <= (five ? 3 : last); ++k) {
      const float weight = five ? 0.25f * k : alpha;
      for (int i = 0; i < n; ++i) x_c[i] = between(x_a[i], x_b[i], weight);
      store_point(call, tile, first_row + k * plan.part, x_c, scratch);
    }
    if (plan.points != Points::kElle2p) store_point(call, tile, first_row + (five ? 4 : 1) * plan.part, x_b, scratch);
  });
}

static void ball_store_first(const Call& call, int64_t row, const Sample& sample, Scratch& scratch) {
  over_sample(call, row, [&](const Tile& tile, int64_t offset) {
    if (call.plan.normalise) fill_statistics(call, tile, scratch);
    store_point(call, tile, row, sample.first + offset, scratch);
  });
}

template <bool kClamp>
static void ball_sample(const Call& call, int64_t row, const Sample& sample, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  if (plan.first != First::kNone) {
    ball_first<kClamp>(call, row, sample, scratch);
    ball_store_first(call, row, sample, scratch);
  }
  for (int64_t t = 0; row < plan.part && t < plan.triplets; ++t) ball_triplet<kClamp>(call, row, t, sample, scratch);
}

template <bool kClamp>
static void ball_start(const Call& call, int64_t row, const Sample& sample, Scratch& scratch) {
  ball_start_of<kClamp>(call, row, sample, scratch);
  ball_store_first(call, row, sample, scratch);
}

using OneSample = void (*)(const Call&, int64_t, const Sample&, Scratch&);

// False: no memory for the numbers of a sample.
static bool over_samples(const Call& call, int threads, OneSample body) {
  const int64_t batch = call.plan.batch, elements = call.plan.elements();
  const int64_t chunk = batch * elements <= kSerial ? batch : kChunk / elements + 1;
  bool failed = false;
  parallel_for((batch + chunk - 1) / chunk, threads, [&](int64_t task) {
    float* numbers = static_cast<float*>(std::malloc(3 * elements * sizeof(float)));
    if (numbers == nullptr) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    Scratch scratch;
    const Sample sample = {numbers, numbers + elements, numbers + 2 * elements};
    for (int64_t row = task * chunk, end = least(row + chunk, batch); row < end; ++row)
      body(call, row, sample, scratch);
    if (call.stream) end_of_stream();
    std::free(numbers);
  });
  return !failed;
}

// ---- What both balls share

// alpha of all residuals.
static void make_alpha(const Call& call) {
  const PackPlan& plan = call.plan;
  float* alpha = call.tensors.alpha;
  const int64_t residuals = plan.triplets * plan.part;
  if (residuals == 0) return;
  if (plan.alpha == Alpha::kGiven) {
    std::memcpy(alpha, call.tensors.alpha_in, sizeof(float) * residuals);
  } else if (plan.alpha == Alpha::kHalf) {
    for (int64_t i = 0; i < residuals; ++i) alpha[i] = 0.5f;
  } else {
    for (int64_t triplet = 0; triplet < plan.triplets; ++triplet)
      draw_samples(call.keys, plan.sample_offset, triplet, plan.part,
                   [&](int64_t i, const Words& words) { alpha[triplet * plan.part + i] = uniform(words.w0); });
  }
}

}  // namespace

bool pack_points(const PackPlan& plan, const PackTensors& tensors, int threads) {
  const Call call(plan, tensors);
  make_alpha(call);
  if (plan.norm == Norm::kL2) return over_samples(call, threads, plan.clamp ? ball_sample<true> : ball_sample<false>);
  over_tiles(call, threads, plan.clamp ? tile_for<true>(call) : tile_for<false>(call));
  return true;
}

bool random_start(const PackPlan& plan, const PackTensors& tensors, int threads) {
  Call call(plan, tensors);
  call.direct = call.direct && !call.stream && plan.points_type == DType::kFloat32;
  if (plan.norm == Norm::kL2) return over_samples(call, threads, plan.clamp ? ball_start<true> : ball_start<false>);
  using Clamped = Style<true, false, DType::kFloat32>;
  using Free = Style<false, false, DType::kFloat32>;
  over_tiles(call, threads, plan.clamp ? cube_start<Clamped> : cube_start<Free>);
  return true;
}

}  // namespace ELLE_ISA
}  // namespace elle_fast
