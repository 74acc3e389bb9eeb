// Random numbers for tokens and lanes. A thread draws four lanes of a token.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "philox.h"

namespace epmoe::cuda {

constexpr int64_t kUniformThreads = 256;

__global__ void uniform_kernel(
    int64_t num_tokens,
    int64_t num_lanes,
    int64_t num_blocks,
    int64_t first_block,
    int64_t seed,
    int64_t stream,
    int64_t layer,
    const int64_t* sample,
    const int64_t* position,
    float* draws) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < num_tokens * num_blocks; i += stride) {
    const int64_t t = i / num_blocks;
    const int64_t block = i % num_blocks;
    const PhiloxWords words = philox_words(seed, stream, layer, sample[t], position[t], first_block + block);
    for (int64_t lane = 0; lane < 4 && 4 * block + lane < num_lanes; ++lane) {
      draws[t * num_lanes + 4 * block + lane] = philox_draw(words.word[lane]);
    }
  }
}

}  // namespace epmoe::cuda
