// Losses and gradients of rows of many classes, a row's classes in the lanes; and the linearity of logits, for any
// number of classes.
#pragma once

#include "loss_targets.h"

namespace elle_fast::ELLE_ISA {

// A sum in two levels: over 100,000 classes one chain of additions would lose two digits.
struct Sum {
  Floats total{}, recent{};
  int count = 0;

  ELLE_INLINE void add(Floats numbers) {
    recent += numbers;
    if (++count < 64) return;
    total += recent;
    recent = Floats{};
    count = 0;
  }

  ELLE_INLINE float value() const { return sum_of(total + recent); }
};

template <DType kType>
static ELLE_INLINE Floats read(const void* row, int64_t column, int live) {
  return load_next<kType>(at<kType>(row, column), live);
}

template <DType kType>
static ELLE_INLINE void write(void* row, int64_t column, Floats numbers, int live) {
  store_next<kType>(at<kType>(row, column), numbers, live);
}

static ELLE_INLINE Floats in_live(Floats numbers, int live, float other) {
  return live == kSpan ? numbers : numbered<Signed>() < live ? numbers : all(other);
}

template <Target kTarget>
struct RowTarget {
  const Smoothing smoothing;
  int32_t label = 0;
  const float* probabilities = nullptr;

  RowTarget(const LossPlan& plan, const void* target, int64_t sample) : smoothing(plan) {
    if (kTarget == Target::kProbabilities) {
      probabilities = static_cast<const float*>(target) + sample * plan.target_stride;
    } else {
      label = label_of(target, sample, plan);
    }
  }

  ELLE_INLINE Floats at(int64_t column, int live) const {
    return kTarget == Target::kProbabilities
               ? smoothing(read<DType::kFloat32>(probabilities, column, live))
               : of_label<kTarget>(numbered<Signed>() == label - static_cast<int32_t>(column), smoothing);
  }
};

template <DType kType, Target kTarget>
static void loss_of_row(const LossPlan& plan, const LossTensors& tensors, int64_t row, int64_t sample) {
  const Saved<float> saved(tensors.saved, plan);
  const void* z = at<kType>(tensors.logits, row * plan.stride);
  const RowTarget<kTarget> target(plan, tensors.target, sample);
  Floats largest = all(kLowest);
  Sum totals;
  for_vectors(plan.classes,
              [&](int64_t c, int live) { largest = larger(in_live(read<kType>(z, c, live), live, kLowest), largest); });
  const float maximum = largest_of(largest);
  for_vectors(plan.classes,
              [&](int64_t c, int live) { totals.add(in_live(exp_of(read<kType>(z, c, live) - maximum), live, 0.0f)); });
  float log_sum = log_of(all(totals.value()))[0];
  float loss;
  if (kTarget == Target::kLabels) {
    loss = target.label < 0 ? kNaN : log_sum + (maximum - load_some<kType>(at<kType>(z, target.label), 1)[0]);
  } else {
    Sum products, sums;
    for_vectors(plan.classes, [&](int64_t c, int live) {
      const Floats q = in_live(target.at(c, live), live, 0.0f);
      products.add(q * ((maximum - read<kType>(z, c, live)) + log_sum));
      sums.add(q);
    });
    loss = products.value();
    saved.target_sums[row] = sums.value();
  }
  const bool known = kTarget == Target::kProbabilities || target.label >= 0;
  saved.losses[row] = known ? loss : kNaN;
  saved.maxima[row] = maximum;
  saved.log_sums[row] = known ? log_sum : kNaN;
}

// factor * (sum(q) softmax(z) - q) of a row, a vector at a time.
template <DType kType, Target kTarget>
struct RowGradient {
  const void* z;
  const RowTarget<kTarget> target;
  float factor, maximum, log_sum, sum;

  RowGradient(const LossPlan& plan, const GradTensors& tensors, int64_t row, int64_t sample, float factor)
      : z(elle_fast::ELLE_ISA::at<kType>(tensors.logits, row * plan.stride)),
        target(plan, tensors.target, sample),
        factor(factor) {
    const Saved<const float> saved(tensors.saved, plan);
    maximum = saved.maxima[row];
    log_sum = saved.log_sums[row];
    sum = kTarget == Target::kLabels ? 1.0f : saved.target_sums[row];
  }

  ELLE_INLINE Floats at(int64_t column, int live) const {
    const Floats softmax = exp_of((read<kType>(z, column, live) - maximum) - log_sum);
    return factor * (sum * softmax - target.at(column, live));
  }
};

template <DType kType, Target kTarget>
static void gradient_of_row(const LossPlan& plan, const GradTensors& tensors, int64_t row, int64_t sample,
                            float factor) {
  const RowGradient<kType, kTarget> gradient(plan, tensors, row, sample, factor);
  void* to = at<kType>(tensors.grad, row * plan.classes);
  for_vectors(plan.classes, [&](int64_t c, int live) { write<kType>(to, c, gradient.at(c, live), live); });
}

// ---- The linearity of the logits

template <DType kType>
static ELLE_INLINE Floats weighted_sum(const LossPlan& plan, const void* logits, const Residual& residual,
                                       int64_t column, int live) {
  Floats r{};
  for (int p = 0; p < points_of(plan.points); ++p)
    r += residual.weights[p] * read<kType>(at<kType>(logits, residual.rows[p] * plan.stride), column, live);
  return r;
}

// ||r||^2 over the classes.
template <DType kType>
static float squared_size(const LossPlan& plan, const LossTensors& tensors, int64_t index) {
  const Residual residual = residual_of(plan, index / plan.part, index % plan.part, tensors.alpha[index]);
  Sum squares;
  for_vectors(plan.classes, [&](int64_t c, int live) {
    const Floats r = weighted_sum<kType>(plan, tensors.logits, residual, c, live);
    squares.add(r * r);
  });
  return squares.value();
}

// All rows that a sample's residuals look at, and its row of x_adv: ELLE-2p's residuals share that one.
template <DType kType, Target kTarget>
static void gradient_of_sample(const LossPlan& plan, const GradTensors& tensors, const Upstream& upstream,
                               int64_t sample) {
  const Saved<const float> saved(tensors.saved, plan);
  const bool has_adv = sample < plan.adv_rows;
  const int64_t triplets = sample < plan.part ? plan.triplets : 0;
  const float factor = upstream.to_ce / static_cast<float>(plan.adv_rows);
  const RowGradient<kType, kTarget> gradient(plan, tensors, has_adv ? sample : 0, has_adv ? sample : 0, factor);
  for_vectors(plan.classes, [&](int64_t c, int live) {
    Floats of_adv = has_adv && upstream.ce ? gradient.at(c, live) : Floats{};
    for (int64_t triplet = 0; triplet < triplets; ++triplet) {
      const int64_t index = triplet * plan.part + sample;
      const Residual residual = residual_of(plan, triplet, sample, tensors.alpha[index]);
      Floats slope{};
      if (upstream.e_lin)
        slope = upstream.to_e_lin * saved.slopes[index] * weighted_sum<kType>(plan, tensors.logits, residual, c, live);
      for (int p = 0; p < points_of(plan.points); ++p) {
        if (residual.rows[p] < plan.adv_rows) {
          of_adv += residual.weights[p] * slope;
        } else {
          write<kType>(at<kType>(tensors.grad, residual.rows[p] * plan.classes), c, residual.weights[p] * slope, live);
        }
      }
    }
    if (has_adv) write<kType>(at<kType>(tensors.grad, sample * plan.classes), c, of_adv, live);
  });
}

}  // namespace elle_fast::ELLE_ISA
