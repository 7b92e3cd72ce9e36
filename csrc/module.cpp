// The Python module `_C`: plans, which check what they are given once, and the launches. It knows nothing of torch:
// tensors are addresses. Python validates, allocates, and keeps tensors alive; what is checked here only keeps a direct
// call with nonsense from crashing the process.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/elle_loss.h"
#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#if defined(ELLE_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace elle_fast {
namespace {

using Address = uintptr_t;

const Kernels* chosen = nullptr;

[[noreturn]] void refuse(const std::string& name, const std::string& expected, const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}

int64_t at_least(const char* name, int64_t value, int64_t low) {
  if (value < low) refuse(name, "an integer >= " + std::to_string(low), std::to_string(value));
  return value;
}

template <class Code>
Code code(const char* name, int value, int count) {
  if (value < 0 || value >= count) refuse(name, "a code in [0, " + std::to_string(count) + ")", std::to_string(value));
  return static_cast<Code>(value);
}

// Products of sizes are used as offsets.
int64_t product(const char* name, std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors)
    if (__builtin_mul_overflow(result, factor, &result))
      refuse(name, "sizes whose product fits 63 bits", "larger ones");
  return result;
}

template <class T>
T* pointer(const char* name, Address address, bool needed = true) {
  if (needed && address == 0) refuse(name, "the address of a tensor", "0");
  return reinterpret_cast<T*>(address);
}

void finished(bool done) {
  if (!done) throw std::bad_alloc();
}

int checked_threads(int threads) { return static_cast<int>(at_least("threads", threads, 1)); }

#if defined(ELLE_CUDA)
// Without the GIL, which others may need for the queue of launches to move on.
template <class Launch>
void launched(const Launch& launch) {
  int error;
  {
    py::gil_scoped_release release;
    error = launch();
  }
  if (error != 0) throw std::runtime_error(std::string("CUDA: ") + cuda::error_name(error));
}

void* stream_of(Address stream) { return reinterpret_cast<void*>(stream); }
#endif

// ---- pack_points and random_start

struct Pack {
  PackPlan plan;

  PackTensors tensors(Address x, Address given, Address alpha_in, Address seed, Address statistics, Address points,
                      Address alpha) const {
    const bool residuals = plan.triplets > 0;
    return {pointer<const void>("x", x),
            pointer<const void>("given", given, plan.first != First::kNone),
            pointer<const float>("alpha_in", alpha_in, residuals && plan.alpha == Alpha::kGiven),
            pointer<const int64_t>("seed", seed),
            pointer<const float>("statistics", statistics, plan.normalise),
            pointer<void>("points", points),
            pointer<float>("alpha", alpha, residuals)};
  }

  void pack_cpu(Address x, Address given, Address alpha_in, Address seed, Address statistics, Address points,
                Address alpha, int threads) const {
    const PackTensors all = tensors(x, given, alpha_in, seed, statistics, points, alpha);
    checked_threads(threads);
    py::gil_scoped_release release;
    want_large_pages(all.points, plan.rows() * plan.elements() * bytes_of(plan.points_type));
    finished(chosen->pack_points(plan, all, threads));
  }

  // The start is in x's own units, so it has no statistics; without a start the attack begins at x, wherever that is.
  PackPlan start_plan() const {
    PackPlan plain = plan;
    plain.normalise = false;
    plain.clamp = plan.clamp && plan.start;
    return plain;
  }

  PackTensors start_tensors(Address x, Address seed, Address start) const {
    return {pointer<const void>("x", x),   nullptr, nullptr, pointer<const int64_t>("seed", seed), nullptr,
            pointer<void>("start", start), nullptr};
  }

  void start_cpu(Address x, Address seed, Address start, int threads) const {
    const PackTensors all = start_tensors(x, seed, start);
    checked_threads(threads);
    py::gil_scoped_release release;
    finished(chosen->random_start(start_plan(), all, threads));
  }

#if defined(ELLE_CUDA)
  void pack_cuda(Address x, Address given, Address alpha_in, Address seed, Address statistics, Address points,
                 Address alpha, Address stream) const {
    const PackTensors all = tensors(x, given, alpha_in, seed, statistics, points, alpha);
    launched([&] { return cuda::pack_points(plan, all, stream_of(stream)); });
  }

  void start_cuda(Address x, Address seed, Address start, Address stream) const {
    const PackTensors all = start_tensors(x, seed, start);
    launched([&] { return cuda::random_start(start_plan(), all, stream_of(stream)); });
  }
#endif
};

Pack make_pack(int64_t batch, int64_t part, int64_t channels, int64_t plane, int64_t triplets, int64_t sample_offset,
               float eps, float step_size, float radius, bool clamp, float low, float high, int norm, int first,
               int points, int alpha, bool start, bool project, bool normalise, bool x_last, bool given_last,
               bool points_last, int x_type, int given_type, int points_type) {
  PackPlan plan;
  plan.batch = at_least("batch", batch, 1);
  plan.part = at_least("part", part, 1);
  if (part > batch) refuse("part", "at most batch = " + std::to_string(batch), std::to_string(part));
  plan.channels = at_least("channels", channels, 1);
  plan.plane = at_least("plane", plane, 1);
  plan.triplets = at_least("triplets", triplets, 0);
  // A triplet's number has 24 bits of a word of the counter, a sample's index 32.
  if (triplets >> 24 != 0) refuse("triplets", "fewer than 2**24", std::to_string(triplets));
  plan.sample_offset = at_least("sample_offset", sample_offset, 0);
  if (sample_offset >> 32 != 0 || batch >> 32 != 0 || (sample_offset + batch - 1) >> 32 != 0)
    refuse("sample_offset", "indices of samples below 2**32", std::to_string(sample_offset));
  plan.eps = eps;
  plan.step_size = step_size;
  plan.radius = radius;
  plan.clamp = clamp;
  plan.low = low;
  plan.high = high;
  plan.norm = code<Norm>("norm", norm, 2);
  plan.first = code<First>("first", first, 3);
  plan.points = code<Points>("points", points, 3);
  plan.alpha = code<Alpha>("alpha", alpha, 3);
  if (plan.points == Points::kElle2p && plan.first == First::kNone && triplets > 0)
    refuse("first", "a step or given points with ELLE-2p, whose x_b they are", "none");
  plan.start = start;
  plan.project = project;
  plan.normalise = normalise;
  plan.x_last = x_last;
  plan.given_last = given_last;
  plan.points_last = points_last;
  plan.x_type = code<DType>("x_type", x_type, 3);
  plan.given_type = code<DType>("given_type", given_type, 3);
  plan.points_type = code<DType>("points_type", points_type, 3);
  const int64_t rows = product("triplets", {blocks_of(plan.points), triplets, part}) + batch;
  product("batch", {rows, channels, plane, 8});
  return {plan};
}

// ---- elle_loss

struct Loss {
  LossPlan plan;
  LamRule rule;
  bool adaptive;

  LamState state(Address lam, Address count, Address skipped, Address mean, Address spread) const {
    if (!adaptive) return {nullptr, nullptr, nullptr, nullptr, nullptr};
    return {pointer<float>("lam_state", lam), pointer<int64_t>("count", count), pointer<int64_t>("skipped", skipped),
            pointer<double>("mean", mean, rule.window == 0), pointer<double>("spread", spread)};
  }

  LossTensors tensors(Address logits, Address target, Address alpha, Address saved, Address lam, float lam_value,
                      Address loss, Address ce, Address e_lin) const {
    return {pointer<const void>("logits", logits),
            pointer<const void>("target", target),
            pointer<const float>("alpha", alpha),
            pointer<float>("saved", saved),
            pointer<const float>("lam", lam, false),
            lam_value,
            pointer<float>("loss", loss),
            pointer<float>("ce", ce),
            pointer<float>("e_lin", e_lin)};
  }

  GradTensors grad_tensors(Address logits, Address target, Address alpha, Address saved, Address grad_loss,
                           Address grad_ce, Address grad_e_lin, Address grad) const {
    return {pointer<const void>("logits", logits),
            pointer<const void>("target", target),
            pointer<const float>("alpha", alpha),
            pointer<const float>("saved", saved),
            pointer<const float>("grad_loss", grad_loss, false),
            pointer<const float>("grad_ce", grad_ce, false),
            pointer<const float>("grad_e_lin", grad_e_lin, false),
            pointer<void>("grad", grad)};
  }

  // As the reference does on the CPU, where nothing has to be waited for. ELLE-A's state is not touched then.
  void check_labels(Address target) const {
    if (plan.target_stride >= 0) return;
    const int64_t* labels = reinterpret_cast<const int64_t*>(target);
    const int64_t samples = plan.of_logits || plan.first > plan.part ? plan.first : plan.part;
    for (int64_t i = 0; i < samples; ++i)
      if (labels[i] < 0 || labels[i] >= plan.classes)
        refuse("target", "class indices in [0, " + std::to_string(plan.classes) + ")", std::to_string(labels[i]));
  }

  void forward_cpu(Address logits, Address target, Address alpha, Address saved, Address lam, float lam_value,
                   Address lam_state, Address count, Address skipped, Address mean, Address spread, Address loss,
                   Address ce, Address e_lin, int threads) const {
    const LossTensors all = tensors(logits, target, alpha, saved, lam, lam_value, loss, ce, e_lin);
    const LamState kept = state(lam_state, count, skipped, mean, spread);
    checked_threads(threads);
    check_labels(target);
    py::gil_scoped_release release;
    chosen->elle_loss(plan, rule, all, kept, threads);
  }

  void backward_cpu(Address logits, Address target, Address alpha, Address saved, Address grad_loss, Address grad_ce,
                    Address grad_e_lin, Address grad, int threads) const {
    const GradTensors all = grad_tensors(logits, target, alpha, saved, grad_loss, grad_ce, grad_e_lin, grad);
    checked_threads(threads);
    py::gil_scoped_release release;
    chosen->elle_loss_backward(plan, all, threads);
  }

#if defined(ELLE_CUDA)
  void forward_cuda(Address logits, Address target, Address alpha, Address saved, Address lam, float lam_value,
                    Address lam_state, Address count, Address skipped, Address mean, Address spread, Address loss,
                    Address ce, Address e_lin, Address stream) const {
    const LossTensors all = tensors(logits, target, alpha, saved, lam, lam_value, loss, ce, e_lin);
    const LamState kept = state(lam_state, count, skipped, mean, spread);
    launched([&] { return cuda::elle_loss(plan, rule, all, kept, stream_of(stream)); });
  }

  void backward_cuda(Address logits, Address target, Address alpha, Address saved, Address grad_loss, Address grad_ce,
                     Address grad_e_lin, Address grad, Address stream) const {
    const GradTensors all = grad_tensors(logits, target, alpha, saved, grad_loss, grad_ce, grad_e_lin, grad);
    launched([&] { return cuda::elle_loss_backward(plan, all, stream_of(stream)); });
  }
#endif
};

LamRule make_rule(float lam_max, float gamma, double sensitivity, int64_t min_history, int64_t window) {
  return {lam_max, gamma, sensitivity, at_least("min_history", min_history, 0), at_least("window", window, 0)};
}

Loss make_loss(int64_t losses, int64_t residuals, int64_t first, int64_t part, int64_t triplets, int64_t classes,
               int64_t stride, int64_t target_stride, float label_smoothing, int points, int penalty, bool of_logits,
               int type, bool adaptive, float lam_max, float gamma, double sensitivity, int64_t min_history,
               int64_t window) {
  LossPlan plan;
  plan.losses = at_least("losses", losses, 0);
  plan.residuals = at_least("residuals", residuals, 1);
  plan.first = at_least("first", first, 0);
  plan.part = at_least("part", part, 1);
  plan.triplets = at_least("triplets", triplets, 1);
  plan.classes = at_least("classes", classes, 1);
  plan.stride = at_least("stride", stride, 0);
  plan.target_stride = at_least("target_stride", target_stride, -1);
  plan.label_smoothing = label_smoothing;
  plan.points = code<Points>("points", points, 3);
  plan.penalty = code<Penalty>("penalty", penalty, 3);
  plan.of_logits = of_logits;
  plan.type = code<DType>("type", type, 3);
  if (product("residuals", {triplets, part}) != residuals)
    refuse("residuals", "triplets * part", std::to_string(residuals));
  int64_t rows = product("residuals", {blocks_of(plan.points), residuals});
  if (__builtin_add_overflow(rows, first, &rows)) refuse("first", "a number of rows that fits 63 bits", "more");
  if (losses != (of_logits ? first : rows))
    refuse("losses", std::to_string(of_logits ? first : rows), std::to_string(losses));
  if (plan.points == Points::kElle2p && first < part)
    refuse("first", "at least part with ELLE-2p, whose x_b are the first rows", std::to_string(first));
  product("classes", {rows, classes, 8});
  product("stride", {rows, stride, 8});
  if (target_stride > 0) product("target_stride", {first > part ? first : part, target_stride, 8});
  return {plan, make_rule(lam_max, gamma, sensitivity, min_history, window), adaptive};
}

// The state of ELLE-A alone.
struct Lam {
  LamRule rule;

  LamState state(Address lam, Address count, Address skipped, Address mean, Address spread) const {
    return {pointer<float>("lam", lam), pointer<int64_t>("count", count), pointer<int64_t>("skipped", skipped),
            pointer<double>("mean", mean, rule.window == 0), pointer<double>("spread", spread)};
  }

  void update_cpu(Address e_lin, bool is_double, Address lam, Address count, Address skipped, Address mean,
                  Address spread, Address used) const {
    const LamState kept = state(lam, count, skipped, mean, spread);
    float* to = pointer<float>("used", used);
    const void* from = pointer<const void>("e_lin", e_lin);
    *to = next_lam(is_double ? *static_cast<const double*>(from) : *static_cast<const float*>(from), rule, kept);
  }

#if defined(ELLE_CUDA)
  void update_cuda(Address e_lin, bool is_double, Address lam, Address count, Address skipped, Address mean,
                   Address spread, Address used, Address stream) const {
    const LamState kept = state(lam, count, skipped, mean, spread);
    float* to = pointer<float>("used", used);
    const void* from = pointer<const void>("e_lin", e_lin);
    launched([&] { return cuda::update_lam(from, is_double, rule, kept, to, stream_of(stream)); });
  }
#endif
};

// ---- The module

void use_isa(const std::string& isa) {
  std::string names;
  for (const std::string& name : compiled_isas()) names += (names.empty() ? "" : ", ") + name;
  const Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) refuse("isa", "one of " + names, "'" + isa + "'");
  if (!machine_has(isa)) refuse("isa", "an instruction set that this machine has", "'" + isa + "'");
  chosen = kernels;
}

std::vector<std::string> isas() {
  std::vector<std::string> usable;
  for (const std::string& isa : compiled_isas())
    if (machine_has(isa)) usable.push_back(isa);
  return usable;
}

std::map<std::string, std::string> facts() {
  std::map<std::string, std::string> found;
  found["compiler"] =
#if defined(__clang__)
      "Clang " __clang_version__;
#elif defined(__GNUC__)
      "GCC " __VERSION__;
#else
      "unknown";
#endif
  std::string names;
  for (const std::string& name : compiled_isas()) names += (names.empty() ? "" : " ") + name;
  found["isas"] = names;
#if defined(ELLE_CUDA)
  found["cuda"] = ELLE_CUDA_ARCHITECTURES;
#endif
  return found;
}

}  // namespace
}  // namespace elle_fast

PYBIND11_MODULE(_C, m) {
  using namespace elle_fast;
  using py::arg;

  m.doc() = "The compiled kernels of elle_fast. Not a public interface: arguments are addresses.";
  m.attr("version") = ELLE_VERSION;
  use_isa(isas().front());
  prepare_for_fork();
  m.def("forked", forked, "To be called in a child of fork that was there before this module.");

  m.def("isas", isas, "Instruction sets compiled in that this machine has, the widest first.");
  m.def("isa", [] { return chosen->isa; }, "The instruction set in use.");
  m.def("use_isa", use_isa, arg("isa"), "Use the kernels for this instruction set.");
  m.def("facts", facts, "Compiler, instruction sets and CUDA architectures, as text.");
  m.def("cuda_built", [] {
#if defined(ELLE_CUDA)
    return true;
#else
    return false;
#endif
  });
#if defined(ELLE_CUDA)
  m.def(
      "cuda_probe",
      [] {
        const int error = cuda::probe();
        return error == 0 ? std::string() : std::string(cuda::error_name(error));
      },
      "Why the current device cannot run the kernels; empty if it can.");
#endif

  py::class_<Pack>(m, "Pack")
      .def(py::init(&make_pack), py::kw_only(), arg("batch"), arg("part"), arg("channels"), arg("plane"),
           arg("triplets"), arg("sample_offset"), arg("eps"), arg("step_size"), arg("radius"), arg("clamp"), arg("low"),
           arg("high"), arg("norm"), arg("first"), arg("points"), arg("alpha"), arg("start"), arg("project"),
           arg("normalise"), arg("x_last"), arg("given_last"), arg("points_last"), arg("x_type"), arg("given_type"),
           arg("points_type"))
#if defined(ELLE_CUDA)
      .def("pack_cuda", &Pack::pack_cuda)
      .def("start_cuda", &Pack::start_cuda)
#endif
      .def("pack_cpu", &Pack::pack_cpu)
      .def("start_cpu", &Pack::start_cpu);

  py::class_<Loss>(m, "Loss")
      .def(py::init(&make_loss), py::kw_only(), arg("losses"), arg("residuals"), arg("first"), arg("part"),
           arg("triplets"), arg("classes"), arg("stride"), arg("target_stride"), arg("label_smoothing"), arg("points"),
           arg("penalty"), arg("of_logits"), arg("type"), arg("adaptive"), arg("lam_max"), arg("gamma"),
           arg("sensitivity"), arg("min_history"), arg("window"))
#if defined(ELLE_CUDA)
      .def("forward_cuda", &Loss::forward_cuda)
      .def("backward_cuda", &Loss::backward_cuda)
#endif
      .def("forward_cpu", &Loss::forward_cpu)
      .def("backward_cpu", &Loss::backward_cpu);

  py::class_<Lam>(m, "Lam")
      .def(py::init([](float lam_max, float gamma, double sensitivity, int64_t min_history, int64_t window) {
             return Lam{make_rule(lam_max, gamma, sensitivity, min_history, window)};
           }),
           py::kw_only(), arg("lam_max"), arg("gamma"), arg("sensitivity"), arg("min_history"), arg("window"))
#if defined(ELLE_CUDA)
      .def("update_cuda", &Lam::update_cuda)
#endif
      .def("update_cpu", &Lam::update_cpu);
}
