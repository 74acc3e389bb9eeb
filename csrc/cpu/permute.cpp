#include "kernels.h"

#include <cstring>

namespace epmoe::cpu {

// Whatever the dtype, a row is bytes; the bit pattern of zero is zero.
Tensor permute(const Tensor& x_in, const Tensor& token_in) {
  const Check check{"permute", DeviceType::CPU};
  const Tensor x_TD = check.floating(x_in, "x", {kAnySize, kAnySize});
  const Tensor token_N = check.of(ScalarType::Long, token_in, "token", {kAnySize});
  const int64_t num_rows = token_N.size(0);
  const int64_t* token = token_N.const_data_ptr<int64_t>();
  check.indices(token, num_rows, x_TD.size(0), "token", kUnfilled);

  Tensor rows_ND = check.fresh(x_TD, "rows", {num_rows, x_TD.size(1)});
  for_floating(x_TD.scalar_type(), [&]<class Scalar>() {
    const int64_t width = x_TD.size(1);
    const size_t bytes = static_cast<size_t>(width) * sizeof(Scalar);
    const Scalar* x = x_TD.const_data_ptr<Scalar>();
    Scalar* rows = rows_ND.mutable_data_ptr<Scalar>();
    torch::stable::parallel_for(0, num_rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        if (token[n] == kUnfilled) {
          std::memset(static_cast<void*>(rows + n * width), 0, bytes);
        } else {
          std::memcpy(static_cast<void*>(rows + n * width), x + token[n] * width, bytes);
        }
      }
    });
  });
  return rows_ND;
}

}  // namespace epmoe::cpu
