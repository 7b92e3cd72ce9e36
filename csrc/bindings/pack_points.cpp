// Plans of pack_points and of random_start, and their launch.
#include "launch.h"

namespace elle_fast {
namespace {

struct Pack {
  PackPlan plan;

  explicit Pack(const py::kwargs& given) {
    fill(given, plan);
    at_least("batch", plan.batch, 1);
    at_least("part", plan.part, 1);
    if (plan.part > plan.batch)
      refuse("part", "at most batch = " + std::to_string(plan.batch), std::to_string(plan.part));
    at_least("channels", plan.channels, 1);
    at_least("plane", plan.plane, 1);
    at_least("triplets", plan.triplets, 0);
    // A triplet's number has 24 bits of a word of the counter, a sample's index 32.
    if (plan.triplets >> 24 != 0) refuse("triplets", "fewer than 2**24", std::to_string(plan.triplets));
    at_least("sample_offset", plan.sample_offset, 0);
    if (plan.sample_offset >> 32 != 0 || plan.batch >> 32 != 0 || (plan.sample_offset + plan.batch - 1) >> 32 != 0)
      refuse("sample_offset", "indices of samples below 2**32", std::to_string(plan.sample_offset));
    if (plan.points == Points::kElle2p && plan.adv == Adv::kNone && plan.triplets > 0)
      refuse("adv", "a step or given points with ELLE-2p, whose x_b they are", "none");
    const int64_t rows = product("triplets", {blocks_of(plan.points), plan.triplets, plan.part}) + plan.batch;
    product("batch", {rows, plan.channels, plan.plane, 8});
  }

  void pack(const std::string& device, Address x, Address given, Address alpha_in, Address seed, Address statistics,
            Address points, Address alpha, Where where) const {
    const bool residuals = plan.triplets > 0;
    const PackTensors tensors{pointer<const void>("x", x),
                              pointer<const void>("given", given, plan.adv == Adv::kStep || plan.adv == Adv::kGiven),
                              pointer<const float>("alpha_in", alpha_in, residuals && plan.alpha == Alpha::kGiven),
                              pointer<const int64_t>("seed", seed),
                              pointer<const float>("statistics", statistics, plan.normalize),
                              pointer<void>("points", points),
                              pointer<float>("alpha", alpha, residuals)};
    const Kernels& kernels = kernels_for(device, where);
    launched(kernels, [&] { return kernels.pack_points(plan, tensors, where); });
  }
};

}  // namespace

void bind_pack_points(py::module_& m) {
  py::class_<Pack>(m, "Pack").def(py::init<const py::kwargs&>()).def("pack", &Pack::pack);
}

}  // namespace elle_fast
