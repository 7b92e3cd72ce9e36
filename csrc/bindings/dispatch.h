// Which kernels run a call.
#pragma once

#include <string>
#include <vector>

#include "../common/kernels.h"

namespace elle_fast {

// The instruction sets compiled in that this machine has, the widest first; and all that are compiled in, as text.
std::vector<std::string> isas();
std::string compiled_isas(const char* between);

// The CPU's kernels in use.
const Kernels& cpu_kernels();
void use_isa(const std::string& isa);

// Null if CUDA was not built.
const Kernels* cuda_kernels();

// The kernels for a device, "cpu" or "cuda"; `where` is checked.
const Kernels& kernels_for(const std::string& device, Where where);

}  // namespace elle_fast
