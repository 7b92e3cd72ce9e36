// The vectors' draws against the scalar generator where the number of a block crosses 2^32, in samples of more elements
// than memory holds. Compiled and run by test_sizes.py, with the flags of one instruction set.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/noise.h"

using namespace elle_fast;
using namespace elle_fast::ELLE_ISA;

static long compared = 0;

static void expect(uint32_t found, uint32_t wanted, const char* what, uint64_t element) {
  ++compared;
  if (found == wanted) return;
  std::printf("%s at element %llu: %08x, not %08x\n", what, static_cast<unsigned long long>(element), found, wanted);
  std::exit(1);
}

// The vectors' words have the upper 24 bits of the generator's; the others may be anything.
static uint32_t upper(uint32_t word) { return word >> 8; }

static uint32_t word(const Words& words, int place) {
  return place == 0 ? words.w0 : place == 1 ? words.w1 : place == 2 ? words.w2 : words.w3;
}

static void check_pairs(uint64_t seed, uint32_t sample, int64_t triplet, int64_t begin, int count) {
  draw<2>(Keys(seed), sample, triplet, begin, count, [&](auto whole, int i, const Narrow(&found)[2]) {
    if (whole.value && i + kSpan > count) std::exit(3);  // would be stored past the end
    for (int lane = 0; lane < kSpan; ++lane) {
      const uint64_t element = begin + i + lane;
      const Words words = block_words(seed, element / 2, sample, kPair, static_cast<uint32_t>(triplet));
      const int place = 2 * static_cast<int>(element % 2);
      expect(upper(found[0][lane]), upper(word(words, place)), "x_a", element);
      expect(upper(found[1][lane]), upper(word(words, place + 1)), "x_b", element);
    }
  });
}

static void check_start(uint64_t seed, uint32_t sample, int64_t begin, int count) {
  draw<1>(Keys(seed), sample, 0, begin, count, [&](auto whole, int i, const Narrow(&found)[1]) {
    if (whole.value && i + kSpan > count) std::exit(3);
    for (int lane = 0; lane < kSpan; ++lane) {
      const uint64_t element = begin + i + lane;
      const Words words = block_words(seed, element / 4, sample, kStart, 0);
      expect(upper(found[0][lane]), upper(word(words, static_cast<int>(element % 4))), "start", element);
    }
  });
}

static void check_samples(uint64_t seed, int64_t sample, int64_t triplet, int count) {
  int next = 0;
  draw_samples(Keys(seed), sample, triplet, count, [&](int64_t i, const Words& found) {
    const Words words =
        block_words(seed, 0, static_cast<uint32_t>(sample + i), kSample, static_cast<uint32_t>(triplet));
    for (int place = 0; place < 4; ++place) expect(word(found, place), word(words, place), "sample", sample + i);
    if (i != next++) std::exit(2);
  });
  if (next != count) std::exit(2);
}

int main() {
  const std::vector<uint64_t> seeds = {0, 0x123456789ABCDEFu, ~uint64_t{0}};
  const std::vector<uint32_t> samples = {0, 7, 0xFFFFFFFFu};
  const std::vector<int> counts = {1, kSpan, 3 * kSpan + 1, kMany * kSpan, 2 * kMany * kSpan + 5};
  const int reach = 4 * kMany * kSpan;
  for (const uint64_t seed : seeds)
    for (const uint32_t sample : samples)
      for (const int count : counts)
        for (const uint64_t crossing : {uint64_t{1} << 32, uint64_t{3} << 32})
          for (int64_t back = -reach; back <= 8; back += 4) {
            const int64_t triplet = back % 3 == 0 ? (1 << 24) - 1 : 1;
            check_pairs(seed, sample, triplet, static_cast<int64_t>(2 * crossing) + back / 2, count);
            check_start(seed, sample, static_cast<int64_t>(4 * crossing) + back, count);
          }
  for (const uint64_t seed : seeds)
    for (const int count : {1, kLanes, kLanes * kMany + 1, 200})
      for (const int64_t triplet : {0, 1, (1 << 24) - 1})
        for (const int64_t sample : {int64_t{0}, (int64_t{1} << 31) - 3, (int64_t{1} << 32) - count})
          check_samples(seed, sample, triplet, count);
  std::printf("%ld\n", compared);
}
