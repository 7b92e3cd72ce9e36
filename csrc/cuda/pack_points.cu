// pack_points and random_start on a GPU, one launch each.
//
// linf (pack_cube): reads x and the gradient (or x_adv) once and writes each packed row once. In fp32 that is 8 + 16 =
// 24 bytes an element of x, in bf16 or fp16 12; bound by memory. Channels first, one Philox call serves two elements of
// x_a and of x_b; channels last, where a pair lies apart, there is a call for each element, and bf16 is about as much
// bound by arithmetic.
//
// l2 (pack_ball): a sample's norms have to be known before it can be written, so a block goes over its sample twice a
// triplet and once or twice for the attack's step, drawing the noise anew each time; bound by arithmetic, and for few
// samples by their number. Sums run in a fixed order.
//
// An element is drawn and stepped by csrc/common; points of the linf ball have the reference's bits, but for those that
// are normalized, where a division became a product. A thread has 16 bytes of a row of points at a time. Where pointers
// or samples are not aligned to that, the same thread goes over them element by element.
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
inline __device__ void make_adv(const P& packer, bool start_alone, int64_t row, int64_t memory, const Scales& scales,
                                const typename P::Values& x, typename P::Values& adv) {
  const PackPlan& plan = packer.plan;
  typename P::Values given;
  if (!start_alone) packer.read_given(row, memory, given);
  if (plan.adv == Adv::kGiven) {
#pragma unroll
    for (int i = 0; i < P::kVec; ++i) adv[i] = given[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < P::kVec; ++i) adv[i] = x[i];
  if (plan.start) packer.random_start(row, memory, x, scales.start, adv);
  if (start_alone) return;
#pragma unroll
  for (int i = 0; i < P::kVec; ++i) {
    if constexpr (P::kInBall) {
      adv[i] = ball_stepped(adv[i], given[i], scales.length, plan.step_size);
    } else {
      adv[i] = stepped<true>(x[i], adv[i], given[i], plan.step_size, plan.project, plan.eps, plan.low, plan.high);
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
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        used[g] = v + g * blockDim.x < packer.vectors;
        memory[g] = (v + g * blockDim.x) * P::kVec;
        if (!used[g]) continue;
        packer.read_x(row, memory[g], x[g]);
        if (plan.adv != Adv::kNone) {
          make_adv(packer, work.start_alone, row, memory[g], Scales{plan.radius}, x[g], adv[g]);
          packer.write(row, memory[g], adv[g]);
        }
      }
      if (row >= plan.part) continue;
      for (int64_t triplet = 0; triplet < plan.triplets; ++triplet) {
        const float alpha = packer.alpha_of(row, triplet);
        if (v == 0) packer.tensors.alpha[triplet * plan.part + row] = alpha;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
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
#pragma unroll
  for (int i = 0; i < P::kVec; ++i) adv[i] = packer.limited(ball_projected(x[i], adv[i], scales.pull));
}

template <class P>
inline __device__ void measure_step(const P& packer, bool start_alone, int64_t row, Scales& scales) {
  const PackPlan& plan = packer.plan;
  Squares grad;
  float start = 0.0f;
  for (int64_t v = threadIdx.x; v < packer.vectors; v += blockDim.x) {
    typename P::Values values;
    if (!start_alone) {
      packer.read_given(row, v * P::kVec, values);
#pragma unroll
      for (int i = 0; i < P::kVec; ++i) grad.add(values[i]);
    }
    if (!plan.start) continue;
    packer.start_noise(row, v * P::kVec, values);
#pragma unroll
    for (int i = 0; i < P::kVec; ++i) start += packer.inside(v * P::kVec, i) ? values[i] * values[i] : 0.0f;
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
inline __device__ void ball_adv(const P& packer, bool start_alone, int64_t row, Scales& scales) {
  const PackPlan& plan = packer.plan;
  bool measure = plan.adv == Adv::kStep && plan.project && !start_alone;
#pragma unroll 1
  for (bool written = false; !written; measure = false) {
    written = !measure;
    Squares offset;
    for (int64_t v = threadIdx.x; v < packer.vectors; v += blockDim.x) {
      typename P::Values x, adv;
      packer.read_x(row, v * P::kVec, x);
      make_adv(packer, start_alone, row, v * P::kVec, scales, x, adv);
      if (measure) {
#pragma unroll
        for (int i = 0; i < P::kVec; ++i) offset.add(packer.inside(v * P::kVec, i) ? adv[i] - x[i] : 0.0f);
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
    typename P::Values a, b;
    packer.pair_noise(row, triplet, v * P::kVec, a, b);
#pragma unroll
    for (int i = 0; i < P::kVec; ++i) {
      sums[0] += packer.inside(v * P::kVec, i) ? a[i] * a[i] : 0.0f;
      sums[1] += packer.inside(v * P::kVec, i) ? b[i] * b[i] : 0.0f;
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
      make_adv(packer, false, row, v * P::kVec, scales, x, adv);
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
    if (plan.adv == Adv::kStep) measure_step(packer, work.start_alone, row, scales);
    if (plan.adv != Adv::kNone) ball_adv(packer, work.start_alone, row, scales);
    if (row >= plan.part) continue;
    for (int64_t triplet = 0; triplet < plan.triplets; ++triplet) ball_triplet(packer, row, triplet, scales);
  }
}

// ---- Launching

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tensors in another layout are read element by element anyway.
bool is_wide(const PackPlan& plan, const PackTensors& tensors, bool start_alone, int vec) {
  const bool x = plan.x_last != plan.points_last || aligned(tensors.x, alignment_of(plan.x_type, vec));
  const bool none = plan.adv == Adv::kNone || start_alone;
  const bool given =
      none || plan.given_last != plan.points_last || aligned(tensors.given, alignment_of(plan.given_type, vec));
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
int launch_norm(const Work& work, Where stream) {
  const int64_t vectors = ceiling(work.plan.elements(), 16 / kBytes);
  return work.plan.norm == Norm::kLinf ? launch_cube<kBytes, kLast>(work, vectors, stream)
                                       : launch_ball<kBytes, kLast>(work, vectors, stream);
}

template <int kBytes>
int launch_layout(const Work& work, Where stream) {
  return work.plan.points_last ? launch_norm<kBytes, true>(work, stream) : launch_norm<kBytes, false>(work, stream);
}

int launch_work(Work work, Where stream) {
  if (work.plan.batch == 0 || work.plan.elements() == 0) return cudaSuccess;
  if (!work.plan.clamp) {
    work.plan.low = -INFINITY;
    work.plan.high = INFINITY;
  }
  const bool four = work.plan.points_type == DType::kFloat32;
  work.wide = is_wide(work.plan, work.tensors, work.start_alone, four ? 4 : 8);
  return four ? launch_layout<4>(work, stream) : launch_layout<2>(work, stream);
}

}  // namespace

int pack_points(const PackPlan& plan, const PackTensors& tensors, Where stream) {
  return launch_work({plan, tensors, false, false}, stream);
}

int random_start(const PackPlan& plan, const PackTensors& tensors, Where stream) {
  Work work{plan, tensors, true, false};
  work.plan.adv = Adv::kStep;
  work.plan.triplets = 0;
  return launch_work(work, stream);
}

int probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, pack_ball<4, false>);
  cudaGetLastError();  // so that nobody else meets it
  return static_cast<int>(error);
}

const char* error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace elle_fast::cuda
