// Plans of elle_loss, its gradient and the update of lam, and their launches.
#include "../common/elle_loss.h"

#include "launch.h"

namespace elle_fast {
namespace {

void check_rule(const LamRule& rule, int64_t least_window) {
  at_least("min_history", rule.min_history, 0);
  at_least("window", rule.window, least_window);
  if (rule.relative() && rule.window > 0)
    refuse("window", "none beside a rate, as relative E_lin has no history", std::to_string(rule.window));
}

LamState state_of(const LamRule& rule, Address lam, Address count, Address skipped, Address mean, Address spread) {
  if (rule.window < 0) return {};
  return {pointer<float>("lam_state", lam), pointer<int64_t>("count", count), pointer<int64_t>("skipped", skipped),
          pointer<double>("mean", mean, rule.window == 0), pointer<double>("spread", spread, !rule.relative())};
}

struct Loss {
  LossPlan plan;
  LamRule rule;

  explicit Loss(const py::kwargs& given) {
    fill(given, plan, rule);
    check_rule(rule, -1);
    at_least("losses", plan.losses, 0);
    at_least("residuals", plan.residuals, 1);
    at_least("adv_rows", plan.adv_rows, 0);
    at_least("part", plan.part, 1);
    at_least("triplets", plan.triplets, 1);
    at_least("classes", plan.classes, 1);
    at_least("stride", plan.stride, 0);
    at_least("target_stride", plan.target_stride, -1);
    if (product("residuals", {plan.triplets, plan.part}) != plan.residuals)
      refuse("residuals", "triplets * part", std::to_string(plan.residuals));
    int64_t rows = product("residuals", {blocks_of(plan.points), plan.residuals});
    if (__builtin_add_overflow(rows, plan.adv_rows, &rows))
      refuse("adv_rows", "a number of rows that fits 63 bits", "more");
    const int64_t losses = plan.of_logits ? plan.adv_rows : rows;
    if (plan.losses != losses) refuse("losses", std::to_string(losses), std::to_string(plan.losses));
    if (plan.points == Points::kElle2p && plan.adv_rows < plan.part)
      refuse("adv_rows", "at least part with ELLE-2p, whose x_b they are", std::to_string(plan.adv_rows));
    product("classes", {rows, plan.classes, 8});
    product("stride", {rows, plan.stride, 8});
    if (plan.target_stride > 0) product("target_stride", {plan.samples(), plan.target_stride, 8});
  }

  // As the reference does on the CPU, where nothing has to be waited for. ELLE-A's state is not touched then.
  void check_labels(const void* target) const {
    if (plan.target_stride >= 0) return;
    const int64_t* labels = static_cast<const int64_t*>(target);
    const int64_t samples = plan.of_logits ? plan.adv_rows : plan.samples();
    for (int64_t i = 0; i < samples; ++i)
      if (labels[i] < 0 || labels[i] >= plan.classes)
        refuse("target", "class indices in [0, " + std::to_string(plan.classes) + ")", std::to_string(labels[i]));
  }

  void forward(const std::string& device, Address logits, Address target, Address alpha, Address saved, Address lam,
               float lam_value, Address lam_state, Address count, Address skipped, Address mean, Address spread,
               Address loss, Address ce, Address e_lin, Where where) const {
    const LossTensors tensors{pointer<const void>("logits", logits),
                              pointer<const void>("target", target),
                              pointer<const float>("alpha", alpha),
                              pointer<float>("saved", saved),
                              pointer<const float>("lam", lam, false),
                              lam_value,
                              pointer<float>("loss", loss),
                              pointer<float>("ce", ce),
                              pointer<float>("e_lin", e_lin)};
    const LamState state = state_of(rule, lam_state, count, skipped, mean, spread);
    const Kernels& kernels = kernels_for(device, where);
    if (kernels.on_cpu()) check_labels(tensors.target);
    launched(kernels, [&] { return kernels.elle_loss(plan, rule, tensors, state, where); });
  }

  void backward(const std::string& device, Address logits, Address target, Address alpha, Address saved,
                Address grad_loss, Address grad_ce, Address grad_e_lin, Address grad, Where where) const {
    const GradTensors tensors{pointer<const void>("logits", logits),
                              pointer<const void>("target", target),
                              pointer<const float>("alpha", alpha),
                              pointer<const float>("saved", saved),
                              pointer<const float>("grad_loss", grad_loss, false),
                              pointer<const float>("grad_ce", grad_ce, false),
                              pointer<const float>("grad_e_lin", grad_e_lin, false),
                              pointer<void>("grad", grad)};
    const Kernels& kernels = kernels_for(device, where);
    launched(kernels, [&] { return kernels.elle_loss_backward(plan, tensors, where); });
  }
};

// The state of ELLE-A alone.
struct Lam {
  LamRule rule;

  explicit Lam(const py::kwargs& given) {
    fill(given, rule);
    check_rule(rule, 0);
  }

  void update(const std::string& device, Address value, bool is_double, Address lam, Address count, Address skipped,
              Address mean, Address spread, Address used, Where where) const {
    const LamState state = state_of(rule, lam, count, skipped, mean, spread);
    float* to = pointer<float>("used", used);
    const void* from = pointer<const void>("value", value);
    const Kernels& kernels = kernels_for(device, where);
    const auto update = [&] { return kernels.update_lam(from, is_double, rule, state, to, where); };
    // On the CPU it takes less time than letting go of the GIL and taking it again.
    if (kernels.on_cpu()) return finished(kernels, update());
    launched(kernels, update);
  }
};

}  // namespace

void bind_elle_loss(py::module_& m) {
  py::class_<Loss>(m, "Loss")
      .def(py::init<const py::kwargs&>())
      .def("forward", &Loss::forward)
      .def("backward", &Loss::backward);
  py::class_<Lam>(m, "Lam").def(py::init<const py::kwargs&>()).def("update", &Lam::update);
}

}  // namespace elle_fast
