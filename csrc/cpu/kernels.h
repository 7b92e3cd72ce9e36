// The CPU's kernels. pack_points.cpp and elle_loss.cpp are compiled once for each instruction set, with ELLE_ISA its
// name, which is also the namespace of everything in them: nothing is shared that the linker could mix up.
#pragma once

#include <string>
#include <vector>

#include "../common/plans.h"

namespace elle_fast {

// What one instruction set has. A call of pack_points that returns false ran out of memory.
struct Kernels {
  const char* isa;
  bool (*pack_points)(const PackPlan&, const PackTensors&, int threads);
  bool (*random_start)(const PackPlan&, const PackTensors&, int threads);
  void (*elle_loss)(const LossPlan&, const LamRule&, const LossTensors&, const LamState&, int threads);
  void (*elle_loss_backward)(const LossPlan&, const GradTensors&, int threads);
};

// The instruction sets compiled in, the widest first; whether this machine has one; and its kernels, null for another
// name.
std::vector<std::string> compiled_isas();
bool machine_has(const std::string& isa);
const Kernels* kernels_of(const std::string& isa);

}  // namespace elle_fast
