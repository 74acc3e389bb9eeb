// What the 32 threads of a warp do together. All of them have to come along.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace epmoe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// Blocks are one-dimensional and hold whole warps.
__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int64_t warp_id() { return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp; }
__device__ inline int64_t num_warps() { return int64_t{gridDim.x} * blockDim.x / kWarp; }
__device__ inline unsigned lanes_below(int lane) { return (1u << lane) - 1; }

// The same bits in every lane, for the same reason in every run: the order is fixed.
template <class Scalar>
__device__ Scalar warp_sum(Scalar value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

}  // namespace epmoe::cuda
