// Philox in vector registers: a block of four words in each 64-bit lane, so that a round is two 32 x 32 -> 64 bit
// products, two shifts and two three-way xors for all lanes. The upper halves of lanes hold what is left of products;
// no multiplication reads them.
#pragma once

#include "../common/philox.h"
#include "convert.h"

#if !defined(__x86_64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace elle_fast {
namespace ELLE_ISA {

constexpr int kLanes = kVectorBytes / 8;  // blocks in a vector
// Vectors in flight, as a product takes longer than what follows can wait for: as many as the registers hold; and at
// the end of a row, where more would be wasted.
constexpr int kMany = kVectorBytes == 64 ? 6 : 3, kFew = 1;

typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));

// The lower halves of the lanes times a 32-bit number.
static ELLE_INLINE Wide multiply(Wide lanes, uint32_t number) {
#if defined(__AVX512F__)
  return (Wide)_mm512_maskz_mul_epu32(0xFF, (__m512i)lanes, _mm512_set1_epi64(number));  // GCC 12 warns without a mask
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)lanes, _mm256_set1_epi64x(number));
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)lanes, _mm_set1_epi64x(number));
#elif defined(__ARM_NEON)
  return (Wide)vmull_n_u32(vmovn_u64((uint64x2_t)lanes), number);
#else
  return (lanes & 0xFFFFFFFFu) * number;
#endif
}

static ELLE_INLINE Wide xor3(Wide a, Wide b, Wide c) {
#if defined(__AVX512F__)
  return (Wide)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The upper halves in place of the lower ones. AVX-512 shifts on one port alone, and shuffles on another.
static ELLE_INLINE Wide shifted(Wide lanes) { return lanes >> 32; }

static ELLE_INLINE Wide shuffled(Wide lanes) {
#if defined(__AVX512F__)
  return (Wide)_mm512_maskz_shuffle_epi32(0xFFFF, (__m512i)lanes, _MM_PERM_DDBB);
#else
  return lanes >> 32;
#endif
}

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

// Likewise the upper halves.
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

template <class Vector>
static ELLE_INLINE void put(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
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

static ELLE_INLINE Wide all(uint64_t number) { return Wide{} + number; }

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

struct Counter {
  Wide c0, c1, c2, c3;
};

template <int kCount>
using Counters = Counter[kCount];

struct Keys {
  uint64_t k[2 * kRounds];

  explicit Keys(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
      k[2 * round] = k0;
      k[2 * round + 1] = k1;
    }
  }

  uint64_t seed() const { return k[0] | k[1] << 32; }
};

template <int kCount>
static ELLE_INLINE void philox(const Keys& keys, int begin, int end, Counters<kCount>& counters) {
#pragma GCC unroll 10
  for (int round = begin; round < end; ++round) {
    const Wide k0 = all(keys.k[2 * round]), k1 = all(keys.k[2 * round + 1]);
#pragma GCC unroll 8
    for (Counter& c : counters) {
      const Wide p0 = multiply(c.c0, kMultiplier0), p1 = multiply(c.c2, kMultiplier1);
      c = {xor3(shifted(p1), c.c1, k0), p1, xor3(shuffled(p0), c.c3, k1), p0};
    }
  }
}

static ELLE_INLINE Wide lane_numbers() {
  Wide lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Some blocks of a stream of a sample, and what three words of the counter that are the same make of the first two
// rounds: all but the number's lower half, unless the upper one changes among the blocks.
struct Row {
  const Keys& keys;
  uint64_t sample, place;
  bool crossing;  // a multiple of 2^32
  uint64_t first2, second0, second2, second3;
  uint64_t last;  // round's keys, of the words' upper 24 bits

  Row(const Keys& call_keys, uint32_t row_sample, uint32_t row_place, uint64_t begin, uint64_t blocks)
      : keys(call_keys), sample(row_sample), place(row_place) {
    const uint64_t* k = keys.k;
    const uint64_t end = begin + blocks + kLanes * kMany;  // or a little before
    crossing = begin >> 32 != end >> 32;
    const uint64_t p1 = sample * kMultiplier1, c0 = static_cast<uint32_t>(p1 >> 32) ^ (begin >> 32) ^ k[0];
    const uint64_t p0 = c0 * kMultiplier0;
    first2 = place ^ k[1];
    second0 = static_cast<uint32_t>(p1) ^ k[2];
    second2 = (p0 >> 32) ^ k[3];
    second3 = p0;
    last = (k[2 * kRounds - 2] | k[2 * kRounds - 1] << 32) & 0xFFFFFF00'FFFFFF00;
  }

  // All but the last round. Only kFew vectors of blocks may cross: the check would cost the many vectors registers.
  template <int kCount>
  ELLE_INLINE void draw(uint64_t block, Counters<kCount>& counters) const {
    if (kCount == kFew && crossing) return draw_each(block, kCount, counters);
    Wide p0 = multiply(lane_numbers() + static_cast<uint32_t>(block), kMultiplier0);
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      const Wide p1 = multiply(shuffled(p0) ^ all(first2), kMultiplier1);
      counters[u] = {shifted(p1) ^ all(second0), p1, p0 ^ all(second2), all(second3)};
      p0 += uint64_t{kMultiplier0} * kLanes;
    }
    philox<kCount>(keys, 2, kRounds - 1, counters);
  }

  void draw_each(uint64_t block, int count, Counter* counters) const;
};

inline void Row::draw_each(uint64_t block, int count, Counter* counters) const {
  for (int u = 0; u < count; ++u, block += kLanes) {
    Counter c = {};
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t number = block + i;
      const Words words = philox4x32({static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32),
                                      static_cast<uint32_t>(sample), static_cast<uint32_t>(place)},
                                     keys.seed(), kRounds - 1);
      c.c0[i] = words.w0;
      c.c1[i] = words.w1;
      c.c2[i] = words.w2;
      c.c3[i] = words.w3;
    }
    counters[u] = c;
  }
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

// a * b - c, rounded once.
#if defined(__AVX512F__)
static ELLE_INLINE Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__FMA__)
static ELLE_INLINE Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c);
}
#endif

// 2 u - 1, in [-1, 1), exact.
static ELLE_INLINE Floats symmetric(Narrow words) { return numbers_of(words) * kUnit - 1.0f; }

// Whether radius * kUnit is exact, and a radius times what is not 0 neither 0 nor infinite.
static ELLE_INLINE bool scalable(float radius) { return radius >= 0x1p-90f && radius <= __FLT_MAX__; }

struct Radius {
  Floats whole, unit;

  explicit Radius(float radius) : whole(Floats{} + radius), unit(Floats{} + radius * kUnit) {}
};

// radius * (2 u - 1), rounded once. If the radius is scalable, in fewer operations.
template <bool kScalable>
static ELLE_INLINE Floats spread(Narrow words, const Radius& radius) {
  if (!kScalable) return radius.whole * symmetric(words);
#if defined(__FMA__)
  return fused(numbers_of(words), radius.unit, radius.whole);
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

// Calls group(how many vectors, place) until `count` elements of a row are covered, where a vector is worth `each`
// elements; the elements of a group of kMany are all among them.
template <class Group>
static ELLE_INLINE void over_groups(const Row& row, int count, int each, const Group& group) {
  int done = 0;
  for (; !row.crossing && done + kMany * each <= count; done += kMany * each) group(Number<kMany>(), done);
  for (; done < count; done += kFew * each) group(Number<kFew>(), done);
}

// Words of x_a and x_b at `count` elements from `begin`, an even one, on: each(whole, i, a, b) for the vectors at i =
// 0, kSpan, ...; whole.value is not 0 if it is known that i + kSpan <= count.
template <class Each>
static ELLE_INLINE void draw_pairs(const Keys& keys, uint32_t sample, int64_t triplet, int64_t begin, int count,
                                   const Each& each) {
  const Row row(keys, sample, kPair + 256 * static_cast<uint32_t>(triplet), static_cast<uint64_t>(begin) / 2, count);
  const auto group = [&](auto vectors, int done) __attribute__((always_inline)) {
    Counters<vectors.value> c;
    row.draw<vectors.value>(static_cast<uint64_t>(begin + done) / 2, c);
#pragma GCC unroll 8
    for (int u = 0; u < vectors.value; ++u) {
      Narrow a, b;
      finish_pair(row, c[u], a, b);
      each(Number<vectors.value == kMany>(), done + u * kSpan, a, b);
    }
  };
  over_groups(row, count, kSpan, group);
}

// Words of the attack's start at `count` elements from `begin`, a multiple of 4, on: each(whole, i, words).
template <class Each>
static ELLE_INLINE void draw_start(const Keys& keys, uint32_t sample, int64_t begin, int count, const Each& each) {
  const Row row(keys, sample, kStart, static_cast<uint64_t>(begin) / 4, count);
  const auto group = [&](auto vectors, int done) __attribute__((always_inline)) {
    Counters<vectors.value> c;
    row.draw<vectors.value>(static_cast<uint64_t>(begin + done) / 4, c);
    philox<vectors.value>(keys, kRounds - 1, kRounds, c);
#pragma GCC unroll 8
    for (int u = 0; u < vectors.value; ++u) {
      const int i = done + 2 * u * kSpan;
      Narrow low, high;
      in_turn(joined(c[u].c0, c[u].c1), joined(c[u].c2, c[u].c3), low, high);
      each(Number<vectors.value == kMany>(), i, low);
      if (i + kSpan < count) each(Number<vectors.value == kMany>(), i + kSpan, high);
    }
  };
  over_groups(row, count, 2 * kSpan, group);
}

// The words that belong to samples as a whole, of `count` of them: each(i, words).
template <class Each>
static ELLE_INLINE void draw_samples(const Keys& keys, int64_t sample, int64_t triplet, int64_t count,
                                     const Each& each) {
  for (int64_t done = 0; done < count; done += kLanes * kMany) {
    Counters<kMany> c;
    for (int u = 0; u < kMany; ++u) {
      const Wide samples = lane_numbers() + static_cast<uint64_t>(sample + done + u * kLanes);
      c[u] = {all(0), all(0), samples, all(kSample + 256 * static_cast<uint32_t>(triplet))};
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

}  // namespace ELLE_ISA
}  // namespace elle_fast
