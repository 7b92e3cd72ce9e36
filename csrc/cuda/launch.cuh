// Launching a kernel, and sums over a block in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include "../common/kernels.h"

namespace elle_fast::cuda {

constexpr int kWarp = 32;

// As a function, not as <<<>>>: the kernels also compile as plain C++, for the tests that run them without a GPU
// (tests/cuda_emulation).
template <class... Parameters, class... Arguments>
inline int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Where stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  // Also clears it, so that the next call does not report it again.
  const cudaError_t last = cudaGetLastError();
  return static_cast<int>(error == cudaSuccess ? last : error);
}

// The sum over a warp, in all of its lanes, in the same order each time.
inline __device__ float warp_sum(float value) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

// The sums over a one-dimensional block of whole warps, in all of its threads. All threads have to come here.
template <int kCount>
inline __device__ void block_sum(float (&values)[kCount]) {
  __shared__ float partial[kCount][kWarp];
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  ELLE_EACH(i, kCount) {
    values[i] = warp_sum(values[i]);
    if (threadIdx.x % kWarp == 0) partial[i][warp] = values[i];
  }
  __syncthreads();
  ELLE_EACH(i, kCount) {
    values[i] = 0.0f;
    for (int other = 0; other < warps; ++other) values[i] += partial[i][other];
  }
  __syncthreads();  // before the next sum overwrites these
}

}  // namespace elle_fast::cuda
