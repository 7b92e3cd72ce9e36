// elle_loss on the CPU: losses of rows, their reduction, and the gradient of the logits.
//
// The forward reads each logit once from memory (the second time out of the cache), the backward reads it again and
// writes its gradient. Rows of many classes are bound by memory, rows of few by how fast they can be transposed: their
// exponentials are taken with one row in each lane, as one row would not fill a vector.
//
// The same bits for any number of threads: how rows are cut into tasks depends on their sizes alone, and one thread
// takes the sums over rows.
#include "../common/kernels.h"
#include "few_classes.h"
#include "many_classes.h"
#include "parallel.h"

namespace elle_fast::ELLE_ISA {

constexpr int64_t kTaskNumbers = 2048;     // logits of a task, about
constexpr int64_t kThreadNumbers = 16384;  // logits worth another thread

// body(begin, end) for ranges of rows.
template <class Body>
static void over_rows(int64_t rows, int64_t numbers_per_row, int most_threads, const Body& body) {
  int64_t each = (kTaskNumbers / numbers_per_row + kSpan - 1) / kSpan * kSpan;
  if (each < 1 || numbers_per_row > kTaskNumbers) each = 1;
  const int64_t worth = 1 + rows * numbers_per_row / kThreadNumbers;
  parallel_ranges(rows, each, worth < most_threads ? static_cast<int>(worth) : most_threads, body);
}

// The reduction: by one thread, in one order.
static void reduce(const LossPlan& plan, const LamRule& rule, const LossTensors& tensors, const LamState& state) {
  const Saved<float> saved(tensors.saved, plan);
  double penalties = 0.0, squares = 0.0, rises = 0.0, losses = 0.0;
  if (plan.of_logits) {
    for (int64_t i = 0; i < plan.residuals; ++i) penalties += penalise_logits(plan, saved.slopes[i]);
  } else {
    for (int64_t row = 0; row < plan.adv_rows; ++row) saved.slopes[row] = 0.0f;
    for (int64_t triplet = 0; triplet < plan.triplets; ++triplet)
      for (int64_t sample = 0; sample < plan.part; ++sample) {
        const Triplet one = penalise_triplet(plan, tensors, triplet, sample, saved.slopes[sample]);
        penalties += one.penalty;
        squares += one.square;
        rises += one.rise;
      }
  }
  for (int64_t row = 0; row < plan.adv_rows; ++row) losses += saved.losses[row];
  const float e_lin = static_cast<float>(penalties / static_cast<double>(plan.residuals));
  const float ce = plan.adv_rows == 0 ? 0.0f : static_cast<float>(losses / static_cast<double>(plan.adv_rows));
  finish_loss(plan, rule, tensors, state, ce, e_lin, relative_e_lin(squares, rises));
}

template <DType kType, Target kTarget>
static void run(const LossPlan& plan, const LossTensors& tensors, int threads) {
  if (plan.losses > 0)
    over_rows(plan.losses, plan.classes, threads, [&](int64_t begin, int64_t end) {
      if (plan.classes <= kFewClasses) {
        losses_of_few<kType, kTarget>(plan, tensors, begin, end);
      } else {
        for (Walk walk(begin, plan); walk.row < end; walk.next())
          loss_of_row<kType, kTarget>(plan, tensors, walk.row, walk.sample);
      }
    });
  if (plan.of_logits)
    over_rows(plan.residuals, plan.classes * points_of(plan.points), threads, [&](int64_t begin, int64_t end) {
      float* sizes = Saved<float>(tensors.saved, plan).slopes;
      for (int64_t i = begin; i < end; ++i) sizes[i] = squared_size<kType>(plan, tensors, i);
    });
}

template <DType kType, Target kTarget>
static void run(const LossPlan& plan, const GradTensors& tensors, int threads) {
  const Saved<const float> saved(tensors.saved, plan);
  const Upstream upstream = upstream_of(tensors, *saved.lam);
  if (plan.of_logits) {
    const int64_t rows_of_sample = 1 + points_of(plan.points) * plan.triplets;
    over_rows(plan.samples(), plan.classes * rows_of_sample, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gradient_of_sample<kType, kTarget>(plan, tensors, upstream, i);
    });
    return;
  }
  over_rows(plan.losses, plan.classes, threads, [&](int64_t begin, int64_t end) {
    if (plan.classes <= kFewClasses) {
      gradient_of_few<kType, kTarget>(plan, tensors, upstream, begin, end);
      return;
    }
    for (Walk walk(begin, plan); walk.row < end; walk.next()) {
      const float factor = factor_of(plan, upstream, saved.slopes, walk.row);
      gradient_of_row<kType, kTarget>(plan, tensors, walk.row, walk.sample, factor);
    }
  });
}

template <class Tensors>
static void call(const LossPlan& plan, const Tensors& tensors, int threads) {
  with_type(plan.type, [&](auto kind) {
    constexpr DType kType = kind.value;
    if (plan.target_stride >= 0) return run<kType, Target::kProbabilities>(plan, tensors, threads);
    if (plan.label_smoothing != 0.0f) return run<kType, Target::kSmoothed>(plan, tensors, threads);
    run<kType, Target::kLabels>(plan, tensors, threads);
  });
}

int elle_loss(const LossPlan& plan, const LamRule& rule, const LossTensors& tensors, const LamState& state,
              Where threads) {
  call(plan, tensors, static_cast<int>(threads));
  reduce(plan, rule, tensors, state);
  return 0;
}

int elle_loss_backward(const LossPlan& plan, const GradTensors& tensors, Where threads) {
  call(plan, tensors, static_cast<int>(threads));
  return 0;
}

int update_lam(const void* value, bool is_double, const LamRule& rule, const LamState& state, float* used_lam, Where) {
  *used_lam = next_lam(is_double ? *static_cast<const double*>(value) : *static_cast<const float*>(value), rule, state);
  return 0;
}

}  // namespace elle_fast::ELLE_ISA
