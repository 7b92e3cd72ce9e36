// What the tasks of one call of pack_points share, and the ways of a tile: from the tensors into buffers of floats in
// the working order, and from there, normalized and converted, to the points.
#pragma once

#include "../common/pack_points.h"
#include "convert.h"
#include "noise.h"
#include "parallel.h"

namespace elle_fast::ELLE_ISA {

constexpr int kTile = 768;                     // elements of a tile that passes through buffers
constexpr int kDirectTile = 3072;              // of one that does not
constexpr int kMostChannels = 64;              // of a tile where the points' channels lie last
constexpr int64_t kSerial = 16384;             // elements that are not worth a second thread
constexpr int64_t kChunk = 32768;              // elements of a task, at most about
constexpr int64_t kShares = 4;                 // tasks for a thread, at least, where there are so many tiles
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

  Tiling(const PackPlan& plan, int most) {
    matrix = is_matrix(plan);
    channels = matrix ? plan.channels : 1;
    plane = matrix ? plan.plane : plan.elements();
    channels_each = static_cast<int>(least(channels, kMostChannels));
    places_each = static_cast<int>(least(most / channels_each, plane));
    // A whole number of groups, where there are several tiles, wastes no noise.
    if (places_each < plane && places_each > 32) places_each -= places_each % 32;
    across = (channels + channels_each - 1) / channels_each;
    each = across * ((plane + places_each - 1) / places_each);
  }

  static bool is_matrix(const PackPlan& plan) { return plan.points_last || plan.x_last || plan.given_last; }
};

struct Tile {
  int64_t row;             // of x
  int64_t channel, place;  // that it begins with
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
  Keys keys;
  int64_t bytes;  // of the points
  bool stream;    // past the cache
  bool scalable;  // all radii of noise are
  bool direct;    // a point is made where it belongs, in its type; else in a buffer, from which it is stored
  Tiling tiling;

  Call(const PackPlan& p, const PackTensors& t)
      : plan(p),
        tensors(t),
        keys(static_cast<uint64_t>(*t.seed)),
        bytes(p.rows() * p.elements() * bytes_of(p.points_type)),
        stream(bytes >= kStream),
        scalable(all_scalable(p)),
        direct(is_direct()),
        tiling(p, in_place() ? kDirectTile : kTile) {}

  uint32_t sample(const Tile& tile) const { return plan.sample(tile.row); }
  // The row of x_a; the other points of the triplet lie `part` rows apart (elle_fast/ops/layout.py).
  int64_t row_of(const Tile& tile, int64_t triplet) const {
    return plan.adv_rows() + triplet * blocks_of(plan.points) * plan.part + tile.row;
  }

 private:
  static bool all_scalable(const PackPlan& p) {
    const bool start = p.start || p.adv == Adv::kStart;
    return (p.triplets == 0 || ELLE_ISA::scalable(p.eps)) && (!start || ELLE_ISA::scalable(p.radius));
  }

  bool is_direct() const {
    if (plan.norm != Norm::kLinf || plan.normalize || Tiling::is_matrix(plan) || !scalable) return false;
    // Others would have to read a point back, in its type or past the cache, and are rare.
    if (plan.adv == Adv::kStart || plan.points != Points::kElle) return !stream && plan.points_type == DType::kFloat32;
    // A store past the cache is a whole vector.
    return !stream || (plan.elements() % kSpan == 0 && reinterpret_cast<uintptr_t>(tensors.points) % kVectorBytes == 0);
  }

  // Nothing passes through a Buffer, which has room for kTile: x and what is given are read where they are, too.
  bool in_place() const {
    const bool given = plan.adv == Adv::kNone || plan.given_type == DType::kFloat32;
    return direct && plan.x_type == DType::kFloat32 && given;
  }
};

// What a thread needs for a tile.
struct Scratch {
  Buffer x, given, adv, noise[2], points[5], other, mean, scale;
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

static const float* loaded_x(const Call& call, const Tile& tile, Scratch& scratch) {
  return loaded(call, tile, call.tensors.x, call.plan.x_type, call.plan.x_last, scratch.x, scratch.other);
}

static const float* loaded_given(const Call& call, const Tile& tile, Scratch& scratch) {
  return loaded(call, tile, call.tensors.given, call.plan.given_type, call.plan.given_last, scratch.given,
                scratch.other);
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

// A point's part of a tile, normalized, converted, to row `row` of the points.
static void store_point(const Call& call, const Tile& tile, int64_t row, const float* points, Scratch& scratch) {
  const PackPlan& plan = call.plan;
  if (plan.normalize) {
    for (int i = 0, n = tile.size(); i < n; ++i)
      scratch.other.values[i] = normalized(points[i], scratch.mean.values[i], scratch.scale.values[i]);
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

// What becomes of `count` numbers in place, drawn as words in whole vectors.
using Make = void (*)(int count, float* numbers);

static void stay_words(int, float*) {}

// Noise of a tile in the working order, drawn as in draw() in logical order.
template <int kCount>
static void arrange(const Call& call, const Tile& tile, int64_t triplet, Buffer (&noise)[2], Make make) {
  const auto draw_to = [&](int64_t begin, int count, Buffer* to) {
    draw<kCount>(call.keys, call.sample(tile), triplet, begin, count, [&](auto, int i, const Narrow(&words)[kCount]) {
      for (int k = 0; k < kCount; ++k) put(to[k].values + i, words[k]);
    });
    for (int k = 0; k < kCount; ++k) make(count, to[k].values);
  };
  if (!call.tiling.matrix) return draw_to(tile.place, tile.places, noise);
  Buffer drawn[kCount], rows[kCount];
  over_runs(call, tile, false, [&](int64_t begin, int i, int count) {
    const int late = static_cast<int>(begin % kGroup<kCount>);
    draw_to(begin - late, count + late, drawn);
    for (int k = 0; k < kCount; ++k)
      std::memcpy((call.plan.points_last ? rows : noise)[k].values + i, drawn[k].values + late, sizeof(float) * count);
  });
  for (int k = 0; k < kCount && call.plan.points_last; ++k)
    transpose(rows[k].values, tile.channels, tile.places, noise[k].values);
}

}  // namespace elle_fast::ELLE_ISA
