// Neighbouring elements of a tensor as floats: 16 bytes at a time where all is aligned, else one element at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../common/plans.h"

namespace elle_fast::cuda {

inline __device__ float to_float(float value) { return value; }
inline __device__ float to_float(__half value) { return __half2float(value); }
inline __device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounded to the nearest; the second argument says to which type.
inline __device__ float from_float(float value, float) { return value; }
inline __device__ __half from_float(float value, __half) { return __float2half_rn(value); }
inline __device__ __nv_bfloat16 from_float(float value, __nv_bfloat16) { return __float2bfloat16_rn(value); }

// Two neighbours at once: one instruction.
inline __device__ __half2 pair_from_floats(float low, float high, __half) { return __floats2half2_rn(low, high); }
inline __device__ __nv_bfloat162 pair_from_floats(float low, float high, __nv_bfloat16) {
  return __floats2bfloat162_rn(low, high);
}

// What one access moves.
template <int kBytes>
struct alignas(kBytes) Piece {
  uint32_t words[kBytes / 4];
};

// As one store. Left to the compiler, the assignment of a piece was split into its words in some kernels.
template <int kBytes>
inline __device__ void write_piece(void* to, const Piece<kBytes>& piece) {
#if defined(__CUDA_ARCH__)
  const uint32_t* w = piece.words;
  if constexpr (kBytes == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(w[0]), "r"(w[1]) : "memory");
  } else {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(w[0]) : "memory");
  }
#else
  *static_cast<Piece<kBytes>*>(to) = piece;
#endif
}

template <class T, int kVec>
struct Access {
  static constexpr int kBytes = kVec * static_cast<int>(sizeof(T)) < 16 ? kVec * static_cast<int>(sizeof(T)) : 16;
  static constexpr int kEach = kBytes / static_cast<int>(sizeof(T));  // elements of a piece
  static constexpr int kPieces = kVec / kEach;
};

// What a pointer has to be a multiple of for wide accesses to kVec elements.
constexpr int alignment_of(DType type, int vec) { return vec * bytes_of(type) < 16 ? vec * bytes_of(type) : 16; }

// kVec elements from `pointer` on, which is aligned to min(16, kVec * sizeof(T)) bytes; kVec is a power of 2.
template <int kVec, class T>
inline __device__ void load(const T* pointer, float (&values)[kVec]) {
  using A = Access<T, kVec>;
  ELLE_EACH(p, A::kPieces) {
    const auto piece = reinterpret_cast<const Piece<A::kBytes>*>(pointer)[p];
    ELLE_EACH(i, A::kEach) {
      T value;
      if constexpr (sizeof(T) == 4) {
        memcpy(&value, &piece.words[i], 4);
      } else {
        const uint16_t half = static_cast<uint16_t>(piece.words[i / 2] >> (i % 2 * 16));
        memcpy(&value, &half, 2);
      }
      values[p * A::kEach + i] = to_float(value);
    }
  }
}

// The same way back; each value is rounded to the nearest.
template <int kVec, class T>
inline __device__ void store(T* pointer, const float (&values)[kVec]) {
  using A = Access<T, kVec>;
  ELLE_EACH(p, A::kPieces) {
    Piece<A::kBytes> piece;
    ELLE_EACH(w, A::kBytes / 4) {
      if constexpr (sizeof(T) == 4) {
        memcpy(&piece.words[w], &values[p * A::kEach + w], 4);
      } else {
        const int i = p * A::kEach + 2 * w;
        const auto pair = pair_from_floats(values[i], values[i + 1], T());
        memcpy(&piece.words[w], &pair, 4);
      }
    }
    write_piece(pointer + p * A::kEach, piece);
  }
}

// One element, for any pointer.
template <class T>
inline __device__ void load(const T* pointer, float (&values)[1]) {
  values[0] = to_float(*pointer);
}

template <class T>
inline __device__ void store(T* pointer, const float (&values)[1]) {
  *pointer = from_float(values[0], T());
}

// The first `count` of kVec elements, one at a time; the other values are 0. For any pointer.
template <int kVec, class T>
inline __device__ void load_some(const T* pointer, int64_t count, float (&values)[kVec]) {
  ELLE_EACH(i, kVec) values[i] = i < count ? to_float(pointer[i]) : 0.0f;
}

template <int kVec, class T>
inline __device__ void store_some(T* pointer, int64_t count, const float (&values)[kVec]) {
  ELLE_EACH(i, kVec) {
    if (i < count) pointer[i] = from_float(values[i], T());
  }
}

inline bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Calls `body` with a value of the element type.
template <class Body>
auto with_type(DType type, const Body& body) {
  if (type == DType::kFloat16) return body(__half());
  if (type == DType::kBFloat16) return body(__nv_bfloat16());
  return body(0.0f);
}

}  // namespace elle_fast::cuda
