// float16 as nvcc's header has it: conversions, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31u, mantissa = value.bits & 0x3ffu;
  float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                  : std::ldexp(static_cast<float>(mantissa | 0x400u), static_cast<int>(exponent) - 25);
  if (exponent == 31) magnitude = mantissa == 0 ? INFINITY : NAN;
  return sign != 0 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000u : 0u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {0x7fffu};
  if (magnitude == 0.0f) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // Multiples of the unit of the last place, of subnormals at the least; a carry goes into the exponent by itself.
  const int unit = exponent > -13 ? exponent - 11 : -24;
  const uint32_t multiples = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  const uint32_t lifted = multiples + (static_cast<uint32_t>(unit + 24) << 10);
  return {static_cast<uint16_t>(sign | lifted)};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
