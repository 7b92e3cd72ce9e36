// The CUDA kernels' launchers. Each launches on a stream and returns at once: 0, or the cudaError_t of the launch.
// Pointers are to the current device's memory.
#pragma once

#include "../common/plans.h"

namespace elle_fast {
namespace cuda {

int pack_points(const PackPlan&, const PackTensors&, void* stream);
// x -> points, of points_type and in points' layout: the attack's start alone.
int random_start(const PackPlan&, const PackTensors&, void* stream);
int elle_loss(const LossPlan&, const LamRule&, const LossTensors&, const LamState&, void* stream);
int elle_loss_backward(const LossPlan&, const GradTensors&, void* stream);
// Takes in E_lin, a float or a double, and copies the new lam to used_lam.
int update_lam(const void* e_lin, bool is_double, const LamRule&, const LamState&, float* used_lam, void* stream);

// Whether the current device can run the kernels: 0, or the error that a launch would give.
int probe();
const char* error_name(int error);

}  // namespace cuda
}  // namespace elle_fast
