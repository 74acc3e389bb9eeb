#include "kernels.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "operators.h"
#include "stream.h"

namespace epmoe::cpu {
namespace {

// Which rows belong to each token, in row order. With it every sum has one owner: no atomics, and the same bits
// for any number of threads.
struct RowsByToken {
  std::vector<int64_t> start_T1;
  std::vector<int64_t> row_N;

  RowsByToken(const int64_t* token, int64_t num_rows, int64_t num_tokens)
      : start_T1(static_cast<size_t>(num_tokens) + 1), row_N(static_cast<size_t>(num_rows)) {
    // Unfilled rows are counted in the first place, which is reset afterwards.
    for (int64_t n = 0; n < num_rows; ++n) {
      ++start_T1[token[n] + 1];
    }
    start_T1[0] = 0;
    for (int64_t t = 0; t < num_tokens; ++t) {
      start_T1[t + 1] += start_T1[t];
    }
    std::vector<int64_t> next_T(start_T1.begin(), start_T1.end() - 1);
    for (int64_t n = 0; n < num_rows; ++n) {
      if (token[n] != kUnfilled) {
        row_N[next_T[token[n]]++] = n;
      }
    }
  }
};

constexpr int64_t kBlock = 32;  // columns summed at a time, in registers

// The weighted sum of a token's rows, for a block of columns whose number the compiler knows or not.
template <bool kStream, class Scalar, class Count>
[[gnu::always_inline]] inline void sum_block(
    const Scalar* rows,
    const compute_t<Scalar>* weight,
    const int64_t* first,
    const int64_t* last,
    int64_t width,
    Count columns,
    Scalar* y) {
  using Wide = compute_t<Scalar>;
  Wide sum[kBlock] = {};
  for (const int64_t* row = first; row != last; ++row) {
    const Scalar* source = rows + *row * width;
    const Wide factor = weight == nullptr ? Wide{1} : weight[*row];
#pragma omp simd
    for (int64_t d = 0; d < columns; ++d) {
      sum[d] += static_cast<Wide>(source[d]) * factor;
    }
  }
  Block<kStream, Scalar, kBlock> result(y);
#pragma omp simd
  for (int64_t d = 0; d < columns; ++d) {
    store(result.at[d], sum[d]);
  }
  result.write(columns);
}

template <bool kStream, class Scalar>
[[gnu::always_inline]] inline void sum_rows_of(
    const Scalar* rows,
    const compute_t<Scalar>* weight,
    const int64_t* first,
    const int64_t* last,
    int64_t width,
    Scalar* y) {
  const int64_t whole = width - width % kBlock;
  for (int64_t column = 0; column < whole; column += kBlock) {
    sum_block<kStream>(rows + column, weight, first, last, width, std::integral_constant<int64_t, kBlock>{}, y + column);
  }
  if (whole < width) {
    sum_block<kStream>(rows + whole, weight, first, last, width, width - whole, y + whole);
  }
}

// d_row = factor * d_y; returns the scalar product of d_y and row.
template <bool kStream, class Scalar>
[[gnu::always_inline]] inline compute_t<Scalar> scale_and_dot_of(
    const Scalar* d_y, const Scalar* row, compute_t<Scalar> factor, int64_t width, Scalar* d_row) {
  using Wide = compute_t<Scalar>;
  Lanes<Wide, kRowLanes> dot;
  const auto block = [&](int64_t first, auto columns) __attribute__((always_inline)) {
    Block<kStream, Scalar, kRowLanes> scaled(d_row + first);
#pragma omp simd
    for (int64_t lane = 0; lane < columns; ++lane) {
      const Wide upstream = static_cast<Wide>(d_y[first + lane]);
      store(scaled.at[lane], upstream * factor);
      dot.partial[lane] += upstream * static_cast<Wide>(row[first + lane]);
    }
    scaled.write(columns);
  };
  const int64_t whole = width - width % kRowLanes;
  for (int64_t first = 0; first < whole; first += kRowLanes) {
    block(first, std::integral_constant<int64_t, kRowLanes>{});
  }
  if (whole < width) {
    block(whole, width - whole);
  }
  return dot.total();
}

#define EPMOE_ROW_LOOPS(Scalar)                                              \
  EPMOE_VECTOR_CLONES void sum_rows(                                         \
      const Scalar* rows,                                                    \
      const compute_t<Scalar>* weight,                                       \
      const int64_t* first,                                                  \
      const int64_t* last,                                                   \
      int64_t width,                                                         \
      bool stream,                                                           \
      Scalar* y) {                                                           \
    stream ? sum_rows_of<true>(rows, weight, first, last, width, y)          \
           : sum_rows_of<false>(rows, weight, first, last, width, y);        \
  }                                                                          \
  EPMOE_VECTOR_CLONES compute_t<Scalar> scale_and_dot(                       \
      const Scalar* d_y,                                                     \
      const Scalar* row,                                                     \
      compute_t<Scalar> factor,                                              \
      int64_t width,                                                         \
      bool stream,                                                           \
      Scalar* d_row) {                                                       \
    return stream ? scale_and_dot_of<true>(d_y, row, factor, width, d_row)   \
                  : scale_and_dot_of<false>(d_y, row, factor, width, d_row); \
  }
EPMOE_ROW_LOOPS(float)
EPMOE_ROW_LOOPS(double)
EPMOE_ROW_LOOPS(BFloat16)
EPMOE_ROW_LOOPS(Half)

}  // namespace

Tensor combine(
    const Tensor& rows_in, const std::optional<Tensor>& weight_in, const Tensor& token_in, int64_t num_tokens) {
  const Combine given(DeviceType::CPU, rows_in, weight_in, token_in, num_tokens);
  check_indices("combine", given.token_N, num_tokens, "token", kUnfilled);
  if (given.y_TD.numel() == 0) {
    return given.y_TD;
  }
  const int64_t width = given.width;
  const RowsByToken by_token(given.token_N.const_data_ptr<int64_t>(), given.num_rows, num_tokens);
  for_floating(given.rows_ND.scalar_type(), [&]<class Scalar>() {
    const Scalar* rows = given.rows_ND.const_data_ptr<Scalar>();
    const auto* weight = given.weight_N.has_value() ? given.weight_N->const_data_ptr<compute_t<Scalar>>() : nullptr;
    Scalar* y = given.y_TD.mutable_data_ptr<Scalar>();
    const bool stream = streams(given.y_TD.numel() * static_cast<int64_t>(sizeof(Scalar)));
    const int64_t* start = by_token.start_T1.data();
    const int64_t* row_of = by_token.row_N.data();
    torch::stable::parallel_for(0, num_tokens, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        sum_rows(rows, weight, row_of + start[t], row_of + start[t + 1], width, stream, y + t * width);
      }
      fence(stream);
    });
  });
  return given.y_TD;
}

std::tuple<Tensor, Tensor> combine_backward(
    const Tensor& d_y_in, const Tensor& rows_in, const Tensor& weight_in, const Tensor& token_in) {
  CombineBackward given(DeviceType::CPU, d_y_in, rows_in, weight_in, token_in);
  check_indices("combine_backward", given.token_N, given.num_tokens, "token", kUnfilled);
  if (given.d_rows_ND.numel() == 0) {  // there may be rows without columns, of any number of tokens
    torch::stable::zero_(given.d_weight_N);
    return {given.d_rows_ND, torch::stable::to(given.d_weight_N, weight_in.scalar_type())};
  }
  const int64_t width = given.width;
  const int64_t* token = given.token_N.const_data_ptr<int64_t>();
  // With lists of rows a token's d_y is read once and then from the cache.
  const RowsByToken by_token(token, given.num_rows, given.num_tokens);
  for_floating(given.rows_ND.scalar_type(), [&]<class Scalar>() {
    const Scalar* d_y = given.d_y_TD.const_data_ptr<Scalar>();
    const Scalar* rows = given.rows_ND.const_data_ptr<Scalar>();
    const auto* weight = given.weight_N.const_data_ptr<compute_t<Scalar>>();
    Scalar* d_rows = given.d_rows_ND.mutable_data_ptr<Scalar>();
    auto* d_weight = given.d_weight_N.mutable_data_ptr<compute_t<Scalar>>();
    const bool stream = streams(given.d_rows_ND.numel() * static_cast<int64_t>(sizeof(Scalar)));
    const int64_t* start = by_token.start_T1.data();
    const int64_t* row_of = by_token.row_N.data();
    torch::stable::parallel_for(0, given.num_tokens, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t i = start[begin]; i < start[end]; ++i) {
        const int64_t n = row_of[i];
        const int64_t at = n * width;
        d_weight[n] = scale_and_dot(d_y + token[n] * width, rows + at, weight[n], width, stream, d_rows + at);
      }
      fence(stream);
    });
    for (int64_t n = 0; n < given.num_rows; ++n) {
      if (token[n] == kUnfilled) {
        std::fill_n(d_rows + n * width, width, Scalar(0));
        d_weight[n] = 0;
      }
    }
  });
  return {given.d_rows_ND, torch::stable::to(given.d_weight_N, weight_in.scalar_type())};
}

}  // namespace epmoe::cpu
