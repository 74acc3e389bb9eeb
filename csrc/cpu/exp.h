// The exponential function for whole rows.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace epmoe::cpu {

// exp(x) for x <= 0, without branches, so that loops over it vectorise: within 2 units in the last place, and 0 where
// that would be below 1.6e-38. The same bits on every machine.
[[gnu::always_inline]] inline float exp_negative(float x) {
  constexpr float kRoundToInteger = 12582912.0F;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  const bool vanishes = x < -87.0F;
  x = vanishes ? -87.0F : x;
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
  const float exponential = series * std::bit_cast<float>((static_cast<int32_t>(power) + 127) << 23);
  return vanishes ? 0.0F : exponential;
}
inline double exp_negative(double x) {
  return std::exp(x);
}

}  // namespace epmoe::cpu
