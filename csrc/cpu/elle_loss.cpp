// elle_loss on the CPU: losses of rows, their reduction, and the gradient of the logits.
//
// The forward reads each logit once from memory (the second time out of the cache), the backward reads it again and
// writes its gradient. Rows of many classes are bound by memory, rows of few by how fast they can be transposed: their
// exponentials are taken with one row in each lane, as one row would not fill a vector.
//
// The same bits for any number of threads: how rows are cut into tasks depends on their sizes alone, and sums over rows
// are taken by one thread. A row's maximum and the logarithm of its sum are kept apart: their sum would round away the
// difference between logits that share a large offset.
#include "few_classes.h"
#include "kernels.h"
#include "many_classes.h"
#include "parallel.h"

namespace elle_fast {
namespace ELLE_ISA {
namespace {

constexpr int64_t kTaskNumbers = 2048;     // logits of a task, about
constexpr int64_t kThreadNumbers = 16384;  // logits worth another thread

struct Tasks {
  int64_t rows, rows_per_task, count;
  int threads;

  Tasks(int64_t rows, int64_t numbers_per_row, int most_threads) : rows(rows) {
    rows_per_task = (kTaskNumbers / numbers_per_row + kSpan - 1) / kSpan * kSpan;
    if (rows_per_task < 1 || numbers_per_row > kTaskNumbers) rows_per_task = 1;
    count = (rows + rows_per_task - 1) / rows_per_task;
    const int64_t worth = 1 + rows * numbers_per_row / kThreadNumbers;
    threads = worth < most_threads ? static_cast<int>(worth) : most_threads;
  }

  // body(begin, end) for ranges of rows.
  template <class Body>
  void run(const Body& body) const {
    auto task = [&](int64_t i) {
      const int64_t begin = i * rows_per_task, end = begin + rows_per_task;
      body(begin, end < rows ? end : rows);
    };
    parallel_for(count, threads, task);
  }
};

// ---- The reduction: by one thread, in one order

// E_lin from the losses of the rows, and its slope with respect to each of them.
static double linearity_of_losses(const LossPlan& plan, const LossTensors& tensors) {
  const Saved<float> saved(tensors.saved, plan);
  const int points = points_of(plan.points);
  const float scale = static_cast<float>(plan.residuals);
  double sum = 0.0;
  for (int64_t row = 0; row < plan.first; ++row) saved.slopes[row] = 0.0f;
  for (int64_t triplet = 0; triplet < plan.triplets; ++triplet) {
    for (int64_t sample = 0; sample < plan.part; ++sample) {
      const Residual residual = residual_of(plan, triplet, sample, tensors.alpha[triplet * plan.part + sample]);
      float r = 0.0f;
      for (int p = 0; p < points; ++p) r += residual.weights[p] * saved.losses[residual.rows[p]];
      const Penalised penalised = penalise_loss(r, plan.penalty);
      sum += penalised.value;
      for (int p = 0; p < points; ++p) {
        const float slope = residual.weights[p] * (penalised.slope / scale);
        float& to = saved.slopes[residual.rows[p]];
        to = residual.rows[p] < plan.first ? to + slope : slope;
      }
    }
  }
  return sum / static_cast<double>(plan.residuals);
}

// E_lin from the squared sizes of the residuals, each replaced by the s with dE_lin / dr = s * r.
static double linearity_of_logits(const LossPlan& plan, float* slopes) {
  double sum = 0.0;
  for (int64_t i = 0; i < plan.residuals; ++i) {
    const Penalised penalised = penalise_square(slopes[i], plan.penalty);
    sum += penalised.value;
    slopes[i] = penalised.slope / static_cast<float>(plan.residuals);
  }
  return sum / static_cast<double>(plan.residuals);
}

static void reduce(const LossPlan& plan, const LamRule& rule, const LossTensors& tensors, const LamState& state) {
  const Saved<float> saved(tensors.saved, plan);
  const float e_lin =
      static_cast<float>(plan.of_logits ? linearity_of_logits(plan, saved.slopes) : linearity_of_losses(plan, tensors));
  double sum = 0.0;
  for (int64_t row = 0; row < plan.first; ++row) sum += saved.losses[row];
  const float ce = plan.first == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(plan.first));
  float lam = tensors.lam_value;
  if (tensors.lam != nullptr) lam = *tensors.lam;
  if (state.lam != nullptr) lam = next_lam(e_lin, rule, state);
  *tensors.ce = ce;
  *tensors.e_lin = e_lin;
  *tensors.loss = ce + lam * e_lin;
  *saved.lam = lam;
}

// ---- A call: its types, its tasks

template <DType kType, Target kTarget>
static void forward(const LossPlan& plan, const LossTensors& tensors, int threads) {
  if (plan.losses > 0)
    Tasks(plan.losses, plan.classes, threads).run([&](int64_t begin, int64_t end) {
      if (plan.classes <= kFewClasses) {
        losses_of_few<kType, kTarget>(plan, tensors, begin, end);
      } else {
        for (Walk walk(begin, plan); walk.row < end; walk.next())
          loss_of_row<kType, kTarget>(plan, tensors, walk.row, walk.sample);
      }
    });
  if (plan.of_logits)
    Tasks(plan.residuals, plan.classes * points_of(plan.points), threads).run([&](int64_t begin, int64_t end) {
      float* sizes = Saved<float>(tensors.saved, plan).slopes;
      for (int64_t i = begin; i < end; ++i) sizes[i] = squared_size<kType>(plan, tensors, i);
    });
}

template <DType kType, Target kTarget>
static void backward(const LossPlan& plan, const GradTensors& tensors, int threads) {
  const Saved<const float> saved(tensors.saved, plan);
  const Upstream upstream = upstream_of(tensors, *saved.lam);
  if (plan.of_logits) {
    const int64_t samples = plan.first > plan.part ? plan.first : plan.part;
    const int64_t rows_of_sample = 1 + points_of(plan.points) * plan.triplets;
    Tasks(samples, plan.classes * rows_of_sample, threads).run([&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gradient_of_sample<kType, kTarget>(plan, tensors, upstream, i);
    });
    return;
  }
  Tasks(plan.losses, plan.classes, threads).run([&](int64_t begin, int64_t end) {
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

template <DType kType>
static void call(const LossPlan& plan, const LossTensors& tensors, int threads) {
  if (plan.target_stride >= 0) return forward<kType, Target::kProbabilities>(plan, tensors, threads);
  if (plan.label_smoothing != 0.0f) return forward<kType, Target::kSmoothed>(plan, tensors, threads);
  forward<kType, Target::kLabels>(plan, tensors, threads);
}

template <DType kType>
static void call(const LossPlan& plan, const GradTensors& tensors, int threads) {
  if (plan.target_stride >= 0) return backward<kType, Target::kProbabilities>(plan, tensors, threads);
  if (plan.label_smoothing != 0.0f) return backward<kType, Target::kSmoothed>(plan, tensors, threads);
  backward<kType, Target::kLabels>(plan, tensors, threads);
}

template <class Tensors>
static void call_type(const LossPlan& plan, const Tensors& tensors, int threads) {
  if (plan.type == DType::kFloat32) return call<DType::kFloat32>(plan, tensors, threads);
  if (plan.type == DType::kFloat16) return call<DType::kFloat16>(plan, tensors, threads);
  call<DType::kBFloat16>(plan, tensors, threads);
}

}  // namespace

void elle_loss(const LossPlan& plan, const LamRule& rule, const LossTensors& tensors, const LamState& state,
               int threads) {
  call_type(plan, tensors, threads);
  reduce(plan, rule, tensors, state);
}

void elle_loss_backward(const LossPlan& plan, const GradTensors& tensors, int threads) {
  call_type(plan, tensors, threads);
}

}  // namespace ELLE_ISA
}  // namespace elle_fast
