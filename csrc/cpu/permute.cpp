#include "kernels.h"

#include <cstring>

#include "lanes.h"
#include "operators.h"

namespace epmoe::cpu {

// Whatever the dtype, a row is bytes; the bit pattern of zero is zero.
Tensor permute(const Tensor& x_in, const Tensor& token_in) {
  const Permute given(DeviceType::CPU, x_in, token_in);
  check_indices("permute", given.token_N, given.num_tokens, "token", kUnfilled);
  if (given.rows_ND.numel() == 0) {
    return given.rows_ND;
  }
  for_floating(given.x_TD.scalar_type(), [&]<class Scalar>() {
    const int64_t width = given.width;
    const int64_t* token = given.token_N.const_data_ptr<int64_t>();
    const size_t bytes = static_cast<size_t>(width) * sizeof(Scalar);
    const Scalar* x = given.x_TD.const_data_ptr<Scalar>();
    Scalar* rows = given.rows_ND.mutable_data_ptr<Scalar>();
    torch::stable::parallel_for(0, given.num_rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        if (token[n] == kUnfilled) {
          std::memset(static_cast<void*>(rows + n * width), 0, bytes);
        } else {
          std::memcpy(static_cast<void*>(rows + n * width), x + token[n] * width, bytes);
        }
      }
    });
  });
  return given.rows_ND;
}

}  // namespace epmoe::cpu
