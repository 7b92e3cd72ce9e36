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

// The lower halves of two vectors' lanes, next to each other.
static ELLE_INLINE Narrow joined(Wide low, Wide high) {
#if defined(__AVX512F__)
  return (Narrow)_mm512_mask_shuffle_epi32((__m512i)low, 0xAAAA, (__m512i)high, _MM_PERM_CDAB);
#elif defined(__AVX2__)
  return (Narrow)_mm256_blend_epi32((__m256i)low, _mm256_slli_epi64((__m256i)high, 32), 0xAA);
#else
  return (Narrow)((low & 0xFFFFFFFFu) | (high << 32));
#endif
}

// The upper halves.
static ELLE_INLINE Narrow joined_high(Wide low, Wide high) {
#if defined(__AVX512F__)
  return (Narrow)_mm512_mask_shuffle_epi32((__m512i)high, 0x5555, (__m512i)low, _MM_PERM_CDAB);
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

// A stream of a sample, at blocks that share the upper half of their number: what three words of the counter that are
// the same make of the first two rounds.
struct Row {
  const Keys& keys;
  uint64_t sample, place;

  struct Shared {
    Wide first2, second0, second2, second3;
  };

  Shared shared(uint64_t block) const {
    const uint64_t* k = keys.k;
    const uint64_t p1 = sample * kMultiplier1, c0 = static_cast<uint32_t>(p1 >> 32) ^ (block >> 32) ^ k[0];
    const uint64_t p0 = c0 * kMultiplier0;
    return {all(place ^ k[1]), all(static_cast<uint32_t>(p1) ^ k[2]), all((p0 >> 32) ^ k[3]), all(p0)};
  }

  // All but the last round.
  template <int kCount>
  ELLE_INLINE void draw(uint64_t block, Counters<kCount>& counters) const {
    const Shared same = shared(block);
    const Wide first = multiply(lane_numbers() + static_cast<uint32_t>(block), kMultiplier0);
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      const Wide p0 = first + uint64_t{kMultiplier0} * (u * kLanes);
      const Wide p1 = multiply(shuffled(p0) ^ same.first2, kMultiplier1);
      counters[u] = {shifted(p1) ^ same.second0, p1, p0 ^ same.second2, same.second3};
    }
    philox<kCount>(keys, 2, kRounds - 1, counters);
    // Where the lower half begins anew the upper one changes: once in 2^32 blocks.
    if (static_cast<uint32_t>(block) > UINT32_MAX - kLanes * kCount) draw_each(block, kCount, counters);
  }

  void draw_each(uint64_t block, int count, Counter* counters) const;
};

inline void Row::draw_each(uint64_t block, int count, Counter* counters) const {
  for (int i = 0; i < kLanes * count; ++i) {
    const Words words = philox4x32({static_cast<uint32_t>(block + i), static_cast<uint32_t>((block + i) >> 32),
                                    static_cast<uint32_t>(sample), static_cast<uint32_t>(place)},
                                   keys.seed(), kRounds - 1);
    Counter& c = counters[i / kLanes];
    c.c0[i % kLanes] = words.w0;
    c.c1[i % kLanes] = words.w1;
    c.c2[i % kLanes] = words.w2;
    c.c3[i % kLanes] = words.w3;
  }
}

// The last round, its words next to each other as they are used: w0 w2, and w1 w3.
static ELLE_INLINE void finish_pair(const Keys& keys, const Counter& c, Narrow& even, Narrow& odd) {
  const Wide p0 = multiply(c.c0, kMultiplier0), p1 = multiply(c.c2, kMultiplier1);
  const Wide k = all(keys.k[2 * kRounds - 2] | keys.k[2 * kRounds - 1] << 32);
  even = (Narrow)xor3((Wide)joined_high(p1, p0), (Wide)joined(c.c1, c.c3), k);
  odd = joined(p1, p0);
}

// 2 u - 1 of 24 bits of each word, in [-1, 1), exact: with a fused multiply-add as with two operations.
static ELLE_INLINE Floats symmetric(Narrow words) {
#if defined(__AVX512F__)
  const __m512 numbers = _mm512_maskz_cvtepu32_ps(0xFFFF, (__m512i)(words & 0xFFFFFF00u));
  return (Floats)_mm512_fmadd_ps(numbers, _mm512_set1_ps(0x1p-31f), _mm512_set1_ps(-1.0f));
#elif defined(__FMA__)
  const __m256 numbers = _mm256_cvtepi32_ps((__m256i)(words >> 8));
  return (Floats)_mm256_fmadd_ps(numbers, _mm256_set1_ps(0x1p-23f), _mm256_set1_ps(-1.0f));
#else
  return __builtin_convertvector(as<Signed>(words >> 8), Floats) * 0x1p-23f - 1.0f;
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

// Calls group(how many vectors, place) until `count` elements are covered, where a vector is worth `each` elements; the
// elements of a group of kMany are all among them.
template <class Group>
static ELLE_INLINE void over_groups(int count, int each, const Group& group) {
  int done = 0;
  for (; done + kMany * each <= count; done += kMany * each) group(Number<kMany>(), done);
  for (; done < count; done += kFew * each) group(Number<kFew>(), done);
}

// Words of x_a and x_b at `count` elements from `begin`, an even one, on: each(whole, i, a, b) for the vectors at i =
// 0, kSpan, ...; whole.value is not 0 if it is known that i + kSpan <= count.
template <class Each>
static ELLE_INLINE void draw_pairs(const Keys& keys, uint32_t sample, int64_t triplet, int64_t begin, int count,
                                   const Each& each) {
  const Row row{keys, sample, kPair + 256 * static_cast<uint32_t>(triplet)};
  const auto group = [&](auto vectors, int done) __attribute__((always_inline)) {
    Counters<vectors.value> c;
    row.draw<vectors.value>(static_cast<uint64_t>(begin + done) / 2, c);
#pragma GCC unroll 8
    for (int u = 0; u < vectors.value; ++u) {
      Narrow a, b;
      finish_pair(keys, c[u], a, b);
      each(Number<vectors.value == kMany>(), done + u * kSpan, a, b);
    }
  };
  over_groups(count, kSpan, group);
}

// Words of the attack's start at `count` elements from `begin`, a multiple of 4, on: each(whole, i, words).
template <class Each>
static ELLE_INLINE void draw_start(const Keys& keys, uint32_t sample, int64_t begin, int count, const Each& each) {
  const Row row{keys, sample, kStart};
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
  over_groups(count, 2 * kSpan, group);
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
