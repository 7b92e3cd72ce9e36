// pack_points and random_start on the CPU: one pass over x and the gradient, one write of each point.
//
// Work goes by tiles of some places of some channels of one sample, small enough that what belongs to one stays in the
// first-level cache: draw the noise, make the points, normalise, convert, store. In fp32 8 + 16 bytes an element of x
// pass through memory; large results are stored past the cache, which would otherwise read each line before it is
// overwritten. Bound by memory for results that do not fit the cache, else by the products of Philox (20 for two
// elements of x_a and of x_b).
#include "kernels.h"
#include "pack_ball.h"
#include "pack_cube.h"
#include "tiles.h"

namespace elle_fast {
namespace ELLE_ISA {
namespace {

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
      draw_samples(call.keys, plan.sample_offset, triplet, plan.part,
                   [&](int64_t i, const Words& words) { alpha[triplet * plan.part + i] = uniform(words.w0); });
  }
}

}  // namespace

bool pack_points(const PackPlan& plan, const PackTensors& tensors, int threads) {
  const Call call(plan, tensors);
  make_alpha(call);
  if (plan.norm == Norm::kL2) return over_samples(call, threads, plan.clamp ? ball_sample<true> : ball_sample<false>);
  over_tiles(call, threads, plan.clamp ? tile_for<true>(call) : tile_for<false>(call));
  return true;
}

bool random_start(const PackPlan& plan, const PackTensors& tensors, int threads) {
  const Call call(plan, tensors, true);
  if (plan.norm == Norm::kL2) return over_samples(call, threads, plan.clamp ? ball_start<true> : ball_start<false>);
  over_tiles(call, threads, plan.clamp ? start_for<true>(call) : start_for<false>(call));
  return true;
}

}  // namespace ELLE_ISA
}  // namespace elle_fast
