// Losses and gradients of rows of few classes: kSpan rows at a time, one in each lane, as one row would not fill a
// vector.
#pragma once

#include "loss_targets.h"

namespace elle_fast::ELLE_ISA {

constexpr int64_t kFewClasses = 64;

// Rows of few classes, a class in each vector.
struct Columns {
  Floats classes[kFewClasses];
};

// A group of rows: where each is, and its sample. Lanes beyond the last row repeat it.
struct Group {
  int live;
  int64_t row[kSpan], sample[kSpan];

  Group(Walk& walk, int64_t end) : live(0) {
    for (int lane = 0; lane < kSpan; ++lane) {
      if (walk.row < end) {
        row[lane] = walk.row;
        sample[lane] = walk.sample;
        ++live;
        walk.next();
      } else {
        row[lane] = row[live - 1];
        sample[lane] = sample[live - 1];
      }
    }
  }
};

template <DType kType>
static void read_group(const void* from, int64_t stride, int64_t classes, const int64_t (&rows)[kSpan],
                       Columns& columns) {
#if defined(__AVX512F__)
  // Rows at one distance: a gather for each class. Written a number at a time the columns would have to leave the store
  // buffer before they can be read.
  if (kType == DType::kFloat32 && rows[kSpan - 1] - rows[0] == kSpan - 1 && stride < (1 << 24)) {
    const float* begin = static_cast<const float*>(at<kType>(from, rows[0] * stride));
    const __m512i places = (__m512i)(numbered<Signed>() * static_cast<int32_t>(stride));
    for (int64_t c = 0; c < classes; ++c)
      columns.classes[c] = (Floats)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xFFFF, places, begin + c, 4);
    return;
  }
#endif
  float* to = reinterpret_cast<float*>(columns.classes);
  float numbers[kType == DType::kFloat32 ? 1 : kFewClasses * kSpan];
  const bool dense = stride == classes && rows[kSpan - 1] - rows[0] == kSpan - 1;
  if (kType != DType::kFloat32 && dense)
    load_row<kType>(at<kType>(from, rows[0] * stride), static_cast<int>(kSpan * classes), numbers);
  for (int lane = 0; lane < kSpan; ++lane) {
    const void* row = at<kType>(from, rows[lane] * stride);
    const float* z = kType == DType::kFloat32 ? static_cast<const float*>(row) : numbers + lane * classes;
    if (kType != DType::kFloat32 && !dense) load_row<kType>(row, static_cast<int>(classes), numbers + lane * classes);
    for (int64_t c = 0; c < classes; ++c) to[c * kSpan + lane] = z[c];
  }
}

template <Target kTarget>
struct GroupTarget {
  const Smoothing smoothing;
  Signed label;
  Columns probabilities;

  GroupTarget(const LossPlan& plan, const void* target, const Group& group) : smoothing(plan) {
    if (kTarget == Target::kProbabilities) {
      read_group<DType::kFloat32>(target, plan.target_stride, plan.classes, group.sample, probabilities);
    } else {
      for (int lane = 0; lane < kSpan; ++lane) label[lane] = label_of(target, group.sample[lane], plan);
    }
  }

  ELLE_INLINE Floats operator[](int c) const {
    return kTarget == Target::kProbabilities ? smoothing(probabilities.classes[c])
                                             : of_label<kTarget>(label == c, smoothing);
  }
};

template <DType kType, Target kTarget>
static void losses_of_few(const LossPlan& plan, const LossTensors& tensors, int64_t begin, int64_t end) {
  const Saved<float> saved(tensors.saved, plan);
  const int classes = static_cast<int>(plan.classes);
  Columns z;
  for (Walk walk(begin, plan); walk.row < end;) {
    const int64_t row = walk.row;
    const Group group(walk, end);
    read_group<kType>(tensors.logits, plan.stride, plan.classes, group.row, z);
    const GroupTarget<kTarget> target(plan, tensors.target, group);
    Floats maximum = all(kLowest), total{}, loss{}, sum{};
    for (int c = 0; c < classes; ++c) maximum = larger(z.classes[c], maximum);
    for (int c = 0; c < classes; ++c) total += exp_of(z.classes[c] - maximum);
    Floats log_sum = log_of(total);
    if (kTarget == Target::kLabels) {
      Floats at_label{};
      for (int c = 0; c < classes; ++c) at_label = target.label == c ? z.classes[c] : at_label;
      loss = log_sum + (maximum - at_label);
    } else {
      for (int c = 0; c < classes; ++c) {
        const Floats q = target[c];
        loss += q * ((maximum - z.classes[c]) + log_sum);
        sum += q;
      }
      store_next<DType::kFloat32>(saved.target_sums + row, sum, group.live);
    }
    if (kTarget != Target::kProbabilities) {
      // A label that is no class: NaN here and in the row's gradient; a step with it should not look like a good one.
      loss = target.label < 0 ? all(kNaN) : loss;
      log_sum = target.label < 0 ? all(kNaN) : log_sum;
    }
    store_next<DType::kFloat32>(saved.losses + row, loss, group.live);
    store_next<DType::kFloat32>(saved.maxima + row, maximum, group.live);
    store_next<DType::kFloat32>(saved.log_sums + row, log_sum, group.live);
  }
}

template <DType kType>
static void write_group(const Columns& columns, int64_t classes, int live, void* to) {
  const float* from = reinterpret_cast<const float*>(columns.classes);
  float numbers[kFewClasses * kSpan];
  float* rows = kType == DType::kFloat32 ? static_cast<float*>(to) : numbers;
  for (int lane = 0; lane < live; ++lane)
    for (int64_t c = 0; c < classes; ++c) rows[lane * classes + c] = from[c * kSpan + lane];
  if (kType != DType::kFloat32) store_row<kType>(numbers, static_cast<int>(live * classes), to);
}

template <DType kType, Target kTarget>
static void gradient_of_few(const LossPlan& plan, const GradTensors& tensors, const Upstream& upstream, int64_t begin,
                            int64_t end) {
  const Saved<const float> saved(tensors.saved, plan);
  const int classes = static_cast<int>(plan.classes);
  Columns z;
  for (Walk walk(begin, plan); walk.row < end;) {
    const int64_t row = walk.row;
    const Group group(walk, end);
    read_group<kType>(tensors.logits, plan.stride, plan.classes, group.row, z);
    const GroupTarget<kTarget> target(plan, tensors.target, group);
    const Floats maximum = load_next<DType::kFloat32>(saved.maxima + row, group.live),
                 log_sum = load_next<DType::kFloat32>(saved.log_sums + row, group.live);
    const Floats sum =
        kTarget == Target::kLabels ? all(1.0f) : load_next<DType::kFloat32>(saved.target_sums + row, group.live);
    Floats factor;
    for (int lane = 0; lane < kSpan; ++lane) factor[lane] = factor_of(plan, upstream, saved.slopes, group.row[lane]);
    for (int c = 0; c < classes; ++c)
      z.classes[c] = factor * (sum * exp_of((z.classes[c] - maximum) - log_sum) - target[c]);
    write_group<kType>(z, plan.classes, group.live, at<kType>(tensors.grad, row * plan.classes));
  }
}

}  // namespace elle_fast::ELLE_ISA
