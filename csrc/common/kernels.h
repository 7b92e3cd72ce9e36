// The kernels: a row for each instruction set of the CPU, and one for CUDA.
//
// csrc/cpu/<op>.cpp is compiled once for each instruction set, with ELLE_ISA its name, which is also the namespace of
// everything in it: nothing is shared that the linker could mix up.
#pragma once

#include "plans.h"

namespace elle_fast {

using Where = int64_t;  // the number of threads on the CPU, or the handle of a CUDA stream

// A kernel returns 0, or what went wrong: on the CPU a lack of memory, on CUDA the cudaError_t of the launch, which
// does not wait for the kernel. Pointers are to the memory of the CPU, or of the current device.
struct Kernels {
  const char* name;  // of the instruction set; or "cuda"
  int (*pack_points)(const PackPlan&, const PackTensors&, Where);
  int (*elle_loss)(const LossPlan&, const LamRule&, const LossTensors&, const LamState&, Where);
  int (*elle_loss_backward)(const LossPlan&, const GradTensors&, Where);
  // Takes in what the rule looks at, a float or a double, and copies the new lam to used_lam.
  int (*update_lam)(const void* value, bool is_double, const LamRule&, const LamState&, float* used_lam, Where);
  // Null on the CPU. Whether the current device can run the kernels: 0, or the error that a launch would give.
  int (*probe)();
  const char* (*error_name)(int error);

  bool on_cpu() const { return probe == nullptr; }
};

}  // namespace elle_fast
