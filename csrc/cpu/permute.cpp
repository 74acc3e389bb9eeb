#include "kernels.h"

#include <cstring>

#include "lanes.h"
#include "operators.h"
#include "stream.h"

namespace epmoe::cpu {
namespace {

constexpr int64_t kAhead = 2;  // rows

// Begins to load a row that is wanted soon, or its first part: rows lie anywhere, and the processor prefetchs only what
// comes in order.
inline void prefetch(const void* row, size_t bytes) {
#if defined(__GNUC__)
  constexpr size_t kLine = 64, kMost = 16 * kLine;
  for (size_t at = 0; at < bytes && at < kMost; at += kLine) {
    __builtin_prefetch(static_cast<const char*>(row) + at);
  }
#endif
}

}  // namespace

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
    const bool stream = streams(given.num_rows * static_cast<int64_t>(bytes));
    torch::stable::parallel_for(0, given.num_rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        void* row = rows + n * width;
        if (n + kAhead < end && token[n + kAhead] != kUnfilled) {
          prefetch(x + token[n + kAhead] * width, bytes);
        }
        if (token[n] == kUnfilled) {
          std::memset(row, 0, bytes);
        } else if (stream) {
          put(row, x + token[n] * width, bytes);
        } else {
          std::memcpy(row, x + token[n] * width, bytes);
        }
      }
      fence(stream);
    });
  });
  return given.rows_ND;
}

}  // namespace epmoe::cpu
