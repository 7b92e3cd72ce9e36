// Noise from the words of vector_philox.h: for the corners of triplets, the attack's start, and samples as a whole.
#pragma once

#include "vector_philox.h"

namespace elle_fast::ELLE_ISA {

static ELLE_INLINE Wide in_turn(uint64_t even, uint64_t odd) {
  Wide lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i % 2 == 0 ? even : odd;
  return lanes;
}

// The lower halves of two vectors' lanes, next to each other, as words whose upper 24 bits count: with AVX-512 the
// others become 0, which a shuffle of bytes does beside.
static ELLE_INLINE Narrow joined(Wide low, Wide high) {
#if defined(__AVX512F__)
  const Wide bytes = in_turn(0x03020180'00000080, 0x0B0A0980'00000080);
  return (Narrow)_mm512_mask_shuffle_epi8((__m512i)low, 0xF1F1F1F1F1F1F1F1, (__m512i)high, (__m512i)bytes);
#elif defined(__AVX2__)
  return (Narrow)_mm256_blend_epi32((__m256i)low, _mm256_slli_epi64((__m256i)high, 32), 0xAA);
#else
  return (Narrow)((low & 0xFFFFFFFFu) | (high << 32));
#endif
}

// The same of the upper halves.
static ELLE_INLINE Narrow joined_high(Wide low, Wide high) {
#if defined(__AVX512F__)
  const Wide bytes = in_turn(0x00000080'07060580, 0x00000080'0F0E0D80);
  return (Narrow)_mm512_mask_shuffle_epi8((__m512i)high, 0x1F1F1F1F1F1F1F1F, (__m512i)low, (__m512i)bytes);
#elif defined(__AVX2__)
  return (Narrow)_mm256_blend_epi32(_mm256_srli_epi64((__m256i)low, 32), (__m256i)high, 0xAA);
#else
  return (Narrow)((low >> 32) | (high & 0xFFFFFFFF00000000u));
#endif
}

// The last round, its words next to each other as they are used: w0 w2, and w1 w3.
static ELLE_INLINE void finish_pair(const Row& row, const Counter& c, Narrow& even, Narrow& odd) {
  const Wide p0 = multiply(c.c0, kMultiplier0), p1 = multiply(c.c2, kMultiplier1);
  even = (Narrow)xor3((Wide)joined_high(p1, p0), (Wide)joined(c.c1, c.c3), all(row.last));
  odd = joined(p1, p0);
}

// The upper 24 bits of words as numbers: times 2^8 with AVX-512, where the other bits are 0.
#if defined(__AVX512F__)
constexpr float kUnit = 0x1p-31f;  // of which 2 u is a multiple
#else
constexpr float kUnit = 0x1p-23f;
#endif

static ELLE_INLINE Floats numbers_of(Narrow words) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_cvtepu32_ps(0xFFFF, (__m512i)words);
#else
  return __builtin_convertvector(as<Signed>(words >> 8), Floats);
#endif
}

// 2 u - 1, in [-1, 1), exact.
static ELLE_INLINE Floats symmetric(Narrow words) { return numbers_of(words) * kUnit - 1.0f; }

// Whether radius * kUnit is exact, and a radius times what is not 0 neither 0 nor infinite.
static ELLE_INLINE bool scalable(float radius) { return radius >= 0x1p-90f && radius <= __FLT_MAX__; }

struct Radius {
  Floats whole, minus, unit;

  explicit Radius(float radius) : whole(Floats{} + radius), minus(Floats{} - radius), unit(Floats{} + radius * kUnit) {}
};

// radius * (2 u - 1), rounded once. If the radius is scalable, in fewer operations.
template <bool kScalable>
static ELLE_INLINE Floats spread(Narrow words, const Radius& radius) {
  if (!kScalable) return radius.whole * symmetric(words);
#if defined(__FMA__)
  return multiply_add(numbers_of(words), radius.unit, radius.minus);
#else
  return __builtin_convertvector(as<Signed>(words >> 8) - (1 << 23), Floats) * radius.unit;
#endif
}

// 64-bit lanes of two vectors in turn: blocks from their halves.
static ELLE_INLINE void in_turn(Narrow even, Narrow odd, Narrow& low, Narrow& high) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0),
                second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  low = (Narrow)_mm512_permutex2var_epi64((__m512i)even, first, (__m512i)odd);
  high = (Narrow)_mm512_permutex2var_epi64((__m512i)even, second, (__m512i)odd);
#elif defined(__AVX2__)
  const __m256i first = _mm256_unpacklo_epi64((__m256i)even, (__m256i)odd);
  const __m256i second = _mm256_unpackhi_epi64((__m256i)even, (__m256i)odd);
  low = (Narrow)_mm256_permute2x128_si256(first, second, 0x20);
  high = (Narrow)_mm256_permute2x128_si256(first, second, 0x31);
#else
  const Wide a = as<Wide>(even), b = as<Wide>(odd);
  low = as<Narrow>(Wide{a[0], b[0]});
  high = as<Narrow>(Wide{a[1], b[1]});
#endif
}

// Elements that a block serves: with two words each, or one.
template <int kCount>
constexpr int kGroup = 4 / kCount;

// Calls body(whole, i, row, counter) for vectors of blocks until `count` elements from `begin` on are covered; i is
// where the first of a vector lies, and whole.value is true if it is known that the last one is among them.
template <int kElements, class Body>  // of a block, whose words are finished where there are 4
static ELLE_INLINE void over_blocks(const Keys& keys, uint32_t sample, uint32_t place, int64_t begin, int count,
                                    const Body& body) {
  constexpr int kEach = kElements * kLanes;
  const Row row(keys, sample, place, static_cast<uint64_t>(begin) / kElements, count);
  const auto group = [&](auto vectors, int done) __attribute__((always_inline)) {
    Counters<vectors.value> c;
    row.draw<vectors.value>(static_cast<uint64_t>(begin + done) / kElements, c);
    if (kElements == 4) philox<vectors.value>(keys, kRounds - 1, kRounds, c);
#pragma GCC unroll 8
    for (int u = 0; u < vectors.value; ++u) body(Constant<(vectors.value == kMany)>(), done + u * kEach, row, c[u]);
  };
  int done = 0;
  for (; !row.crossing && done + kMany * kEach <= count; done += kMany * kEach) group(Constant<kMany>(), done);
  for (; done < count; done += kFew * kEach) group(Constant<kFew>(), done);
}

// Words at `count` elements from `begin` on: of the corners x_a and x_b (kCount = 2; `begin` is even), or of the
// attack's start (kCount = 1; a multiple of 4). each(whole, i, words) for the vectors at i = 0, kSpan, ...; whole.value
// is true if it is known that i + kSpan <= count.
template <int kCount, class Each>
static ELLE_INLINE void draw(const Keys& keys, uint32_t sample, int64_t triplet, int64_t begin, int count,
                             const Each& each) {
  const uint32_t place = kCount == 2 ? kPair + 256 * static_cast<uint32_t>(triplet) : kStart;
  const auto body = [&](auto whole, int i, const Row& row, const Counter& c) __attribute__((always_inline)) {
    if constexpr (kCount == 2) {
      Narrow words[2];
      finish_pair(row, c, words[0], words[1]);
      each(whole, i, words);
    } else {
      Narrow low[1], high[1];
      in_turn(joined(c.c0, c.c1), joined(c.c2, c.c3), low[0], high[0]);
      each(whole, i, low);
      if (i + kSpan < count) each(whole, i + kSpan, high);
    }
  };
  over_blocks<kGroup<kCount>>(keys, sample, place, begin, count, body);
}

// The words that belong to samples as a whole, of `count` of them: each(i, words).
template <class Each>
static ELLE_INLINE void draw_samples(const Keys& keys, int64_t sample, int64_t triplet, int64_t count,
                                     const Each& each) {
  for (int64_t done = 0; done < count; done += kLanes * kMany) {
    Counters<kMany> c;
    for (int u = 0; u < kMany; ++u) {
      const Wide samples = numbered<Wide>() + static_cast<uint64_t>(sample + done + u * kLanes);
      c[u] = {Wide{}, Wide{}, samples, all(kSample + 256 * static_cast<uint64_t>(triplet))};
    }
    philox<kMany>(keys, 0, kRounds, c);
    for (int k = 0; k < kLanes * kMany && done + k < count; ++k) {
      const Counter& words = c[k / kLanes];
      const int lane = k % kLanes;
      each(done + k, Words{static_cast<uint32_t>(words.c0[lane]), static_cast<uint32_t>(words.c1[lane]),
                           static_cast<uint32_t>(words.c2[lane]), static_cast<uint32_t>(words.c3[lane])});
    }
  }
}

}  // namespace elle_fast::ELLE_ISA
