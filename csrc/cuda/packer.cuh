// What both kernels of pack_points do with kVec neighbours in memory: read, draw, write.
#pragma once

#include "noise.cuh"
#include "vectors.cuh"

namespace elle_fast::cuda {

struct Work {
  PackPlan plan;
  PackTensors tensors;
  bool wide;  // pointers and samples are aligned to 16 bytes
};

// The types of 2 bytes have a kernel in common.
template <int kBytes, bool kLast, bool kBall>
struct Packer {
  static constexpr int kVec = 16 / kBytes;
  static constexpr bool kInBall = kBall;
  using Values = float[kVec];

  const PackPlan& plan;
  const PackTensors& tensors;
  const int64_t elements, vectors;
  const uint64_t seed;
  const bool wide;  // 16 bytes at a time

  inline __device__ Packer(const Work& work, bool wide)
      : plan(work.plan),
        tensors(work.tensors),
        elements(work.plan.elements()),
        vectors((elements + kVec - 1) / kVec),
        seed(static_cast<uint64_t>(*work.tensors.seed)),
        wide(wide) {}

  inline __device__ Words sample_words(int64_t row, int64_t triplet) const {
    return block_words(seed, 0, plan.sample(row), kSample, static_cast<uint32_t>(triplet));
  }

  // Neighbours in the points' layout, which may lie apart in that of x or of the gradient.
  template <class U>
  inline __device__ void read_as(const U* sample, bool last, int64_t memory, Values& values) const {
    if (last == kLast) {
      if (wide) return load(sample + memory, values);
      return load_some(sample + memory, elements - memory, values);
    }
    Place<kLast> place(plan, memory);
#pragma unroll
    for (int i = 0; i < kVec; ++i, place.advance(plan)) {
      const int64_t offset = kLast ? place.element(plan) : place.element_last(plan);
      values[i] = inside(memory, i) ? to_float(sample[offset]) : 0.0f;
    }
  }

  inline __device__ void read(const void* tensor, DType type, bool last, int64_t row, int64_t memory,
                              Values& values) const {
    const int64_t begin = row * elements;
    if (type == DType::kFloat32) {
      read_as(static_cast<const float*>(tensor) + begin, last, memory, values);
    } else if (type == DType::kFloat16) {
      read_as(static_cast<const __half*>(tensor) + begin, last, memory, values);
    } else {
      read_as(static_cast<const __nv_bfloat16*>(tensor) + begin, last, memory, values);
    }
  }

  inline __device__ void read_x(int64_t row, int64_t memory, Values& x) const {
    read(tensors.x, plan.x_type, plan.x_last, row, memory, x);
  }

  inline __device__ void read_given(int64_t row, int64_t memory, Values& given) const {
    read(tensors.given, plan.given_type, plan.given_last, row, memory, given);
  }

  inline __device__ bool inside(int64_t memory, int i) const { return wide || memory + i < elements; }

  // Noise of the corners of a triplet, or of the attack's start.
  template <int kCount>
  inline __device__ void draw(int64_t row, int64_t triplet, int64_t memory, Values (&noise)[kCount]) const {
    draw_noise<kBall, kLast>(plan, seed, plan.sample(row), static_cast<uint32_t>(triplet), memory, noise);
  }

  // Points as the model takes them, in one row.
  inline __device__ void write(int64_t row, int64_t memory, const Values& points) const {
    Values values;
    ELLE_EACH(i, kVec) values[i] = points[i];
    if (plan.normalize) {
      Place<kLast> place(plan, memory);
#pragma unroll
      for (int i = 0; i < kVec; ++i, place.advance(plan)) {
        if (!inside(memory, i)) break;
        const float* mean = tensors.statistics + place.channel;
        values[i] = normalized(values[i], mean[0], mean[plan.channels]);
      }
    }
    if constexpr (kBytes == 4) {
      write_as<float>(row, memory, values);
    } else if (plan.points_type == DType::kFloat16) {
      write_as<__half>(row, memory, values);
    } else {
      write_as<__nv_bfloat16>(row, memory, values);
    }
  }

  template <class T>
  inline __device__ void write_as(int64_t row, int64_t memory, const Values& values) const {
    T* out = static_cast<T*>(tensors.points) + row * elements + memory;
    if (wide) {
      store(out, values);
    } else {
      store_some(out, elements - memory, values);
    }
  }

  inline __device__ float alpha_of(int64_t row, int64_t triplet) const {
    if (plan.alpha == Alpha::kUniform) return uniform(sample_words(row, triplet).w0);
    return plan.alpha == Alpha::kHalf ? 0.5f : tensors.alpha_in[triplet * plan.part + row];
  }

  inline __device__ void write_between(int64_t row, int64_t memory, const Values& x_a, const Values& x_b,
                                       float alpha) const {
    Values x_c;
    ELLE_EACH(i, kVec) x_c[i] = between(x_a[i], x_b[i], alpha);
    write(row, memory, x_c);
  }

  // The rows of one triplet; blocks lie `part` rows apart (elle_fast/ops/layout.py).
  inline __device__ void write_triplet(int64_t row, int64_t triplet, int64_t memory, const Values& x, const Values& adv,
                                       float radius_a, float radius_b, float alpha) const {
    Values noise[2], x_a, x_b;
    draw(row, triplet, memory, noise);
    ELLE_EACH(i, kVec) {
      x_a[i] = drawn<true>(x[i], noise[0][i], radius_a, plan.low, plan.high);
      x_b[i] = plan.points == Points::kElle2p ? adv[i] : drawn<true>(x[i], noise[1][i], radius_b, plan.low, plan.high);
    }
    int64_t out = plan.adv_rows() + triplet * blocks_of(plan.points) * plan.part + row;
    write(out, memory, x_a);
    if (plan.points == Points::kElle) {
      write(out += plan.part, memory, x_b);
      write_between(out + plan.part, memory, x_a, x_b, alpha);
    } else if (plan.points == Points::kElle2p) {
      write_between(out + plan.part, memory, x_a, x_b, alpha);
    } else {
#pragma unroll 1
      for (int place = 1; place < 4; ++place) write_between(out += plan.part, memory, x_a, x_b, 0.25f * place);
      write(out + plan.part, memory, x_b);
    }
  }
};

}  // namespace elle_fast::cuda
