// Philox in vector registers: a block of four words in each 64-bit lane, so that a round is two 32 x 32 -> 64 bit
// products, two shifts and two three-way xors for all lanes. The upper halves of lanes hold what is left of products;
// no multiplication reads them.
#pragma once

#include "../common/philox.h"
#include "vectors.h"

#if !defined(__x86_64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace elle_fast::ELLE_ISA {

// Vectors in flight, as a product takes longer than what follows can wait for: as many as the registers hold; and at
// the end of a row, where more would be wasted.
constexpr int kMany = kVectorBytes == 64 ? 6 : 3, kFew = 1;

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
    Wide p0 = multiply(numbered<Wide>() + static_cast<uint32_t>(block), kMultiplier0);
#pragma GCC unroll 8
    for (int u = 0; u < kCount; ++u) {
      const Wide p1 = multiply(shuffled(p0) ^ all(first2), kMultiplier1);
      counters[u] = {shifted(p1) ^ all(second0), p1, p0 ^ all(second2), all(second3)};
      p0 += uint64_t{kMultiplier0} * kLanes;
    }
    philox<kCount>(keys, 2, kRounds - 1, counters);
  }

  void draw_each(uint64_t block, int count, Counter* counters) const {
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
};

}  // namespace elle_fast::ELLE_ISA
