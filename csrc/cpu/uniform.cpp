#include "kernels.h"
#include "lanes.h"
#include "operators.h"

namespace epmoe::cpu {
namespace {

// All draws of one token. Whole blocks of four lanes first: their loop has no branch and vectorises.
EPMOE_VECTOR_CLONES void draw_token(
    int64_t seed,
    int64_t stream,
    int64_t layer,
    int64_t sample,
    int64_t position,
    int64_t first_block,
    int64_t num_lanes,
    float* draws) {
  const int64_t whole = num_lanes / 4;
  for (int64_t block = 0; block < whole; ++block) {
    const PhiloxWords words = philox_words(seed, stream, layer, sample, position, first_block + block);
    for (int lane = 0; lane < 4; ++lane) {
      draws[4 * block + lane] = philox_draw(words.word[lane]);
    }
  }
  if (num_lanes % 4 != 0) {
    const PhiloxWords words = philox_words(seed, stream, layer, sample, position, first_block + whole);
    for (int64_t lane = 4 * whole; lane < num_lanes; ++lane) {
      draws[lane] = philox_draw(words.word[lane % 4]);
    }
  }
}

constexpr int64_t kCost = 8;  // a draw, in units of copied elements

}  // namespace

Tensor uniform(
    const Tensor& sample_in,
    const Tensor& position_in,
    int64_t seed,
    int64_t stream,
    int64_t layer,
    int64_t num_lanes,
    int64_t first_lane) {
  const Uniform given(DeviceType::CPU, sample_in, position_in, stream, layer, num_lanes, first_lane);
  if (given.draws_TL.numel() == 0) {
    return given.draws_TL;
  }
  const int64_t* sample = given.sample_T.const_data_ptr<int64_t>();
  const int64_t* position = given.position_T.const_data_ptr<int64_t>();
  float* draws = given.draws_TL.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, given.num_tokens, grain(kCost * num_lanes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      draw_token(
          seed, stream, layer, sample[t], position[t], given.first_block, num_lanes, draws + t * num_lanes);
    }
  });
  return given.draws_TL;
}

}  // namespace epmoe::cpu
