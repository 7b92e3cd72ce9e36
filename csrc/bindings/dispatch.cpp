// The rows of kernels that were compiled in, and which of them this machine has.
#include "dispatch.h"

#include "checks.h"

#define ELLE_ROW(row, ...)                                                                          \
  namespace row {                                                                                   \
  int pack_points(const PackPlan&, const PackTensors&, Where);                                      \
  int elle_loss(const LossPlan&, const LamRule&, const LossTensors&, const LamState&, Where);       \
  int elle_loss_backward(const LossPlan&, const GradTensors&, Where);                               \
  int update_lam(const void*, bool, const LamRule&, const LamState&, float*, Where);                \
  const Kernels kernels{#row, pack_points, elle_loss, elle_loss_backward, update_lam, __VA_ARGS__}; \
  }

namespace elle_fast {

#if defined(ELLE_X86)
ELLE_ROW(avx512, nullptr, nullptr)
ELLE_ROW(avx2, nullptr, nullptr)
#endif
ELLE_ROW(baseline, nullptr, nullptr)
#if defined(ELLE_CUDA)
namespace cuda {
int probe();
const char* error_name(int error);
}  // namespace cuda
ELLE_ROW(cuda, probe, error_name)
#endif

namespace {

const Kernels* const compiled[] = {
#if defined(ELLE_X86)
    &avx512::kernels,
    &avx2::kernels,
#endif
    &baseline::kernels,
};

const Kernels* chosen = nullptr;

bool machine_has(const std::string& isa) {
#if defined(ELLE_X86)
  // These ask the operating system too, whether it saves the wide registers.
  __builtin_cpu_init();
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  // F16C, which older compilers cannot ask for, came to every processor before AVX2.
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == "baseline";
}

}  // namespace

std::string compiled_isas(const char* between) {
  std::string names;
  for (const Kernels* kernels : compiled) names += (names.empty() ? "" : between) + std::string(kernels->name);
  return names;
}

std::vector<std::string> isas() {
  std::vector<std::string> usable;
  for (const Kernels* kernels : compiled)
    if (machine_has(kernels->name)) usable.emplace_back(kernels->name);
  return usable;
}

const Kernels& cpu_kernels() { return *chosen; }

void use_isa(const std::string& isa) {
  for (const Kernels* kernels : compiled) {
    if (isa != kernels->name) continue;
    if (!machine_has(isa)) refuse("isa", "an instruction set that this machine has", "'" + isa + "'");
    chosen = kernels;
    return;
  }
  refuse("isa", "one of " + compiled_isas(", "), "'" + isa + "'");
}

const Kernels* cuda_kernels() {
#if defined(ELLE_CUDA)
  return &cuda::kernels;
#else
  return nullptr;
#endif
}

const Kernels& kernels_for(const std::string& device, Where where) {
  const Kernels* cuda = cuda_kernels();
  if (device == "cuda" && cuda != nullptr) return *cuda;
  if (device != "cpu") refuse("device", cuda != nullptr ? "'cpu' or 'cuda'" : "'cpu'", "'" + device + "'");
  at_least("threads", where, 1);
  if (where >> 31 != 0) refuse("threads", "fewer than 2**31", std::to_string(where));
  return *chosen;
}

}  // namespace elle_fast
