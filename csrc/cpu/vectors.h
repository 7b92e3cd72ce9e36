// Vectors as wide as the instruction set has them.
#pragma once

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/host_device.h"

namespace elle_fast::ELLE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kSpan = kVectorBytes / 4;   // numbers in a vector
constexpr int kLanes = kVectorBytes / 8;  // numbers of 64 bits

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Narrow __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// Bits of one vector type as another.
template <class To, class From>
static ELLE_INLINE To as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  return (To)from;
}

template <class Vector>
static ELLE_INLINE Vector vector_at(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
static ELLE_INLINE void put(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// A value as a type, for lambdas.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

static ELLE_INLINE Floats all(float number) { return number - Floats{}; }
static ELLE_INLINE Wide all(uint64_t number) { return Wide{} + number; }

// 0, 1, 2, ...
template <class Vector>
static ELLE_INLINE Vector numbered() {
  Vector lanes;
  for (unsigned i = 0; i < sizeof lanes / sizeof lanes[0]; ++i) lanes[i] = i;
  return lanes;
}

static ELLE_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

static ELLE_INLINE Narrow select(Signed condition, Narrow yes, Narrow no) {
  return (as<Narrow>(condition) & yes) | (~as<Narrow>(condition) & no);
}

// a * b + c, rounded once where the machine can: half the operations of a polynomial.
static ELLE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

}  // namespace elle_fast::ELLE_ISA
