// exp and log of vectors, for sums of exponentials. No libm: it has no vectors of every width, and its functions are
// not the same on every machine.
#pragma once

#include "convert.h"

namespace elle_fast::ELLE_ISA {

constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf("");

// ln 2 in two parts; products of the first with whole numbers below 2^9 are exact.
constexpr float kLn2 = 0x1.63p-1f, kLn2Rest = -0x1.bd0106p-13f;

// e^x for x <= 0 or NaN, within 1 unit in the last place; 0 below the smallest normal number.
// x = n ln 2 + r with |r| <= ln 2 / 2; the polynomial is the best of its degree for the relative error, 3e-9.
static ELLE_INLINE Floats exp_of(Floats x) {
  // Adding 3 * 2^22 rounds to whole numbers, whose bits are then the last ones of the sum.
  const Floats shifted = multiply_add(x, all(0x1.715476p+0f), all(0x1.8p+23f));
  const Floats n = shifted - 0x1.8p+23f;
  const Floats r = multiply_add(n, all(-kLn2Rest), multiply_add(n, all(-kLn2), x));
  Floats p = multiply_add(all(0.0013814467f), r, all(0.0083687808f));
  p = multiply_add(p, r, all(0.0416683927f));
  p = multiply_add(p, r, all(0.1666651964f));
  p = multiply_add(p, r, all(0.4999999404f));
  p = multiply_add(p * r, r, r) + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ), (__m512)p,
                                        (__m512)n);
#else
  const Floats scale = as<Floats>((as<Narrow>(shifted) << 23) + 0x3F800000u);
  return x < -87.3f ? Floats{} : p * scale;
#endif
}

// ln x for finite x >= 1, 0 or NaN: x = 2^e m with m in [1/sqrt 2, sqrt 2), and ln m = 2 artanh((m - 1) / (m + 1)).
static ELLE_INLINE Floats log_of(Floats x) {
  const Narrow shifted = as<Narrow>(x) - 0x3F3504F3u;  // the bits of 1/sqrt 2
  const Signed e = as<Signed>(shifted) >> 23;
  const Floats m = as<Floats>((shifted & 0x7FFFFFu) + 0x3F3504F3u);
  const Floats whole = __builtin_convertvector(e, Floats);
  const Floats s = (m - 1.0f) / (m + 1.0f), square = s * s;
  Floats p = square * (2.0f / 9.0f) + 2.0f / 7.0f;
  p = p * square + 2.0f / 5.0f;
  p = p * square + 2.0f / 3.0f;
  const Floats log_m = 2.0f * s + s * square * p;
  return x >= 1.0f ? whole * kLn2 + (log_m + whole * kLn2Rest) : x - kInfinity;
}

// A number of all lanes, by taking two together at a time.
template <class Together>
static ELLE_INLINE float over_lanes(Floats lanes, const Together& together) {
  float numbers[kSpan];
  std::memcpy(numbers, &lanes, sizeof lanes);
  for (int half = kSpan / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) numbers[i] = together(numbers[i], numbers[i + half]);
  return numbers[0];
}

static ELLE_INLINE float sum_of(Floats lanes) {
  return over_lanes(lanes, [](float a, float b) { return a + b; });
}

static ELLE_INLINE float largest_of(Floats lanes) {
  return over_lanes(lanes, [](float a, float b) { return a > b ? a : b; });
}

}  // namespace elle_fast::ELLE_ISA
