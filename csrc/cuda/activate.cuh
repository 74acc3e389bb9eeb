// The activations between an expert's two matrices: one block per row, each number read and written once.
#pragma once

#include <cmath>
#include <cstdint>

#include "checks.h"
#include "rows.cuh"
#include "warp.cuh"

namespace epmoe::cuda {

// What an activation gives, and its derivatives with respect to the gate (or only input) and the up input.
template <class Wide>
struct Slopes {
  Wide value, d_gate, d_up;
};

struct SwiGLU {
  static constexpr bool kGated = true;
  template <class Wide>
  __device__ static Slopes<Wide> of(Wide gate, Wide up) {
    const Wide decay = std::exp(gate < 0 ? gate : -gate);
    const Wide share = (gate < 0 ? decay : Wide{1}) / (1 + decay);  // sigmoid(gate)
    const Wide silu = gate * share;
    return {silu * up, up * (share + silu * (1 - share)), silu};
  }
};

struct GELU {
  static constexpr bool kGated = false;
  template <class Wide>
  __device__ static Slopes<Wide> of(Wide x, Wide) {
    constexpr Wide kRootOfHalf = static_cast<Wide>(0.70710678118654752440);
    constexpr Wide kBellHeight = static_cast<Wide>(0.39894228040143267794);  // 1 / sqrt(2 pi)
    const Wide below = std::erfc(-x * kRootOfHalf) / 2;
    return {x * below, below + x * kBellHeight * std::exp(-x * x / 2), 0};
  }
};

struct ReLU {
  static constexpr bool kGated = false;
  template <class Wide>
  __device__ static Slopes<Wide> of(Wide x, Wide) {
    // Written so that NaN stays NaN.
    return {x < 0 ? Wide{0} : x, x > 0 ? Wide{1} : Wide{0}, 0};
  }
};

// A row of hidden vectors is its gate vectors and then, for gated activations, as many up vectors.
template <class Kind, class Scalar, int kCount>
__global__ void __launch_bounds__(kMaxRowWarps * kWarp) activate_kernel(
    int64_t num_rows,
    int64_t vectors,
    const Pack<Scalar, kCount>* hidden_RV,
    const compute_t<Scalar>* weight_R,
    Pack<Scalar, kCount>* act_RV) {
  using Wide = compute_t<Scalar>;
  for (int64_t r = blockIdx.x; r < num_rows; r += gridDim.x) {
    const Pack<Scalar, kCount>* gates = hidden_RV + r * vectors * (Kind::kGated ? 2 : 1);
    const Wide weight = weight_R == nullptr ? Wide{1} : weight_R[r];
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      const Pack<Scalar, kCount> gate = gates[v];
      const Pack<Scalar, kCount> up = Kind::kGated ? gates[vectors + v] : gate;
      Pack<Scalar, kCount> act;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const auto out = Kind::of(static_cast<Wide>(gate.at[i]), static_cast<Wide>(up.at[i]));
        act.at[i] = static_cast<Scalar>(weight * out.value);
      }
      act_RV[r * vectors + v] = act;
    }
  }
}

template <class Kind, class Scalar, int kCount>
__global__ void __launch_bounds__(kMaxRowWarps * kWarp) activate_backward_kernel(
    int64_t num_rows,
    int64_t vectors,
    const Pack<Scalar, kCount>* d_act_RV,
    const Pack<Scalar, kCount>* hidden_RV,
    const compute_t<Scalar>* weight_R,
    Pack<Scalar, kCount>* d_hidden_RV,
    Pack<Scalar, kCount>* act_RV,
    compute_t<Scalar>* d_weight_R) {
  using Wide = compute_t<Scalar>;
  __shared__ Wide dot_of_warp[kMaxRowWarps];
  for (int64_t r = blockIdx.x; r < num_rows; r += gridDim.x) {
    const int64_t first = r * vectors * (Kind::kGated ? 2 : 1);
    const Wide weight = weight_R == nullptr ? Wide{1} : weight_R[r];
    Wide dot{0};
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      const Pack<Scalar, kCount> d_act = d_act_RV[r * vectors + v], gate = hidden_RV[first + v];
      const Pack<Scalar, kCount> up = Kind::kGated ? hidden_RV[first + vectors + v] : gate;
      Pack<Scalar, kCount> d_gate, d_up, act;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const Wide upstream = static_cast<Wide>(d_act.at[i]);
        const auto out = Kind::of(static_cast<Wide>(gate.at[i]), static_cast<Wide>(up.at[i]));
        dot += upstream * out.value;
        d_gate.at[i] = static_cast<Scalar>(weight * upstream * out.d_gate);
        d_up.at[i] = static_cast<Scalar>(weight * upstream * out.d_up);
        act.at[i] = static_cast<Scalar>(weight * out.value);
      }
      d_hidden_RV[first + v] = d_gate;
      if (Kind::kGated) {
        d_hidden_RV[first + vectors + v] = d_up;
      }
      act_RV[r * vectors + v] = act;
    }
    dot = warp_sum(dot);
    if (lane_id() == 0) {
      dot_of_warp[threadIdx.x / kWarp] = dot;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Wide sum{0};
      for (int warp = 0; warp < static_cast<int>(blockDim.x / kWarp); ++warp) {
        sum += dot_of_warp[warp];
      }
      d_weight_R[r] = sum;
    }
    __syncthreads();  // the sums are read before the next row's are written
  }
}

}  // namespace epmoe::cuda
