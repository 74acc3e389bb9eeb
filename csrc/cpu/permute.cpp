#include "kernels.h"

#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "operators.h"
#include "rows.h"
#include "stream.h"

namespace epmoe::cpu {
namespace {

// Copies each token's row, of `bytes` bytes, to all its places: it is read from memory once. In blocks of vectors, as
// rows are too short for memcpy to be at its best.
template <int kBytes>
[[gnu::always_inline]] inline void copy_rows_of(
    const RowsByToken& by_token, int64_t begin, int64_t end, const char* x, int64_t bytes, bool stream, char* rows) {
  using Vector [[gnu::vector_size(kBytes)]] = char;
  constexpr int kVectors = 4;
  constexpr int64_t kBlock = kVectors * kBytes;
  for (int64_t t = begin; t < end; ++t) {
    const char* from = x + t * bytes;
    for (int64_t n = by_token.first(t); n != RowsByToken::kEnd; n = by_token.after(n)) {
      char* to = rows + n * bytes;
      int64_t at = 0;
      for (; !stream && at + kBlock <= bytes; at += kBlock) {
        Vector block[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          std::memcpy(&block[i], from + at + i * kBytes, kBytes);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          std::memcpy(to + at + i * kBytes, &block[i], kBytes);
        }
      }
      put(stream, to + at, from + at, static_cast<size_t>(bytes - at));
    }
  }
}

#define EPMOE_COPY_ROWS(attribute, vector_bytes)                              \
  attribute void copy_rows(                                                   \
      const RowsByToken& by_token,                                            \
      int64_t begin,                                                          \
      int64_t end,                                                            \
      const char* x,                                                          \
      int64_t bytes,                                                          \
      bool stream,                                                            \
      char* rows) {                                                           \
    copy_rows_of<vector_bytes>(by_token, begin, end, x, bytes, stream, rows); \
  }
EPMOE_VECTOR_WIDTHS(EPMOE_COPY_ROWS)

}  // namespace

// Whatever the dtype, a row is bytes; the bit pattern of zero is zero.
Tensor permute(const Tensor& x_in, const Tensor& token_in) {
  const Permute given(DeviceType::CPU, x_in, token_in);
  if (given.rows_ND.numel() == 0) {
    check_indices("permute", given.token_N, given.num_tokens, "token", kUnfilled);
    return given.rows_ND;
  }
  const RowsByToken by_token("permute", given.token_N, given.num_tokens);
  const int64_t width = given.width;
  const int64_t bytes = width * static_cast<int64_t>(given.x_TD.element_size());
  const auto* x = static_cast<const char*>(given.x_TD.const_data_ptr());
  auto* rows = static_cast<char*>(given.rows_ND.mutable_data_ptr());
  const bool stream = streams(given.rows_ND, std::min(given.num_tokens, given.num_rows) + given.num_rows);
  by_token.for_tokens(width, [&](int64_t begin, int64_t end) {
    copy_rows(by_token, begin, end, x, bytes, stream, rows);
    fence(stream);
  });
  by_token.for_unfilled(width, [&](int64_t n) { std::memset(rows + n * bytes, 0, static_cast<size_t>(bytes)); });
  return given.rows_ND;
}

}  // namespace epmoe::cpu
