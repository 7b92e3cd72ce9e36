// Philox4x32-10, and how elle_fast numbers its random draws: elle_fast/ops/philox.py has the table.
// Source of the generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "host_device.h"

namespace elle_fast {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;

enum Stream : uint32_t { kPair = 0, kSample = 1, kStart = 2 };

struct Words {
  uint32_t w0, w1, w2, w3;
};

// Rounds of Philox4x32 on the counter `c`, whose key is the 64-bit seed.
ELLE_INLINE Words philox4x32(Words c, uint64_t seed, int rounds) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < rounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c.w0) * kMultiplier0;
    const uint64_t p1 = static_cast<uint64_t>(c.w2) * kMultiplier1;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return c;
}

// The four words of a block of one stream.
ELLE_INLINE Words block_words(uint64_t seed, uint64_t block, uint32_t sample, uint32_t stream, uint32_t triplet) {
  return philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), sample, stream + 256 * triplet},
                    seed, kRounds);
}

// u = (word >> 8) * 2^-24, in [0, 1), exact.
ELLE_INLINE float uniform(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f; }

// 2 u - 1, in [-1, 1), exact.
ELLE_INLINE float symmetric(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-23f - 1.0f;
}

}  // namespace elle_fast
