#include "uniform.cuh"

#include "kernels.h"
#include "launch.h"
#include "operators.h"

namespace epmoe::cuda {

Tensor uniform(
    const Tensor& sample_in,
    const Tensor& position_in,
    int64_t seed,
    int64_t stream,
    int64_t layer,
    int64_t num_lanes,
    int64_t first_lane) {
  const Uniform given(kDevice, sample_in, position_in, stream, layer, num_lanes, first_lane);
  if (given.draws_TL.numel() == 0) {
    return given.draws_TL;
  }
  const int64_t num_blocks = ceil_div(num_lanes, 4);
  const Launcher launch("uniform", given.draws_TL);
  launch(
      &uniform_kernel, ceil_div(given.num_tokens * num_blocks, kUniformThreads), kUniformThreads, given.num_tokens,
      num_lanes, num_blocks, given.first_block, seed, stream, layer, given.sample_T.const_data_ptr<int64_t>(),
      given.position_T.const_data_ptr<int64_t>(), given.draws_TL.mutable_data_ptr<float>());
  return given.draws_TL;
}

}  // namespace epmoe::cuda
