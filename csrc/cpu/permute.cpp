#include "kernels.h"

#include <cstring>

namespace epmoe::cpu {

Tensor permute(const Tensor& x_in, const Tensor& token_in) {
  const Check check{"permute", DeviceType::CPU};
  const Tensor x_TD = check.floating(x_in, "x", {kAnySize, kAnySize});
  const Tensor token_N = check.of(ScalarType::Long, token_in, "token", {kAnySize});
  const int64_t num_rows = token_N.size(0);
  const int64_t* token = token_N.const_data_ptr<int64_t>();
  check.indices(token, num_rows, x_TD.size(0), "token");

  Tensor rows_ND = torch::stable::new_empty(x_TD, {num_rows, x_TD.size(1)});
  if (rows_ND.numel() == 0) {
    return rows_ND;
  }
  const size_t row_bytes = static_cast<size_t>(x_TD.size(1)) * x_TD.element_size();
  const char* x = static_cast<const char*>(x_TD.const_data_ptr());
  char* rows = static_cast<char*>(rows_ND.mutable_data_ptr());
  torch::stable::parallel_for(0, num_rows, grain(x_TD.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      std::memcpy(rows + n * row_bytes, x + token[n] * row_bytes, row_bytes);
    }
  });
  return rows_ND;
}

}  // namespace epmoe::cpu
