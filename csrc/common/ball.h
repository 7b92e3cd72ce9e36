// pack_points in the l2 ball: normal noise from words, lengths of samples, one element. No branches and no tables, so
// that loops over the functions of one element vectorise.
#pragma once

#include <cmath>
#include <cstring>

#include "pack_points.h"
#include "philox.h"

namespace elle_fast {

// ln u for u in [2^-24, 1], within 2 units of the last place: exponent, and a minimax polynomial of the mantissa in
// [sqrt(1/2), sqrt(2)) (Cephes, logf). ln 1 = 0 exactly.
ELLE_INLINE float natural_log(float u) {
  int32_t bits;
  memcpy(&bits, &u, 4);
  const int32_t half = 0x3f3504f3;  // sqrt(1/2)
  const int32_t exponent = (bits - half) >> 23;
  bits -= exponent * (1 << 23);
  float m;
  memcpy(&m, &bits, 4);
  m -= 1.0f;
  const float square = m * m, e = static_cast<float>(exponent);
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  // ln 2 in two parts, the first of so few bits that its multiples are exact.
  return p * m * square + e * -2.12194440e-4f - 0.5f * square + m + e * 0.693359375f;
}

struct Normals {
  float even, odd;
};

// Box-Muller on the words of an even element and of the odd one after it: length * cosine, length * sine.
// The angle is 2 pi u with u a multiple of 2^-24: the nearest quarter turn is taken off exactly, and what is left,
// within pi / 4, goes into the Taylor series to x^9 and x^10, whose next terms are below 2e-9.
ELLE_INLINE Normals normals(uint32_t even, uint32_t odd) {
  const float length = sqrtf(-2.0f * natural_log(uniform(even) + 0x1p-24f));  // of u in (0, 1]: finite
  const float turns = 4.0f * uniform(odd);
  const int32_t quarter = static_cast<int32_t>(turns + 0.5f);
  const float angle = (turns - static_cast<float>(quarter)) * 1.5707963267948966f;
  const float square = angle * angle;
  float sine = 2.7557319223985893e-06f * square - 1.984126984126984e-04f;
  sine = (sine * square + 8.333333333333333e-03f) * square - 1.6666666666666666e-01f;
  sine = sine * square * angle + angle;
  float cosine = -2.755731922398589e-07f * square + 2.48015873015873e-05f;
  cosine = (cosine * square - 1.3888888888888889e-03f) * square + 4.1666666666666664e-02f;
  cosine = (cosine * square - 0.5f) * square + 1.0f;
  // cos and sin of angle + quarter * pi / 2.
  const bool swapped = (quarter & 1) != 0;
  const float c = swapped ? sine : cosine, s = swapped ? cosine : sine;
  return {length * (((quarter + 1) & 2) != 0 ? -c : c), length * ((quarter & 2) != 0 ? -s : s)};
}

// The length of a sample whose entries may be tiny or huge: their squares at three scales, of which at the end the one
// counts that neither underflows nor overflows. Only sums, so parts may be added up in any fixed order.
struct Squares {
  static constexpr float kUp = 0x1p+90f, kDown = 0x1p-80f;
  float tiny = 0.0f, plain = 0.0f, huge = 0.0f;

  ELLE_INLINE void add(float value) {
    const float up = value * kUp, down = value * kDown;
    plain += value * value;
    tiny += up * up;
    huge += down * down;
  }

  // NaN if an entry is not finite, or the length is not: in neither case is there a direction.
  ELLE_INLINE float length() const {
    float found = sqrtf(plain);
    if (plain < 0x1p-60f) found = sqrtf(tiny) * 0x1p-90f;
    if (plain > 0x1p+100f) found = sqrtf(huge) * 0x1p+80f;
    return found - found == 0.0f ? found : found - found;
  }
};

// radius * u^(1/d) / length: what turns a sample's normal noise, `length` long, into a point of the ball.
ELLE_INLINE float ball_scale(float radius, uint32_t word, float length, int64_t elements) {
  const float root = powf(uniform(word), 1.0f / static_cast<float>(elements));
  return length > 0.0f ? radius * root / length : 0.0f;
}

// The attack's point after its step from `point` along grad / length, before it is projected.
ELLE_INLINE float ball_stepped(float point, float grad, float length, float step_size) {
  return point + step_size * (length > 0.0f ? grad / length : 0.0f);
}

// What an offset from x has to be multiplied by to be in the ball: 1 if it is.
ELLE_INLINE float ball_pull(float length, float eps) { return length > eps ? eps / length : 1.0f; }

// Only what lies outside is moved, so that a point inside keeps its bits.
ELLE_INLINE float ball_projected(float x, float point, float pull) {
  return pull < 1.0f ? x + (point - x) * pull : point;
}

}  // namespace elle_fast
