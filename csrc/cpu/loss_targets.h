// Rows of the packed batch: their samples, their targets, and what reaches their losses in the backward.
#pragma once

#include "../common/elle_loss.h"
#include "exponential.h"

namespace elle_fast {
namespace ELLE_ISA {
namespace {

constexpr float kLowest = -3.4028234663852886e38f;  // a maximum that starts here meets no inf - inf

// What the targets are: classes, classes with label smoothing, or probabilities (smoothed or not).
enum class Target { kLabels, kSmoothed, kProbabilities };

// Walks over rows together with the samples that they belong to; a division for each row would take as long as the row.
struct Walk {
  int64_t row, sample, first, part;

  Walk(int64_t row, const LossPlan& plan)
      : row(row), sample(sample_of(row, plan.first, plan.part)), first(plan.first), part(plan.part) {}

  ELLE_INLINE void next() {
    ++sample;
    if (++row == first || (row > first && sample == part)) sample = 0;
  }
};

// The target of a class, from what is known of it: 1 for the label or 0, or a probability.
struct Smoothing {
  float keep, spread;

  explicit Smoothing(const LossPlan& plan)
      : keep(1.0f - plan.label_smoothing), spread(plan.label_smoothing / static_cast<float>(plan.classes)) {}

  ELLE_INLINE Floats operator()(Floats q) const { return keep * q + spread; }
};

template <Target kTarget>
static ELLE_INLINE Floats of_label(Signed is_label, const Smoothing& smoothing) {
  const Floats q = is_label ? all(1.0f) : Floats{};
  return kTarget == Target::kLabels ? q : smoothing(q);
}

// -1 for what is no class.
static ELLE_INLINE int32_t label_of(const void* target, int64_t sample, const LossPlan& plan) {
  const int64_t label = static_cast<const int64_t*>(target)[sample];
  return label >= 0 && label < plan.classes ? static_cast<int32_t>(label) : -1;
}

static ELLE_INLINE Signed lane_numbers() {
  Signed lanes;
  for (int i = 0; i < kSpan; ++i) lanes[i] = i;
  return lanes;
}

}  // namespace
}  // namespace ELLE_ISA
}  // namespace elle_fast
