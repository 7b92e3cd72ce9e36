// What elle_loss does with one residual, and with lam: the same on the CPU and on the GPU. The formulas:
// elle_fast/ops/elle_loss/reference.py.
#pragma once

#include <cmath>

#include "host_device.h"
#include "plans.h"

namespace elle_fast {

constexpr int kMostPoints = 5;
constexpr float kLowest = -3.4028234663852886e38f;  // a maximum that starts here meets no inf - inf

// The target of a class from what is known of it: 1 for the label or 0, or a probability. T as in pack_points.h.
struct Smoothing {
  float keep, spread;

  explicit ELLE_INLINE Smoothing(const LossPlan& plan)
      : keep(1.0f - plan.label_smoothing), spread(plan.label_smoothing / static_cast<float>(plan.classes)) {}

  template <class T>
  ELLE_INLINE T operator()(T q) const {
    return keep * q + spread;
  }
};

// A residual is a weighted sum over rows, of their losses or of their logits.
struct Residual {
  int64_t rows[kMostPoints];
  float weights[kMostPoints];
};

ELLE_INLINE int points_of(Points points) { return points == Points::kFivePoint ? 5 : 3; }

// x_c, x_a, x_b with weights 1, alpha - 1, -alpha; ELLE-2p takes x_adv as x_b. Or the five points (Definition 3).
// The entries past points_of() are not set.
ELLE_INLINE Residual residual_of(const LossPlan& plan, int64_t triplet, int64_t sample, float alpha) {
  const bool pair = plan.points == Points::kElle2p;  // two blocks of rows a triplet
  const int64_t part = plan.part, row = plan.adv_rows + triplet * (pair ? 2 : points_of(plan.points)) * part + sample;
  if (plan.points == Points::kFivePoint)
    return {{row, row + part, row + 2 * part, row + 3 * part, row + 4 * part},
            {-1.0f / 12.0f, 4.0f / 3.0f, -2.5f, 4.0f / 3.0f, -1.0f / 12.0f}};
  return {{row + (pair ? part : 2 * part), row, pair ? sample : row + part, row, row},
          {1.0f, alpha - 1.0f, -alpha, 0.0f, 0.0f}};
}

struct Penalised {
  float value;
  float slope;  // with respect to |r|
};

// Of |r|: its square, itself, or smooth-L1 with beta = 1. NaN stays NaN.
ELLE_INLINE Penalised penalise(float size, Penalty penalty) {
  if (penalty == Penalty::kSquared) return {size * size, 2.0f * size};
  if (penalty == Penalty::kAbs) return {size, size > 0.0f ? 1.0f : 0.0f * size};
  return size >= 1.0f ? Penalised{size - 0.5f, 1.0f} : Penalised{0.5f * size * size, size};
}

// The penalty of a residual of losses, and its slope with respect to the residual.
ELLE_INLINE Penalised penalise_loss(float residual, Penalty penalty) {
  Penalised penalised = penalise(residual < 0.0f ? -residual : residual, penalty);
  if (residual < 0.0f) penalised.slope = -penalised.slope;
  if (residual == 0.0f) penalised.slope = 0.0f;
  return penalised;
}

// The penalty of ||r||^2, and the s with slope s * r with respect to r.
ELLE_INLINE Penalised penalise_square(float square, Penalty penalty) {
  if (penalty == Penalty::kSquared) return {square, 2.0f};
  const float size = sqrtf(square);
  Penalised penalised = penalise(size, penalty);
  penalised.slope = size == 0.0f ? 0.0f : penalised.slope / size;
  return penalised;
}

// The parts of LossTensors::saved; Number is float, const for the backward.
template <class Number>
struct Saved {
  Number *losses, *maxima, *log_sums, *target_sums, *slopes, *lam;

  ELLE_INLINE Saved(Number* saved, const LossPlan& plan)
      : losses(saved),
        maxima(saved + plan.losses),
        log_sums(saved + 2 * plan.losses),
        target_sums(saved + 3 * plan.losses),
        slopes(saved + 4 * plan.losses),
        lam(slopes + (plan.of_logits ? plan.residuals : plan.losses)) {}
};

// What a residual of losses adds to the sums over all of them: its penalty, and for relative E_lin its square and that
// of L(x_b) - L(x_a), above the rounding of the losses.
struct Triplet {
  float penalty, square, rise;
};

// Relative E_lin, in [0, 1]: the part that is not linear of how a loss changes along a segment.
template <class Sum>
ELLE_INLINE Sum relative_e_lin(Sum squares, Sum rises) {
  return squares / (squares + rises);
}

// One residual of losses. Writes the slopes of E_lin with respect to the losses of its rows, but adds to adv_slope that
// of the sample's row of x_adv, which ELLE-2p's residuals share.
ELLE_INLINE Triplet penalise_triplet(const LossPlan& plan, const LossTensors& tensors, int64_t triplet, int64_t sample,
                                     float& adv_slope) {
  const Saved<float> saved(tensors.saved, plan);
  const Residual residual = residual_of(plan, triplet, sample, tensors.alpha[triplet * plan.part + sample]);
  float r = 0.0f;
  ELLE_EACH(p, kMostPoints) {
    if (p < points_of(plan.points)) r += residual.weights[p] * saved.losses[residual.rows[p]];
  }
  const Penalised penalised = penalise_loss(r, plan.penalty);
  ELLE_EACH(p, kMostPoints) {
    if (p >= points_of(plan.points)) break;
    const float slope = residual.weights[p] * (penalised.slope / static_cast<float>(plan.residuals));
    if (residual.rows[p] < plan.adv_rows) {
      adv_slope += slope;
    } else {
      saved.slopes[residual.rows[p]] = slope;
    }
  }
  const float middle = saved.losses[residual.rows[0]];
  const float rise = saved.losses[residual.rows[2]] - saved.losses[residual.rows[1]];
  return {penalised.value, r * r, rise * rise + 1e-12f * (1.0f + middle * middle)};
}

// The penalty of a residual of logits, whose squared size is replaced by the s with dE_lin / dr = s * r.
ELLE_INLINE float penalise_logits(const LossPlan& plan, float& size) {
  const Penalised penalised = penalise_square(size, plan.penalty);
  size = penalised.slope / static_cast<float>(plan.residuals);
  return penalised.value;
}

// Mean and population standard deviation of the history; both 0 while it is empty.
struct Moments {
  double mean, deviation;
};

ELLE_INLINE Moments moments_of(const LamRule& rule, const LamState& state) {
  const int64_t count = *state.count > 1 ? *state.count : 1;
  if (rule.window == 0) return {*state.mean, sqrt(*state.spread / static_cast<double>(count))};
  const int64_t held = count < rule.window ? count : rule.window;
  double sum = 0.0, squares = 0.0;
  for (int64_t i = 0; i < held; ++i) sum += state.spread[i];
  const double mean = sum / static_cast<double>(held);
  for (int64_t i = 0; i < held; ++i) squares += (state.spread[i] - mean) * (state.spread[i] - mean);
  return {mean, sqrt(squares / static_cast<double>(held))};
}

// Whether this step's E_lin is above its history, which it then joins (paper, Algorithm 1, lines 9 to 11).
ELLE_INLINE bool above_history(double e_lin, const LamRule& rule, const LamState& state) {
  const Moments moments = moments_of(rule, state);
  const int64_t count = *state.count;
  if (rule.window != 0) {
    // Unsigned, so that a damaged count cannot reach outside of the ring.
    state.spread[static_cast<uint64_t>(count) % static_cast<uint64_t>(rule.window)] = e_lin;
  } else {  // Welford
    const double gap = e_lin - moments.mean, step = gap / static_cast<double>(count + 1);
    *state.spread += gap * (gap - step);
    *state.mean += step;
  }
  return e_lin > moments.mean + rule.sensitivity * moments.deviation;
}

// Whether the weighted mean of relative E_lin, with this step's, is above the threshold. The first steps count evenly.
ELLE_INLINE bool above_threshold(double relative, const LamRule& rule, const LamState& state) {
  const double even = 1.0 / static_cast<double>(*state.count + 1);
  *state.mean += (rule.rate > even ? rule.rate : even) * (relative - *state.mean);
  return *state.mean > rule.threshold;
}

// Takes in this step's E_lin, or relative E_lin, and returns the new lam. A value that is not finite changes nothing
// but the count of such values.
ELLE_INLINE float next_lam(double value, const LamRule& rule, const LamState& state) {
  if (!(value - value == 0.0)) {
    ++*state.skipped;
    return *state.lam;
  }
  const bool above = rule.relative() ? above_threshold(value, rule, state) : above_history(value, rule, state);
  *state.lam = above && *state.count >= rule.min_history ? rule.lam_max : rule.gamma * *state.lam;
  ++*state.count;
  return *state.lam;
}

// Writes what the forward returns, and the lam that the backward needs.
ELLE_INLINE void finish_loss(const LossPlan& plan, const LamRule& rule, const LossTensors& tensors,
                             const LamState& state, float ce, float e_lin, double relative) {
  float lam = tensors.lam_value;
  if (tensors.lam != nullptr) lam = *tensors.lam;
  if (state.lam != nullptr) lam = next_lam(rule.relative() ? relative : e_lin, rule, state);
  *tensors.ce = ce;
  *tensors.e_lin = e_lin;
  *tensors.loss = ce + lam * e_lin;
  *Saved<float>(tensors.saved, plan).lam = lam;
}

// What reaches ce and E_lin, each from its own gradient and from that of loss = ce + lam * E_lin.
struct Upstream {
  float to_ce, to_e_lin;
  bool ce, e_lin;  // whether anything does: nothing times NaN is nothing
};

// `lam`: the last of what the forward saved.
ELLE_INLINE Upstream upstream_of(const GradTensors& tensors, float lam) {
  const bool both = tensors.grad_loss != nullptr;
  Upstream upstream{0.0f, 0.0f, both || tensors.grad_ce != nullptr, both || tensors.grad_e_lin != nullptr};
  if (both) {
    upstream.to_ce = *tensors.grad_loss;
    upstream.to_e_lin = *tensors.grad_loss * lam;
  }
  if (tensors.grad_ce != nullptr) upstream.to_ce += *tensors.grad_ce;
  if (tensors.grad_e_lin != nullptr) upstream.to_e_lin += *tensors.grad_e_lin;
  return upstream;
}

// d loss / d L(row): from ce, the mean over the rows of x_adv, and from E_lin.
ELLE_INLINE float factor_of(const LossPlan& plan, const Upstream& upstream, const float* slopes, int64_t row) {
  const float from_e_lin = upstream.e_lin ? upstream.to_e_lin * slopes[row] : 0.0f;
  return row < plan.adv_rows ? from_e_lin + upstream.to_ce / static_cast<float>(plan.adv_rows) : from_e_lin;
}

}  // namespace elle_fast
