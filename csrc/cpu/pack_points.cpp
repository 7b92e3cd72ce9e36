// pack_points on the CPU: one pass over x and the gradient, one write of each point.
//
// Work goes by tiles of some places of some channels of one sample, small enough that what belongs to one stays in the
// first-level cache: draw the noise, make the points, normalize, convert, store. In fp32 8 + 16 bytes an element of x
// pass through memory; large results are stored past the cache, which would otherwise read each line before it is
// overwritten. Bound by memory for results that do not fit the cache, else by the products of Philox (20 for two
// elements of x_a and of x_b).
#include "../common/kernels.h"
#include "pack_ball.h"
#include "pack_cube.h"
#include "tiles.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace elle_fast::ELLE_ISA {

// Large pages for large results: a fresh one costs a page fault for every 4 KB otherwise, many times what is written.
// Memory that is there already stays as it is.
static void want_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = int64_t{1} << 21;
  // What is smaller may lie in the heap, beside other things.
  if (bytes < int64_t{1} << 25) return;
  const int64_t from = reinterpret_cast<intptr_t>(memory), begin = (from + kLarge - 1) / kLarge * kLarge;
  const int64_t end = (from + bytes) / kLarge * kLarge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

// alpha of all residuals.
static void make_alpha(const Call& call) {
  const PackPlan& plan = call.plan;
  float* alpha = call.tensors.alpha;
  const int64_t residuals = plan.triplets * plan.part;
  if (residuals == 0) return;
  if (plan.alpha == Alpha::kGiven) {
    std::memcpy(alpha, call.tensors.alpha_in, sizeof(float) * residuals);
  } else if (plan.alpha == Alpha::kHalf) {
    for (int64_t i = 0; i < residuals; ++i) alpha[i] = 0.5f;
  } else {
    for (int64_t triplet = 0; triplet < plan.triplets; ++triplet)
      draw_samples(call.keys, plan.sample(0), triplet, plan.part,
                   [&](int64_t i, const Words& words) { alpha[triplet * plan.part + i] = uniform(words.w0); });
  }
}

int pack_points(const PackPlan& plan, const PackTensors& tensors, Where where) {
  const Call call(plan, tensors);
  const int threads = static_cast<int>(where);
  want_large_pages(tensors.points, call.bytes);
  make_alpha(call);
  if (plan.norm == Norm::kL2) return over_samples(call, threads, plan.clamp ? ball_sample<true> : ball_sample<false>);
  return over_tiles(call, threads, plan.clamp ? tile_for<true>(call) : tile_for<false>(call));
}

}  // namespace elle_fast::ELLE_ISA
