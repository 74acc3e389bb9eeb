// The activations of the experts, row by row.
#pragma once

#include <cmath>

#include "exp.h"
#include "kernels.h"
#include "lanes.h"
#include "operators.h"

namespace epmoe::cpu {

// The share of a normal distribution below -x for x >= 0, given exp(-x*x/2). In float32: that times a polynomial in
// 1/(1 + 0.23 x), fitted to a relative error of 5e-8.
[[gnu::always_inline]] inline float normal_tail(float x, float bell) {
  const float t = 1.0F / (1.0F + 0.23F * x);
  float sum = -0.0783694834F;
  sum = sum * t + 0.289915442F;
  sum = sum * t - 0.277041584F;
  sum = sum * t + 0.300155550F;
  sum = sum * t - 0.0319468044F;
  sum = sum * t + 0.119066320F;
  sum = sum * t + 0.0858879238F;
  sum = sum * t + 0.0923591182F;
  sum = sum * t - 2.64939717e-5F;
  return sum * bell;
}
inline double normal_tail(double x, double) {
  return 0.5 * std::erfc(x * M_SQRT1_2);
}

// What an activation gives, and its derivatives with respect to the gate (or only input) and the up input.
template <class Wide>
struct Slopes {
  Wide value, d_gate, d_up;
};

struct SwiGLU {
  static constexpr bool kGated = true;
  template <class Wide>
  [[gnu::always_inline]] static inline Slopes<Wide> of(Wide gate, Wide up) {
    const Wide decay = exp_negative(gate < 0 ? gate : -gate);
    const Wide share = (gate < 0 ? decay : Wide{1}) / (1 + decay);  // sigmoid(gate)
    const Wide silu = gate * share;
    return {silu * up, up * (share + silu * (1 - share)), silu};
  }
};

struct GELU {
  static constexpr bool kGated = false;
  template <class Wide>
  [[gnu::always_inline]] static inline Slopes<Wide> of(Wide x, Wide) {
    constexpr Wide kBellHeight = static_cast<Wide>(0.39894228040143267794);  // 1 / sqrt(2 pi)
    const Wide bell = exp_negative(-x * x / 2);
    const Wide tail = normal_tail(x < 0 ? -x : x, bell);
    const Wide below = x < 0 ? tail : 1 - tail;
    return {x * below, below + x * kBellHeight * bell, 0};
  }
};

struct ReLU {
  static constexpr bool kGated = false;
  template <class Wide>
  [[gnu::always_inline]] static inline Slopes<Wide> of(Wide x, Wide) {
    // Written so that NaN stays NaN.
    return {x < 0 ? Wide{0} : x, x > 0 ? Wide{1} : Wide{0}, 0};
  }
};

// One row; `up` is read by gated activations only.
template <class Kind, class Scalar>
[[gnu::always_inline]] inline void activate_row_of(
    const Scalar* gate, const Scalar* up, compute_t<Scalar> weight, int64_t width, Scalar* act) {
  using Wide = compute_t<Scalar>;
#pragma omp simd
  for (int64_t f = 0; f < width; ++f) {
    store(act[f], weight * Kind::of(static_cast<Wide>(gate[f]), static_cast<Wide>(up[f])).value);
  }
}

// One row of gradients, and the gradient of the weight, which is returned. `act` holds the gradient of the activation
// and then the weighted activation: each number is read before its own place is written, and no other number's place is
// touched, so that vectors of any width do the same.
template <class Kind, class Scalar>
[[gnu::always_inline]] inline compute_t<Scalar> activate_row_backward_of(
    const Scalar* gate,
    const Scalar* up,
    compute_t<Scalar> weight,
    int64_t width,
    Scalar* d_gate,
    Scalar* d_up,
    Scalar* act) {
  using Wide = compute_t<Scalar>;
  Lanes<Wide, kRowLanes> dot;
  for_lanes<kRowLanes>(width, [&](int64_t f, int64_t lane) __attribute__((always_inline)) {
    const Wide upstream = static_cast<Wide>(act[f]);
    const Slopes<Wide> out = Kind::of(static_cast<Wide>(gate[f]), static_cast<Wide>(up[f]));
    dot.partial[lane] += upstream * out.value;
    store(d_gate[f], weight * upstream * out.d_gate);
    if constexpr (Kind::kGated) {
      store(d_up[f], weight * upstream * out.d_up);
    }
    store(act[f], weight * out.value);
  });
  return dot.total();
}

#define EPMOE_ACTIVATION_LOOPS(Kind, Scalar)                                                                       \
  EPMOE_VECTOR_CLONES static void activate_row(                                                                    \
      Kind, const Scalar* gate, const Scalar* up, compute_t<Scalar> weight, int64_t width, Scalar* act) {          \
    activate_row_of<Kind>(gate, up, weight, width, act);                                                           \
  }                                                                                                                \
  EPMOE_VECTOR_CLONES static compute_t<Scalar> activate_row_backward(                                              \
      Kind,                                                                                                        \
      const Scalar* gate,                                                                                          \
      const Scalar* up,                                                                                            \
      compute_t<Scalar> weight,                                                                                    \
      int64_t width,                                                                                               \
      Scalar* d_gate,                                                                                              \
      Scalar* d_up,                                                                                                \
      Scalar* act) {                                                                                               \
    return activate_row_backward_of<Kind>(gate, up, weight, width, d_gate, d_up, act);                             \
  }
#define EPMOE_ACTIVATION_LOOPS_OF(Kind)   \
  EPMOE_ACTIVATION_LOOPS(Kind, float)     \
  EPMOE_ACTIVATION_LOOPS(Kind, double)    \
  EPMOE_ACTIVATION_LOOPS(Kind, BFloat16)  \
  EPMOE_ACTIVATION_LOOPS(Kind, Half)
EPMOE_ACTIVATION_LOOPS_OF(SwiGLU)
EPMOE_ACTIVATION_LOOPS_OF(GELU)
EPMOE_ACTIVATION_LOOPS_OF(ReLU)
#undef EPMOE_ACTIVATION_LOOPS_OF
#undef EPMOE_ACTIVATION_LOOPS

// Calls body with the activation's type.
template <class Body>
void for_activation(Activation activation, const Body& body) {
  if (activation == Activation::swiglu) {
    body(SwiGLU{});
  } else if (activation == Activation::gelu) {
    body(GELU{});
  } else {
    body(ReLU{});
  }
}

}  // namespace epmoe::cpu
