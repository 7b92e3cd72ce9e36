// What the bindings check: only what keeps a direct call with nonsense from crashing the process. Python validates,
// allocates, and keeps tensors alive, which are addresses here.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace elle_fast {

using Address = uintptr_t;

// A ValueError in Python.
[[noreturn]] inline void refuse(const std::string& name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + got);
}

inline void at_least(const char* name, int64_t value, int64_t low) {
  if (value < low) refuse(name, "an integer >= " + std::to_string(low), std::to_string(value));
}

// Products of sizes are used as offsets.
inline int64_t product(const char* name, std::initializer_list<int64_t> factors) {
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

}  // namespace elle_fast
