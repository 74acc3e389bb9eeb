// What a router decides with, the same on every device: policies, draws, and the second-expert decision.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace epmoe {

enum class SecondPolicy { all, none, threshold, random };

struct RouteOptions {
  int64_t num_experts;
  int64_t top_k;
  bool normalize;
  SecondPolicy policy;
  double tau;
};

// Where the draws of the second-expert decision come from: numbers, or Philox counters; 0 when from nowhere.
struct Draws {
  const float* uniform_float = nullptr;
  const double* uniform_double = nullptr;
  const int64_t* sample = nullptr;
  const int64_t* position = nullptr;
  int64_t seed = 0;
  int64_t layer = 0;

  EPMOE_HOST_DEVICE double of(int64_t t) const {
    if (uniform_float != nullptr) {
      return uniform_float[t];
    }
    if (uniform_double != nullptr) {
      return uniform_double[t];
    }
    return sample == nullptr ? 0.0 : philox_draw(philox_words(seed, kSecondExpertStream, layer, sample[t], position[t], 0).word[0]);
  }
};

// In float64 and without contraction (a compiler option everywhere), so that every device decides alike. The exp of
// two devices may differ in its last bit; a draw has 24 bits, so the chance that it falls in between is 2^-52.
EPMOE_HOST_DEVICE inline bool second_is_used(
    SecondPolicy policy, double first, double second, double tau, double draw) {
  if (policy == SecondPolicy::none) {
    return false;
  }
  const double twice_a2 = 2.0 / (1.0 + std::exp(first - second));
  return policy == SecondPolicy::threshold ? twice_a2 > 2.0 * tau : twice_a2 * (0.5 / tau) > draw;
}

}  // namespace epmoe
