// As much of CUDA as the kernels in csrc/cuda use, for a CPU: their files compile as plain C++ with this folder on the
// include path, and what the kernels compute is tested without a GPU, as Triton's are in its interpreter.
//
//     g++ -std=c++17 -O2 -ffp-contract=off -I tests/cuda_emulation -x c++ csrc/cuda/pack_points.cu
//
// Blocks run one after the other. A block's threads are fibers that take turns where they wait for each other; all that
// waits is a barrier here, shuffles included. A barrier that not all threads come to ends the process with a message.
// What it cannot show: races between barriers, registers and time; alignment only with -fsanitize=alignment.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks do not overlap, so one for all of them will do
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "wrong sizes"; }
inline const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_emulation {

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kWarp = 32;

inline std::mutex mutex;  // launches from several threads take turns
inline std::vector<Fiber> fibers;
inline unsigned current;  // the fiber that runs
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool progress;  // since the last round began
inline Barrier block_barrier, warp_barriers[kWarp];
inline uint64_t slots[1024];  // what shuffles hand over

inline unsigned threads() { return blockDim.x * blockDim.y * blockDim.z; }

inline void stop(const char* why) {
  std::fprintf(stderr, "cuda_emulation: %s\n", why);
  std::abort();
}

inline void select(unsigned i) {
  current = i;
  threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
}

inline void run_fiber() {
  body();
  fibers[current].done = progress = true;
}

inline void wait(Barrier& barrier, unsigned count) {
  const unsigned generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
}

inline void wait_for_warp() {
  const unsigned warp = current / kWarp, rest = threads() - warp * kWarp;
  wait(warp_barriers[warp], rest < kWarp ? rest : kWarp);
}

inline void run_block() {
  block_barrier = Barrier();
  for (Barrier& barrier : warp_barriers) barrier = Barrier();
  for (unsigned i = 0; i < threads(); ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool all_done = false; !all_done;) {
    all_done = true;
    progress = false;
    for (unsigned i = 0; i < threads(); ++i) {
      if (fibers[i].done) continue;
      select(i);
      swapcontext(&scheduler, &fibers[i].context);
      all_done = all_done && fibers[i].done;
    }
    if (!all_done && !progress) {
      stop("a barrier that not all threads of a block or warp come to");
    }
  }
}

inline void run(dim3 grid, dim3 block, std::function<void()> thread) {
  const std::lock_guard<std::mutex> guard(mutex);
  gridDim = grid;
  blockDim = block;
  body = std::move(thread);
  if (fibers.size() < threads()) fibers.resize(threads());
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block();
      }
}

// What another lane of the warp has.
template <class T>
T exchanged(T value, unsigned from) {
  static_assert(sizeof(T) <= 8, "");
  std::memcpy(&slots[current], &value, sizeof value);
  wait_for_warp();
  std::memcpy(&value, &slots[current / kWarp * kWarp + from % kWarp], sizeof value);
  wait_for_warp();
  return value;
}

inline unsigned lane() { return current % kWarp; }

}  // namespace cuda_emulation

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  // The limits of the hardware.
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535u ||
      grid.z == 0 || grid.z > 65535u)
    return cudaErrorInvalidConfiguration;
  cuda_emulation::run(grid, block, [=] { kernel(arguments...); });
  return cudaSuccess;
}

inline void __syncthreads() { cuda_emulation::wait(cuda_emulation::block_barrier, cuda_emulation::threads()); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_emulation::wait_for_warp(); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return cuda_emulation::exchanged(value, cuda_emulation::lane() ^ static_cast<unsigned>(lanes));
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned lanes) {
  const unsigned from = cuda_emulation::lane() + lanes;
  return cuda_emulation::exchanged(value, from < cuda_emulation::kWarp ? from : cuda_emulation::lane());
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return cuda_emulation::exchanged(value, static_cast<unsigned>(from));
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
