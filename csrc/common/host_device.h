// What a function needs to be usable in a kernel for the GPU and in a loop for the CPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ELLE_INLINE __host__ __device__ __forceinline__
#define ELLE_UNROLL _Pragma("unroll")
#else
// Always: the CPU's files are compiled once for each instruction set, and a function that is not inlined would be one
// for all of them, whichever the linker happens to keep.
#define ELLE_INLINE inline __attribute__((always_inline))
#define ELLE_UNROLL
#endif

// A loop over a few things that the GPU keeps in registers.
#define ELLE_EACH(i, count) ELLE_UNROLL for (int i = 0; i < (count); ++i)
