// Which rows belong to each token.
#pragma once

#include <algorithm>
#include <memory>

#include "checks.h"
#include "lanes.h"

namespace epmoe::cpu {

// Lists of rows, in row order. With them every sum has one owner: no atomics, and the same bits for any number of
// threads; and what belongs to the token itself is read from memory once.
class RowsByToken {
 public:
  static constexpr int64_t kEnd = -1;

  RowsByToken(const char* op, const Tensor& token_N, int64_t num_tokens)
      : token_N_(token_N.const_data_ptr<int64_t>()),
        num_rows_(token_N.size(0)),
        num_tokens_(num_tokens),
        first_T_(std::make_unique_for_overwrite<int64_t[]>(static_cast<size_t>(num_tokens))),
        next_N_(std::make_unique_for_overwrite<int64_t[]>(static_cast<size_t>(num_rows_))) {
    std::fill_n(first_T_.get(), num_tokens, kEnd);
    for (int64_t n = num_rows_ - 1; n >= 0; --n) {
      const int64_t t = token_N_[n];
      if (t == kUnfilled) {
        ++num_unfilled_;
        continue;
      }
      if (t < 0 || t >= num_tokens) [[unlikely]] {
        check_indices(op, token_N, num_tokens, "token", kUnfilled);  // throws, and names the first one
      }
      next_N_[n] = first_T_[t];
      first_T_[t] = n;
    }
  }

  // The first row of a token and the one after a row; kEnd if there is none.
  int64_t first(int64_t t) const {
    return first_T_[t];
  }
  int64_t after(int64_t n) const {
    return next_N_[n];
  }

  // The row that comes after row n of token t on a walk over the tokens before `end`; kEnd if the next token has none.
  int64_t following(int64_t t, int64_t n, int64_t end) const {
    if (next_N_[n] != kEnd) {
      return next_N_[n];
    }
    return t + 1 < end ? first_T_[t + 1] : kEnd;
  }

  // Calls body(begin, end) for ranges of tokens, on all threads.
  template <class Body>
  void for_tokens(int64_t width, const Body& body) const {
    const int64_t rows_per_token = num_rows_ / std::max<int64_t>(num_tokens_, 1) + 1;
    torch::stable::parallel_for(0, num_tokens_, grain(width * rows_per_token), body);
  }

  // Calls zero(n) for every row that belongs to no token, on all threads.
  template <class Zero>
  void for_unfilled(int64_t width, const Zero& zero) const {
    if (num_unfilled_ == 0) {
      return;
    }
    torch::stable::parallel_for(0, num_rows_, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        if (token_N_[n] == kUnfilled) {
          zero(n);
        }
      }
    });
  }

 private:
  const int64_t* token_N_;
  int64_t num_rows_, num_tokens_, num_unfilled_ = 0;
  std::unique_ptr<int64_t[]> first_T_, next_N_;
};

}  // namespace epmoe::cpu
