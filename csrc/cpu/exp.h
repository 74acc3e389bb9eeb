// The exponential function for whole rows.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace epmoe::cpu {

// exp(x) for x <= 0, without branches, so that loops over it vectorise: within 2 units in the last place. 0 below the
// smallest normal number: a small rest would be seen again where it is multiplied by a large x.
[[gnu::always_inline]] inline float exp_negative(float x) {
  constexpr float kRoundToInteger = 12582912.0F;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  x = x < -88.0F ? -88.0F : x;  // whose power, -127, has the exponent bits of zero
  const float power = x * 1.44269504F + kRoundToInteger - kRoundToInteger;
  const float rest = x - power * 0.693359375F + power * 2.12194440e-4F;  // ln 2 in two parts
  float series = 1.0F / 5040;
  series = series * rest + 1.0F / 720;
  series = series * rest + 1.0F / 120;
  series = series * rest + 1.0F / 24;
  series = series * rest + 1.0F / 6;
  series = series * rest + 0.5F;
  series = series * rest + 1.0F;
  series = series * rest + 1.0F;
  return series * std::bit_cast<float>((static_cast<int32_t>(power) + 127) << 23);
}
inline double exp_negative(double x) {
  return std::exp(x);
}

}  // namespace epmoe::cpu
