// Rows of the packed batch: their samples, their targets, and what reaches their losses in the backward.
#pragma once

#include "../common/elle_loss.h"
#include "exponential.h"

namespace elle_fast::ELLE_ISA {

// What the targets are: classes, classes with label smoothing, or probabilities (smoothed or not).
enum class Target { kLabels, kSmoothed, kProbabilities };

// Walks over rows together with the samples that they belong to; a division for each row would take as long as the row.
struct Walk {
  int64_t row, sample, adv_rows, part;

  Walk(int64_t row, const LossPlan& plan)
      : row(row), sample(plan.sample(row)), adv_rows(plan.adv_rows), part(plan.part) {}

  ELLE_INLINE void next() {
    ++sample;
    if (++row == adv_rows || (row > adv_rows && sample == part)) sample = 0;
  }
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

}  // namespace elle_fast::ELLE_ISA
