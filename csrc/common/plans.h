// All of a call but its tensors, checked and set up once (module.cpp) and used at every step; and the tensors.
#pragma once

#include "host_device.h"

namespace elle_fast {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Norm : int { kLinf = 0, kL2 = 1 };
enum class First : int { kNone = 0, kStep = 1, kGiven = 2 };         // the first rows: none, the attack's step, x_adv
enum class Points : int { kElle = 0, kElle2p = 1, kFivePoint = 2 };  // elle_fast/ops/layout.py
enum class Alpha : int { kUniform = 0, kHalf = 1, kGiven = 2 };
enum class Penalty : int { kSquared = 0, kAbs = 1, kSmoothL1 = 2 };

constexpr ELLE_INLINE int bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

constexpr ELLE_INLINE int blocks_of(Points points) {
  return points == Points::kElle ? 3 : points == Points::kElle2p ? 2 : 5;
}

// pack_points and random_start. Tensors are dense: channels first, or channels last where the flag says so.
struct PackPlan {
  int64_t batch;     // samples of x
  int64_t part;      // samples that have triplets, the first ones
  int64_t channels;  // a sample has channels * plane elements; element = channel * plane + place in logical order
  int64_t plane;
  int64_t triplets;
  int64_t sample_offset;  // index of x's first sample in the whole batch
  float eps, step_size;
  float radius;  // of the attack's random start, in units of x
  float low, high;
  Norm norm;
  First first;
  Points points;
  Alpha alpha;
  bool start, project, clamp, normalise;
  bool x_last, given_last, points_last;  // channels last in memory
  DType x_type, given_type, points_type;

  ELLE_INLINE int64_t elements() const { return channels * plane; }
  // Of the points: those before the triplets, and all.
  ELLE_INLINE int64_t first_rows() const { return first == First::kNone ? 0 : batch; }
  ELLE_INLINE int64_t rows() const { return first_rows() + blocks_of(points) * triplets * part; }
};

struct PackTensors {
  const void* x;
  const void* given;      // the attack's gradient, or its points; null without
  const float* alpha_in;  // [triplets * part], null unless alpha is given
  const int64_t* seed;
  const float* statistics;  // mean [channels], 1 / std [channels]; null unless normalised
  void* points;
  float* alpha;  // [triplets * part]
};

// elle_loss and local_linearity. elle_fast/ops/elle_loss/validation.py: Linearity, Sizes, LamRule.
struct LossPlan {
  int64_t losses;     // rows whose cross-entropy is needed
  int64_t residuals;  // triplets * part
  int64_t first;      // rows of x_adv that the logits begin with
  int64_t part;       // samples that the regulariser looks at
  int64_t triplets;
  int64_t classes;
  int64_t stride;         // distance of the logits' rows, in elements
  int64_t target_stride;  // of the probabilities' rows; -1: class indices
  float label_smoothing;
  Points points;
  Penalty penalty;
  bool of_logits;  // the residual is taken of the logits, not of the losses
  DType type;      // of the logits and their gradient
};

// How ELLE-A moves lam (paper, Algorithm 1, lines 9 to 11), and its state on the device.
struct LamRule {
  float lam_max;  // float32, as lam is
  float gamma;
  double sensitivity;
  int64_t min_history;
  int64_t window;  // values that the history holds; 0: count, mean and squared deviations of all
};

struct LamState {
  float* lam;  // null: lam is not adaptive
  int64_t* count;
  int64_t* skipped;
  double* mean;    // null with a window
  double* spread;  // sum of squared deviations, or the ring of the last `window` values
};

struct LossTensors {
  const void* logits;
  const void* target;  // int64 [B], or float [B, classes]
  const float* alpha;  // [residuals]
  // What the forward leaves to the backward, for S losses and R residuals: losses [S], maxima [S], logarithms of the
  // sums of exponentials [S], sums of the targets [S] (if they are probabilities or smoothed), slopes of E_lin with
  // respect to the losses [S] or, of logits, factors of the residuals [R]; and the lam that weighed E_lin.
  float* saved;
  const float* lam;  // null: lam_value
  float lam_value;
  float* loss;
  float* ce;
  float* e_lin;
};

struct GradTensors {
  const void* logits;
  const void* target;
  const float* alpha;
  const float* saved;
  const float* grad_loss;  // what reaches loss, ce and e_lin; null: nothing
  const float* grad_ce;
  const float* grad_e_lin;
  void* grad;  // [rows, classes], contiguous
};

}  // namespace elle_fast
