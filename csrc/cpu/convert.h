// Numbers of memory's three types as vectors of floats and back, rounded to the nearest, ties to even; NaN stays NaN.
#pragma once

#include "../common/plans.h"
#include "vectors.h"

namespace elle_fast::ELLE_ISA {

template <DType kType>
struct Memory {
  using Number = uint16_t;
};
template <>
struct Memory<DType::kFloat32> {
  using Number = float;
};

// The address of an element.
template <DType kType>
static ELLE_INLINE const void* at(const void* base, int64_t element) {
  return static_cast<const typename Memory<kType>::Number*>(base) + element;
}

template <DType kType>
static ELLE_INLINE void* at(void* base, int64_t element) {
  return static_cast<typename Memory<kType>::Number*>(base) + element;
}

// The bits of float16 numbers, one in each lane.
static ELLE_INLINE Floats float16_of(Narrow bits) {
  const Narrow size = bits & 0x7FFFu;
  const Narrow rebased = (size << 13) + 0x38000000u;  // exponents begin 112 later
  const Narrow special = select(as<Signed>(size) >= 0x7C00, rebased + 0x38000000u, rebased);
  // Subnormals are whole multiples of 2^-24.
  const Floats tiny = __builtin_convertvector(as<Signed>(size), Floats) * 0x1p-24f;
  const Narrow value = select(as<Signed>(size) < 0x0400, as<Narrow>(tiny), special);
  return as<Floats>(value | ((bits & 0x8000u) << 16));
}

static ELLE_INLINE Narrow to_float16(Floats numbers) {
  const Narrow bits = as<Narrow>(numbers), size = bits & 0x7FFFFFFFu;
  const Narrow rounded = (size - 0x38000000u + 0x0FFFu + ((size >> 13) & 1u)) >> 13;
  // The unit of the sum with 1/2 is 2^-24, that of float16's subnormals: the addition rounds to it.
  const Narrow tiny = as<Narrow>(as<Floats>(size) + 0.5f) - 0x3F000000u;
  Narrow value = select(as<Signed>(size) < 0x38800000, tiny, rounded);
  value = select(as<Signed>(size) >= 0x47800000, Narrow{} + 0x7C00u, value);
  value = select(as<Signed>(size) > 0x7F800000, ((size >> 13) & 0x03FFu) | 0x7E00u, value);
  return value | ((bits >> 16) & 0x8000u);
}

static ELLE_INLINE Narrow to_bfloat16(Floats numbers) {
  const Narrow bits = as<Narrow>(numbers);
  const Narrow rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return select(as<Signed>(bits & 0x7FFFFFFFu) > 0x7F800000, (bits >> 16) | 0x40u, rounded);
}

// kSpan numbers of 16 bits, each in the lower half of a lane.
static ELLE_INLINE Narrow widened(const void* from) {
#if defined(__SSE2__) && !defined(__AVX2__)
  // GCC 12 takes vectors of 8 bytes apart.
  return (Narrow)_mm_unpacklo_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(from)), _mm_setzero_si128());
#else
  return __builtin_convertvector(vector_at<Halves>(from), Narrow);
#endif
}

static ELLE_INLINE void put_narrowed(void* to, Narrow bits) {
#if defined(__SSE2__) && !defined(__AVX2__)
  // The pack saturates signed numbers, so the 16 bits go in as one.
  const __m128i signs = _mm_srai_epi32(_mm_slli_epi32((__m128i)bits, 16), 16);
  _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packs_epi32(signs, signs));
#else
  const Halves halves = __builtin_convertvector(bits, Halves);
  std::memcpy(to, &halves, sizeof halves);
#endif
}

// kSpan numbers from `from` on.
template <DType kType>
static ELLE_INLINE Floats load(const void* from) {
  if (kType == DType::kFloat32) return vector_at<Floats>(from);
#if defined(__AVX512F__)
  // With a mask, as GCC 12 warns of the plain form's undefined operand.
  if (kType == DType::kFloat16)
    return (Floats)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  if (kType == DType::kFloat16) return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#endif
  const Narrow bits = widened(from);
  return kType == DType::kFloat16 ? float16_of(bits) : as<Floats>(bits << 16);
}

template <DType kType>
static ELLE_INLINE void store(void* to, Floats numbers) {
  if (kType == DType::kFloat32) {
    std::memcpy(to, &numbers, sizeof numbers);
    return;
  }
#if defined(__AVX512F__)
  if (kType == DType::kFloat16) {
    const __m256i halves = _mm512_maskz_cvtps_ph(0xFFFF, (__m512)numbers, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(static_cast<__m256i*>(to), halves);
    return;
  }
#elif defined(__F16C__)
  if (kType == DType::kFloat16) {
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)numbers, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  const Narrow bits = kType == DType::kFloat16 ? to_float16(numbers) : to_bfloat16(numbers);
  put_narrowed(to, bits);
}

// The `count` < kSpan numbers from `from` on; zeros in the other lanes.
template <DType kType>
static ELLE_INLINE Floats load_some(const void* from, int count) {
  using Number = typename Memory<kType>::Number;
  Number numbers[kSpan] = {};
#if defined(__AVX512F__)
  const __mmask16 lanes = static_cast<__mmask16>((1u << count) - 1);
  if (kType == DType::kFloat32) return (Floats)_mm512_maskz_loadu_ps(lanes, from);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers), _mm256_maskz_loadu_epi16(lanes, from));
#else
  for (int i = 0; i < count; ++i) numbers[i] = static_cast<const Number*>(from)[i];
#endif
  return load<kType>(numbers);
}

// The first `count` < kSpan lanes.
template <DType kType>
static ELLE_INLINE void store_some(void* to, Floats values, int count) {
  using Number = typename Memory<kType>::Number;
#if defined(__AVX512F__)
  const __mmask16 lanes = static_cast<__mmask16>((1u << count) - 1);
  if (kType == DType::kFloat32) {
    _mm512_mask_storeu_ps(to, lanes, (__m512)values);
    return;
  }
#endif
  Number numbers[kSpan];
  store<kType>(numbers, values);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(to, lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
#else
  for (int i = 0; i < count; ++i) static_cast<Number*>(to)[i] = numbers[i];
#endif
}

// The next `count` numbers, of which a vector takes up to kSpan.
template <DType kType>
static ELLE_INLINE Floats load_next(const void* from, int count) {
  return count >= kSpan ? load<kType>(from) : load_some<kType>(from, count);
}

template <DType kType>
static ELLE_INLINE void store_next(void* to, Floats values, int count) {
  if (count >= kSpan)
    store<kType>(to, values);
  else
    store_some<kType>(to, values, count);
}

// To memory past the cache; `to` is aligned to what is written.
template <DType kType>
static ELLE_INLINE void stream(void* to, Floats numbers) {
#if defined(__SSE2__)
  if (kType == DType::kFloat32) {
#if defined(__AVX512F__)
    _mm512_stream_ps(static_cast<float*>(to), (__m512)numbers);
#elif defined(__AVX2__)
    _mm256_stream_ps(static_cast<float*>(to), (__m256)numbers);
#else
    _mm_stream_ps(static_cast<float*>(to), (__m128)numbers);
#endif
    return;
  }
  Halves halves;
  store<kType>(&halves, numbers);
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)halves);
#elif defined(__AVX2__)
  _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)halves);
#else
  _mm_stream_si64(static_cast<long long*>(to), (long long)halves);
#endif
#else
  store<kType>(to, numbers);
#endif
}

// After it, other threads see what was written past the cache.
static ELLE_INLINE void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// body(i, live) for the vectors of `count` numbers; all lanes are live but in the last.
template <class Body>
static ELLE_INLINE void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kSpan <= count; i += kSpan) body(i, kSpan);
  if (i < count) body(i, static_cast<int>(count - i));
}

template <DType kType>
static void load_row(const void* from, int count, float* to) {
  for_vectors(count, [&](int64_t i, int live) __attribute__((always_inline)) {
    store_next<DType::kFloat32>(to + i, load_next<kType>(at<kType>(from, i), live), live);
  });
}

template <DType kType>
static void store_row(const float* from, int count, void* to) {
  for_vectors(count, [&](int64_t i, int live) __attribute__((always_inline)) {
    store_next<kType>(at<kType>(to, i), load_next<DType::kFloat32>(from + i, live), live);
  });
}

// Calls `body` with a type of memory as a constant.
template <class Body>
static ELLE_INLINE auto with_type(DType type, const Body& body) {
  if (type == DType::kFloat16) return body(Constant<DType::kFloat16>());
  if (type == DType::kBFloat16) return body(Constant<DType::kBFloat16>());
  return body(Constant<DType::kFloat32>());
}

// `count` numbers of a tensor, from element `begin` on.
static inline void load_floats(const void* from, DType type, int64_t begin, int count, float* to) {
  with_type(type, [&](auto kind) { load_row<kind.value>(at<kind.value>(from, begin), count, to); });
}

static inline void store_floats(const float* from, int count, void* to, DType type, int64_t begin) {
  with_type(type, [&](auto kind) { store_row<kind.value>(from, count, at<kind.value>(to, begin)); });
}

}  // namespace elle_fast::ELLE_ISA
