// All of a call but its tensors, checked and set up once (csrc/bindings) and used at every step; and the tensors.
#pragma once

#include "host_device.h"

namespace elle_fast {

// Python passes an option as its place in such a list; kCount ends it.
enum class DType : int { kFloat32, kFloat16, kBFloat16, kCount };
enum class Norm : int { kLinf, kL2, kCount };
enum class Adv : int { kNone, kStep, kGiven, kStart, kCount };   // what the rows of x_adv are; kStart: random_start
enum class Points : int { kElle, kElle2p, kFivePoint, kCount };  // elle_fast/ops/layout.py
enum class Alpha : int { kUniform, kHalf, kGiven, kCount };
enum class Penalty : int { kSquared, kAbs, kSmoothL1, kCount };

constexpr ELLE_INLINE int bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

constexpr ELLE_INLINE int blocks_of(Points points) {
  return points == Points::kElle ? 3 : points == Points::kElle2p ? 2 : 5;
}

// A plan's fields are listed once, as FIELD(type, name): they are its members, and the keywords that Python gives.
#define ELLE_MEMBER(type, name) type name;
#define ELLE_VISIT(type, name) visit(#name, name);
#define ELLE_FIELDS(LIST)               \
  LIST(ELLE_MEMBER)                     \
  template <class Visit>                \
  void each_field(const Visit& visit) { \
    LIST(ELLE_VISIT)                    \
  }

// pack_points, and random_start, whose points are the attack's start alone. Tensors are dense: channels first, or
// channels last where the flag says so.
#define ELLE_PACK_FIELDS(FIELD)                                                     \
  FIELD(int64_t, batch)    /* samples of x */                                       \
  FIELD(int64_t, part)     /* samples that have triplets, the first ones */         \
  FIELD(int64_t, channels) /* a sample has channels * plane elements; */            \
  FIELD(int64_t, plane)    /* element = channel * plane + place in logical order */ \
  FIELD(int64_t, triplets)                                                          \
  FIELD(int64_t, sample_offset) /* index of x's first sample in the whole batch */  \
  FIELD(float, eps)                                                                 \
  FIELD(float, step_size)                                                           \
  FIELD(float, radius) /* of the attack's random start, in units of x */            \
  FIELD(float, low)                                                                 \
  FIELD(float, high)                                                                \
  FIELD(Norm, norm)                                                                 \
  FIELD(Adv, adv)                                                                   \
  FIELD(Points, points)                                                             \
  FIELD(Alpha, alpha)                                                               \
  FIELD(bool, start)                                                                \
  FIELD(bool, project)                                                              \
  FIELD(bool, clamp)                                                                \
  FIELD(bool, normalize)                                                            \
  FIELD(bool, x_last) /* channels last in memory */                                 \
  FIELD(bool, given_last)                                                           \
  FIELD(bool, points_last)                                                          \
  FIELD(DType, x_type)                                                              \
  FIELD(DType, given_type)                                                          \
  FIELD(DType, points_type)

struct PackPlan {
  ELLE_FIELDS(ELLE_PACK_FIELDS)

  ELLE_INLINE int64_t elements() const { return channels * plane; }
  // Of the points: those before the triplets, and all.
  ELLE_INLINE int64_t adv_rows() const { return adv == Adv::kNone ? 0 : batch; }
  ELLE_INLINE int64_t rows() const { return adv_rows() + blocks_of(points) * triplets * part; }
  // What the noise of a row of x is drawn by.
  ELLE_INLINE uint32_t sample(int64_t row) const { return static_cast<uint32_t>(sample_offset + row); }
};

struct PackTensors {
  const void* x;
  const void* given;      // the attack's gradient, or its points; null without either
  const float* alpha_in;  // [triplets * part], null unless alpha is given
  const int64_t* seed;
  const float* statistics;  // mean [channels], 1 / std [channels]; null unless the points are normalized
  void* points;
  float* alpha;  // [triplets * part]
};

// elle_loss and local_linearity. elle_fast/ops/elle_loss/validation.py: Linearity, Sizes.
#define ELLE_LOSS_FIELDS(FIELD)                                                       \
  FIELD(int64_t, losses)    /* rows whose cross-entropy is needed */                  \
  FIELD(int64_t, residuals) /* triplets * part */                                     \
  FIELD(int64_t, adv_rows)  /* rows of x_adv, which the logits begin with */          \
  FIELD(int64_t, part)      /* samples that the regulariser looks at */               \
  FIELD(int64_t, triplets)                                                            \
  FIELD(int64_t, classes)                                                             \
  FIELD(int64_t, stride)        /* distance of the logits' rows, in elements */       \
  FIELD(int64_t, target_stride) /* of the probabilities' rows; -1: class indices */   \
  FIELD(float, label_smoothing)                                                       \
  FIELD(Points, points)                                                               \
  FIELD(Penalty, penalty)                                                             \
  FIELD(bool, of_logits) /* the residual is taken of the logits, not of the losses */ \
  FIELD(DType, type)     /* of the logits and their gradient */

struct LossPlan {
  ELLE_FIELDS(ELLE_LOSS_FIELDS)

  // The sample that a row of the packed batch belongs to; and how many have a row of x_adv or triplets.
  ELLE_INLINE int64_t sample(int64_t row) const { return row < adv_rows ? row : (row - adv_rows) % part; }
  ELLE_INLINE int64_t samples() const { return adv_rows > part ? adv_rows : part; }
};

// How lam of ELLE-A moves, and its state on the device: by the paper's rule (Algorithm 1, lines 9 to 11), or by the
// weighted mean of relative E_lin.
#define ELLE_LAM_FIELDS(FIELD)                                                 \
  FIELD(float, lam_max) /* float32, as lam is */                               \
  FIELD(float, gamma)                                                          \
  FIELD(double, sensitivity)                                                   \
  FIELD(int64_t, min_history)                                                  \
  FIELD(double, threshold) /* of that mean */                                  \
  FIELD(double, rate)      /* what a step counts in it; 0: the paper's rule */ \
  FIELD(int64_t,                                                               \
        window) /* values that the history holds; 0: count, mean and squared deviations of all; -1: lam is fixed */

struct LamRule {
  ELLE_FIELDS(ELLE_LAM_FIELDS)

  ELLE_INLINE bool relative() const { return rate > 0.0; }
};

struct LamState {
  float* lam;  // null: lam is fixed
  int64_t* count;
  int64_t* skipped;
  double* mean;    // null with a window
  double* spread;  // sum of squared deviations, or the ring of the last `window` values; null of relative E_lin
};

struct LossTensors {
  const void* logits;
  const void* target;  // int64 [B], or float [B, classes]
  const float* alpha;  // [residuals]
  // What the forward leaves to the backward, for S losses and R residuals: losses [S], maxima [S], logarithms of the
  // sums of exponentials [S] (apart from the maxima: their sum would round away the difference between logits that
  // share a large offset), sums of the targets [S] (if they are probabilities or smoothed), slopes of E_lin with
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
