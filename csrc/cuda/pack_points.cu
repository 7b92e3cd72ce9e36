// pack_points on a GPU: one launch.
//
// linf (pack_cube): reads x and the gradient (or x_adv) once and writes each packed row once: 8 + 16 bytes for each
// element of x in fp32, 12 in bf16 or fp16. Bound by memory; with channels last, where a Philox call serves one element
// of x_a and x_b instead of two, bf16 is about as much bound by arithmetic.
//
// l2 (pack_ball): a sample's norms have to be known before it can be written, so a block goes over its sample twice a
// triplet and once or twice for the attack's step, and draws the noise anew each time. Bound by arithmetic, or for few
// samples by their number. Sums run in a fixed order.
//
// Points of the linf ball have the reference's bits, except normalized ones, where a division became a product. A
// thread has 16 bytes of a row of points at a time, or the same elements one by one where memory is not aligned to 16.
#include "launch.cuh"
#include "packer.cuh"

namespace elle_fast::cuda {
namespace {

constexpr int kCubeThreads = 128, kBallThreads = 512;

// Vectors that a thread of pack_cube has in flight. They share the words of their sample; channels last, those are few
// beside the words of the elements.
constexpr int groups_of(bool last) { return last ? 1 : 2; }

// What a sample's attack is scaled by.
struct Scales {
  float start;          // of the start's noise
  float length = 0.0f;  // of the gradient, in the l2 ball
  float pull = 1.0f;    // of the offset from x, there
};

// The attack's point, in the l2 ball before its projection; or the point that was given, or the start alone.
template <class P>
inline __device__ void make_adv(const P& packer, int64_t row, int64_t memory, const Scales& scales,
                                const typename P::Values& x, typename P::Values& adv) {
  const PackPlan& plan = packer.plan;
  typename P::Values given;
  if (plan.adv != Adv::kStart) packer.read_given(row, memory, given);
  if (plan.adv == Adv::kGiven) {
    ELLE_EACH(i, P::kVec) adv[i] = given[i];
    return;
  }
  ELLE_EACH(i, P::kVec) adv[i] = x[i];
  if (plan.start) {
    typename P::Values noise[1];
    packer.draw(row, 0, memory, noise);
    ELLE_EACH(i, P::kVec) adv[i] = drawn<true>(x[i], noise[0][i], scales.start, plan.low, plan.high);
  }
  if (plan.adv == Adv::kStart) return;
  ELLE_EACH(i, P::kVec) {
    if constexpr (P::kInBall) {
      adv[i] = ball_stepped(adv[i], given[i], scales.length, plan.step_size);
    } else {
      adv[i] += signed_step(given[i], plan.step_size);
      adv[i] = kept<true>(x[i], adv[i], plan.project, plan.eps, plan.low, plan.high);
    }
  }
}

// ---- The linf ball

// Threads: x over a sample's vectors, y over samples.
template <int kBytes, bool kLast, bool kWide>
__global__ void __launch_bounds__(kCubeThreads, 4) pack_cube(const __grid_constant__ Work work) {
  using P = Packer<kBytes, kLast, false>;
  constexpr int kGroups = groups_of(kLast);
  const P packer(work, kWide);
  const PackPlan& plan = packer.plan;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * kGroups;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < plan.batch;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    for (int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x * kGroups + threadIdx.x; v < packer.vectors;
         v += stride) {
      typename P::Values x[kGroups], adv[kGroups];
      int64_t memory[kGroups];
      bool used[kGroups];
      ELLE_EACH(g, kGroups) {
        used[g] = v + g * blockDim.x < packer.vectors;
        memory[g] = (v + g * blockDim.x) * P::kVec;
        if (!used[g]) continue;
        packer.read_x(row, memory[g], x[g]);
        if (plan.adv != Adv::kNone) {
          make_adv(packer, row, memory[g], Scales{plan.radius}, x[g], adv[g]);
          packer.write(row, memory[g], adv[g]);
        }
      }
      if (row >= plan.part) continue;
      for (int64_t triplet = 0; triplet < plan.triplets; ++triplet) {
        const float alpha = packer.alpha_of(row, triplet);
        if (v == 0) packer.tensors.alpha[triplet * plan.part + row] = alpha;
        ELLE_EACH(g, kGroups) {
          if (used[g]) packer.write_triplet(row, triplet, memory[g], x[g], adv[g], plan.eps, plan.eps, alpha);
        }
      }
    }
  }
}

// ---- The l2 ball

// The rest of the way: projected and within the bounds.
template <class P>
inline __device__ void ball_finish(const P& packer, const Scales& scales, const typename P::Values& x,
                                   typename P::Values& adv) {
  if (packer.plan.adv == Adv::kGiven) return;
  ELLE_EACH(i, P::kVec)
    adv[i] = bounded<true>(ball_projected(x[i], adv[i], scales.pull), packer.plan.low, packer.plan.high);
}

template <class P>
inline __device__ void measure_step(const P& packer, int64_t row, Scales& scales) {
  const PackPlan& plan = packer.plan;
  Squares grad;
  float start = 0.0f;
  for (int64_t v = threadIdx.x; v < packer.vectors; v += blockDim.x) {
    typename P::Values values;
    if (plan.adv == Adv::kStep) {
      packer.read_given(row, v * P::kVec, values);
      ELLE_EACH(i, P::kVec) grad.add(values[i]);
    }
    if (!plan.start) continue;
    typename P::Values noise[1];
    packer.draw(row, 0, v * P::kVec, noise);
    ELLE_EACH(i, P::kVec) start += packer.inside(v * P::kVec, i) ? noise[0][i] * noise[0][i] : 0.0f;
  }
  float sums[4] = {grad.tiny, grad.plain, grad.huge, start};
  block_sum(sums);
  scales.length = Squares{sums[0], sums[1], sums[2]}.length();
  if (plan.start) {
    scales.start = ball_scale(plan.radius, packer.sample_words(row, 0).w3, sqrtf(sums[3]), packer.elements);
  }
}

// The row of x_adv: once over the sample to write it, and once before to measure the offsets if there is a projection.
template <class P>
inline __device__ void ball_adv(const P& packer, int64_t row, Scales& scales) {
  const PackPlan& plan = packer.plan;
  bool measure = plan.adv == Adv::kStep && plan.project;
#pragma unroll 1
  for (bool written = false; !written; measure = false) {
    written = !measure;
    Squares offset;
    for (int64_t v = threadIdx.x; v < packer.vectors; v += blockDim.x) {
      typename P::Values x, adv;
      packer.read_x(row, v * P::kVec, x);
      make_adv(packer, row, v * P::kVec, scales, x, adv);
      if (measure) {
        ELLE_EACH(i, P::kVec) offset.add(packer.inside(v * P::kVec, i) ? adv[i] - x[i] : 0.0f);
      } else {
        ball_finish(packer, scales, x, adv);
        packer.write(row, v * P::kVec, adv);
      }
    }
    if (!measure) continue;
    float sums[3] = {offset.tiny, offset.plain, offset.huge};
    block_sum(sums);
    scales.pull = ball_pull(Squares{sums[0], sums[1], sums[2]}.length(), plan.eps);
  }
}

template <class P>
inline __device__ void ball_triplet(const P& packer, int64_t row, int64_t triplet, const Scales& scales) {
  const PackPlan& plan = packer.plan;
  float sums[2] = {0.0f, 0.0f};
  for (int64_t v = threadIdx.x; v < packer.vectors; v += blockDim.x) {
    typename P::Values noise[2];
    packer.draw(row, triplet, v * P::kVec, noise);
    ELLE_EACH(i, P::kVec) {
      ELLE_EACH(k, 2) sums[k] += packer.inside(v * P::kVec, i) ? noise[k][i] * noise[k][i] : 0.0f;
    }
  }
  block_sum(sums);
  const Words words = packer.sample_words(row, triplet);
  const float scale_a = ball_scale(plan.eps, words.w1, sqrtf(sums[0]), packer.elements);
  const float scale_b = ball_scale(plan.eps, words.w2, sqrtf(sums[1]), packer.elements);
  const float alpha = packer.alpha_of(row, triplet);
  if (threadIdx.x == 0) packer.tensors.alpha[triplet * plan.part + row] = alpha;
  for (int64_t v = threadIdx.x; v < packer.vectors; v += blockDim.x) {
    typename P::Values x, adv;
    packer.read_x(row, v * P::kVec, x);
    if (plan.points == Points::kElle2p) {
      make_adv(packer, row, v * P::kVec, scales, x, adv);
      ball_finish(packer, scales, x, adv);
    }
    packer.write_triplet(row, triplet, v * P::kVec, x, adv, scale_a, scale_b, alpha);
  }
}

// A block for a sample.
template <int kBytes, bool kLast>
__global__ void __launch_bounds__(kBallThreads, 1) pack_ball(const __grid_constant__ Work work) {
  using P = Packer<kBytes, kLast, true>;
  const P packer(work, work.wide);
  const PackPlan& plan = packer.plan;
  for (int64_t row = blockIdx.x; row < plan.batch; row += gridDim.x) {
    Scales scales{0.0f};
    if (plan.adv == Adv::kStep || plan.adv == Adv::kStart) measure_step(packer, row, scales);
    if (plan.adv != Adv::kNone) ball_adv(packer, row, scales);
    if (row >= plan.part) continue;
    for (int64_t triplet = 0; triplet < plan.triplets; ++triplet) ball_triplet(packer, row, triplet, scales);
  }
}

// ---- Launching

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tensors in another layout are read element by element anyway.
bool is_wide(const PackPlan& plan, const PackTensors& tensors, int vec) {
  const bool x = plan.x_last != plan.points_last || aligned(tensors.x, alignment_of(plan.x_type, vec));
  const bool given = plan.given_last != plan.points_last || aligned(tensors.given, alignment_of(plan.given_type, vec));
  return x && given && aligned(tensors.points, 16) && plan.elements() % vec == 0;
}

// Threads that share a tile evenly; short samples share a block.
template <int kBytes, bool kLast>
int launch_cube(const Work& work, int64_t vectors, Where stream) {
  const int64_t needed = ceiling(vectors, groups_of(kLast)), tiles = ceiling(needed, kCubeThreads);
  unsigned across = 1;
  while (across < kWarp && across < needed) across *= 2;
  if (needed > kWarp) across = static_cast<unsigned>(ceiling(ceiling(needed, tiles), kWarp) * kWarp);
  const unsigned down = kCubeThreads / across;
  const int64_t rows = ceiling(work.plan.batch, down);
  const dim3 grid(static_cast<unsigned>(tiles < 0x7fffffff ? tiles : 0x7fffffff),
                  static_cast<unsigned>(rows < 65535 ? rows : 65535));
  const auto kernel = work.wide ? pack_cube<kBytes, kLast, true> : pack_cube<kBytes, kLast, false>;
  return launch(kernel, grid, dim3(across, down), stream, work);
}

template <int kBytes, bool kLast>
int launch_ball(const Work& work, int64_t vectors, Where stream) {
  const int64_t passes = ceiling(vectors, kBallThreads), rows = work.plan.batch;
  const int64_t threads = ceiling(ceiling(vectors, passes), kWarp) * kWarp;
  const dim3 grid(static_cast<unsigned>(rows < 0x7fffffff ? rows : 0x7fffffff));
  return launch(pack_ball<kBytes, kLast>, grid, dim3(static_cast<unsigned>(threads)), stream, work);
}

template <int kBytes, bool kLast>
int launch_norm(Work work, Where stream) {
  constexpr int kVec = 16 / kBytes;
  const int64_t vectors = ceiling(work.plan.elements(), kVec);
  work.wide = is_wide(work.plan, work.tensors, kVec);
  return work.plan.norm == Norm::kLinf ? launch_cube<kBytes, kLast>(work, vectors, stream)
                                       : launch_ball<kBytes, kLast>(work, vectors, stream);
}

}  // namespace

int pack_points(const PackPlan& plan, const PackTensors& tensors, Where stream) {
  Work work{plan, tensors, false};
  if (!plan.clamp) {
    work.plan.low = -INFINITY;
    work.plan.high = INFINITY;
  }
  const auto run = plan.points_type == DType::kFloat32
                       ? (plan.points_last ? launch_norm<4, true> : launch_norm<4, false>)
                       : (plan.points_last ? launch_norm<2, true> : launch_norm<2, false>);
  return run(work, stream);
}

int probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, pack_ball<4, false>);
  cudaGetLastError();  // so that nobody else meets it
  return static_cast<int>(error);
}

const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace elle_fast::cuda
