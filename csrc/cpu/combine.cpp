#include "kernels.h"

#include <algorithm>

#include "lanes.h"
#include "operators.h"
#include "pack.h"
#include "rows.h"
#include "stream.h"

namespace epmoe::cpu {
namespace {

// The weighted sum of a token's rows, `kPacks` packs of columns at a time, from `column` on as far as whole ones fit,
// which moves it.
template <int kBytes, int kPacks, bool kStream, class Scalar>
[[gnu::always_inline]] inline void sum_columns(
    const RowsByToken& by_token,
    int64_t first,
    const Scalar* rows,
    const compute_t<Scalar>* weight,
    int64_t width,
    int64_t& column,
    Scalar* y) {
  using Numbers = Pack<Scalar, kBytes>;
  constexpr int64_t kColumns = kPacks * Numbers::kCount;
  for (; column + kColumns <= width; column += kColumns) {
    Numbers sum[kPacks];
    for (int64_t n = first; n != RowsByToken::kEnd; n = by_token.after(n)) {
      const Scalar* row = rows + n * width + column;
      const compute_t<Scalar> factor = weight == nullptr ? 1 : weight[n];
#pragma GCC unroll 4
      for (int i = 0; i < kPacks; ++i) {
        Numbers numbers;
        numbers.load(row + i * Numbers::kCount);
        sum[i].add_product(numbers, factor);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPacks; ++i) {
      sum[i].template store<kStream>(y + column + i * Numbers::kCount);
    }
  }
}

template <int kBytes, bool kStream, class Scalar>
[[gnu::always_inline]] inline void sum_rows_of(
    const RowsByToken& by_token,
    int64_t begin,
    int64_t end,
    const Scalar* rows,
    const compute_t<Scalar>* weight,
    int64_t width,
    Scalar* y_TD) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = by_token.first(t);
    Scalar* y = y_TD + t * width;
    int64_t column = 0;
    sum_columns<kBytes, 4, kStream>(by_token, first, rows, weight, width, column, y);
    sum_columns<kBytes, 1, kStream>(by_token, first, rows, weight, width, column, y);
    sum_columns<16, 1, kStream>(by_token, first, rows, weight, width, column, y);
    for (; column < width; ++column) {
      compute_t<Scalar> sum = 0;
      for (int64_t n = first; n != RowsByToken::kEnd; n = by_token.after(n)) {
        sum += static_cast<compute_t<Scalar>>(rows[n * width + column]) * (weight == nullptr ? 1 : weight[n]);
      }
      store(y[column], sum);
    }
  }
}

// d_row = factor * d_y; returns the scalar product of d_y and row.
template <int kBytes, bool kStream, class Scalar>
[[gnu::always_inline]] inline compute_t<Scalar> scale_and_dot(
    const Scalar* d_y, const Scalar* row, compute_t<Scalar> factor, int64_t width, Scalar* d_row) {
  using Numbers = Pack<Scalar, kBytes>;
  constexpr int kPacks = kRowLanes / Numbers::kCount;
  Numbers sum[kPacks];
  int64_t column = 0;
  for (; column + kRowLanes <= width; column += kRowLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kPacks; ++i) {
      const int64_t at = column + i * Numbers::kCount;
      Numbers upstream, numbers;
      upstream.load(d_y + at);
      numbers.load(row + at);
      sum[i].add_product(upstream, numbers);
      upstream.scale(factor);
      upstream.template store<kStream>(d_row + at);
    }
  }
  Lanes<compute_t<Scalar>, kRowLanes> dot;
#pragma GCC unroll 16
  for (int i = 0; i < kPacks; ++i) {
    sum[i].template spill<kRowLanes>(dot.partial, i);
  }
  compute_t<Scalar> rest = 0;
  for (; column < width; ++column) {
    const auto upstream = static_cast<compute_t<Scalar>>(d_y[column]);
    rest += upstream * static_cast<compute_t<Scalar>>(row[column]);
    store(d_row[column], upstream * factor);
  }
  return dot.total() + rest;
}

// Begins to load a row that is wanted soon, or its first part: rows lie anywhere, and the processor foresees only what
// comes in order.
template <class Scalar>
[[gnu::always_inline]] inline void prefetch(const Scalar* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(Scalar), kMost = 64 * kLine;
  for (int64_t column = 0; column < std::min(width, kMost); column += kLine) {
    __builtin_prefetch(row + column);
  }
}

template <int kBytes, bool kStream, class Scalar>
[[gnu::always_inline]] inline void scale_rows_of(
    const RowsByToken& by_token,
    int64_t begin,
    int64_t end,
    const Scalar* d_y,
    const Scalar* rows,
    const compute_t<Scalar>* weight,
    int64_t width,
    Scalar* d_rows,
    compute_t<Scalar>* d_weight) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t n = by_token.first(t); n != RowsByToken::kEnd; n = by_token.after(n)) {
      const int64_t at = n * width, next = by_token.following(t, n, end);
      if (next != RowsByToken::kEnd) {
        prefetch(rows + next * width, width);
        if (!kStream) {
          prefetch(d_rows + next * width, width);
        }
      }
      d_weight[n] = scale_and_dot<kBytes, kStream>(d_y + t * width, rows + at, weight[n], width, d_rows + at);
    }
  }
}

#define EPMOE_ROW_LOOPS(attribute, bytes, Scalar)                                                               \
  attribute void sum_rows(                                                                                      \
      const RowsByToken& by_token,                                                                              \
      int64_t begin,                                                                                            \
      int64_t end,                                                                                              \
      const Scalar* rows,                                                                                       \
      const compute_t<Scalar>* weight,                                                                          \
      int64_t width,                                                                                            \
      bool stream,                                                                                              \
      Scalar* y) {                                                                                              \
    stream ? sum_rows_of<bytes, true>(by_token, begin, end, rows, weight, width, y)                             \
           : sum_rows_of<bytes, false>(by_token, begin, end, rows, weight, width, y);                           \
  }                                                                                                             \
  attribute void scale_rows(                                                                                    \
      const RowsByToken& by_token,                                                                              \
      int64_t begin,                                                                                            \
      int64_t end,                                                                                              \
      const Scalar* d_y,                                                                                        \
      const Scalar* rows,                                                                                       \
      const compute_t<Scalar>* weight,                                                                          \
      int64_t width,                                                                                            \
      bool stream,                                                                                              \
      Scalar* d_rows,                                                                                           \
      compute_t<Scalar>* d_weight) {                                                                            \
    stream ? scale_rows_of<bytes, true>(by_token, begin, end, d_y, rows, weight, width, d_rows, d_weight)       \
           : scale_rows_of<bytes, false>(by_token, begin, end, d_y, rows, weight, width, d_rows, d_weight);     \
  }
EPMOE_VECTOR_WIDTHS(EPMOE_ROW_LOOPS, float)
EPMOE_VECTOR_WIDTHS(EPMOE_ROW_LOOPS, double)
EPMOE_VECTOR_WIDTHS(EPMOE_ROW_LOOPS, BFloat16)
EPMOE_VECTOR_WIDTHS(EPMOE_ROW_LOOPS, Half)

}  // namespace

Tensor combine(
    const Tensor& rows_in, const std::optional<Tensor>& weight_in, const Tensor& token_in, int64_t num_tokens) {
  const Combine given(DeviceType::CPU, rows_in, weight_in, token_in, num_tokens);
  if (given.y_TD.numel() == 0) {
    check_indices("combine", given.token_N, num_tokens, "token", kUnfilled);
    return given.y_TD;
  }
  const RowsByToken by_token("combine", given.token_N, num_tokens);
  const int64_t width = given.width;
  for_floating(given.rows_ND.scalar_type(), [&]<class Scalar>() {
    const Scalar* rows = given.rows_ND.const_data_ptr<Scalar>();
    const auto* weight = given.weight_N.has_value() ? given.weight_N->const_data_ptr<compute_t<Scalar>>() : nullptr;
    Scalar* y = given.y_TD.mutable_data_ptr<Scalar>();
    const bool stream = streams(given.y_TD, given.num_rows + num_tokens);
    by_token.for_tokens(width, [&](int64_t begin, int64_t end) {
      sum_rows(by_token, begin, end, rows, weight, width, stream, y);
      fence(stream);
    });
  });
  return given.y_TD;
}

std::tuple<Tensor, Tensor> combine_backward(
    const Tensor& d_y_in, const Tensor& rows_in, const Tensor& weight_in, const Tensor& token_in) {
  CombineBackward given(DeviceType::CPU, d_y_in, rows_in, weight_in, token_in);
  if (given.d_rows_ND.numel() == 0) {  // there may be rows without columns, of any number of tokens
    check_indices("combine_backward", given.token_N, given.num_tokens, "token", kUnfilled);
    torch::stable::zero_(given.d_weight_N);
    return {given.d_rows_ND, torch::stable::to(given.d_weight_N, weight_in.scalar_type())};
  }
  const RowsByToken by_token("combine_backward", given.token_N, given.num_tokens);
  const int64_t width = given.width;
  for_floating(given.rows_ND.scalar_type(), [&]<class Scalar>() {
    const Scalar* d_y = given.d_y_TD.const_data_ptr<Scalar>();
    const Scalar* rows = given.rows_ND.const_data_ptr<Scalar>();
    const auto* weight = given.weight_N.const_data_ptr<compute_t<Scalar>>();
    Scalar* d_rows = given.d_rows_ND.mutable_data_ptr<Scalar>();
    auto* d_weight = given.d_weight_N.mutable_data_ptr<compute_t<Scalar>>();
    const bool stream = streams(given.d_rows_ND, given.num_tokens + 2 * given.num_rows);
    by_token.for_tokens(width, [&](int64_t begin, int64_t end) {
      scale_rows(by_token, begin, end, d_y, rows, weight, width, stream, d_rows, d_weight);
      fence(stream);
    });
    by_token.for_unfilled(width, [&](int64_t n) {
      std::fill_n(d_rows + n * width, width, Scalar(0));
      d_weight[n] = 0;
    });
  });
  return {given.d_rows_ND, torch::stable::to(given.d_weight_N, weight_in.scalar_type())};
}

}  // namespace epmoe::cpu
