// Which instruction sets are compiled in, and which of them this machine has.
#include "kernels.h"

#define ELLE_DECLARE(isa)                                                                    \
  namespace isa {                                                                            \
  bool pack_points(const PackPlan&, const PackTensors&, int);                                \
  bool random_start(const PackPlan&, const PackTensors&, int);                               \
  void elle_loss(const LossPlan&, const LamRule&, const LossTensors&, const LamState&, int); \
  void elle_loss_backward(const LossPlan&, const GradTensors&, int);                         \
  const Kernels kernels{#isa, pack_points, random_start, elle_loss, elle_loss_backward};     \
  }

namespace elle_fast {

#if defined(ELLE_X86)
ELLE_DECLARE(avx512)
ELLE_DECLARE(avx2)
#endif
ELLE_DECLARE(baseline)

namespace {

const Kernels* const compiled[] = {
#if defined(ELLE_X86)
    &avx512::kernels,
    &avx2::kernels,
#endif
    &baseline::kernels,
};

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : compiled) names.emplace_back(kernels->isa);
  return names;
}

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

const Kernels* kernels_of(const std::string& isa) {
  for (const Kernels* kernels : compiled)
    if (isa == kernels->isa) return kernels;
  return nullptr;
}

}  // namespace elle_fast
