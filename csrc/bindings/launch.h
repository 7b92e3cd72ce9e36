// Plans from Python's keywords, and what a call of their kernels comes to.
#pragma once

#include <pybind11/pybind11.h>

#include "checks.h"
#include "dispatch.h"

namespace elle_fast {

namespace py = pybind11;

template <class Field>
Field field_of(const char* name, const py::handle& value) {
  if constexpr (std::is_enum_v<Field>) {
    const int64_t code = field_of<int64_t>(name, value), count = static_cast<int64_t>(Field::kCount);
    if (code < 0 || code >= count) refuse(name, "a code in [0, " + std::to_string(count) + ")", std::to_string(code));
    return static_cast<Field>(code);
  } else {
    try {
      return value.cast<Field>();
    } catch (const py::cast_error&) {
      const char* kind = std::is_same_v<Field, int64_t> ? "an integer of 64 bits" : "a number";
      const std::string got = py::str(py::type::handle_of(value).attr("__name__"));
      throw py::type_error(std::string(name) + ": expected " + kind + ", got " + got);
    }
  }
}

// Fills the fields of plans from keywords of the same names: all of them, and no others.
template <class... Plans>
void fill(const py::kwargs& given, Plans&... plans) {
  py::dict left = given.attr("copy")();
  const auto field = [&](const char* name, auto& to) {
    if (!left.contains(name)) throw py::type_error(std::string(name) + ": missing from the plan");
    to = field_of<std::decay_t<decltype(to)>>(name, left.attr("pop")(name));
  };
  (plans.each_field(field), ...);
  if (!left.empty())
    throw py::type_error(py::str(left.begin()->first).cast<std::string>() + ": not a field of the plan");
}

inline void finished(const Kernels& kernels, int error) {
  if (error == 0) return;
  if (kernels.on_cpu()) throw std::bad_alloc();
  throw std::runtime_error(std::string("CUDA: ") + kernels.error_name(error));
}

// Without the GIL, which others may need: on CUDA for the queue of launches to move on.
template <class Launch>
void launched(const Kernels& kernels, const Launch& launch) {
  int error;
  {
    py::gil_scoped_release release;
    error = launch();
  }
  finished(kernels, error);
}

}  // namespace elle_fast
