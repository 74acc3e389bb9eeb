// Consecutive blocks of rows, one for each expert: their products, and who computes them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "kernels.h"

namespace epmoe::cpu {

// out = a @ b by torch's GEMM, whatever library that is. Batches of one: measured 1 to 8% faster than mm of the same.
// The tensors must be detached: worker threads track gradients.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor detach(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Rows as the only matrix of a batch.
inline Tensor as_batch(const Tensor& rows_RX) {
  return torch::stable::unsqueeze(detach(rows_RX), 0);
}

// Consecutive rows of a new matrix, or of a stack of them, as the only matrix of a batch. Not a view: worker threads
// know nothing of inference mode, outside which nothing that was made inside may be written.
inline Tensor part_of(const Tensor& made, int64_t first_row, int64_t num_rows) {
  const int64_t width = made.size(made.dim() - 1);
  return torch::stable::from_blob(
      made.mutable_data_ptr(),
      {1, num_rows, width},
      {num_rows * width, width, 1},
      made.device(),
      made.scalar_type(),
      first_row * width);
}

// Consecutive blocks of rows, one for each expert.
struct Blocks {
  std::vector<int64_t> start_L1;

  Blocks(const Check& check, const Tensor& tokens_per_expert_L, int64_t num_rows)
      : start_L1(static_cast<size_t>(tokens_per_expert_L.size(0)) + 1) {
    const int64_t* count = tokens_per_expert_L.const_data_ptr<int64_t>();
    for (int64_t e = 0; e < num_experts(); ++e) {
      const int64_t left = num_rows - start_L1[e];
      EPMOE_CHECK(
          count[e] >= 0 && count[e] <= left,
          check.op, ": tokens_per_expert[", e, "]=", count[e], " must be in [0, ", left, "], the rows that are left");
      start_L1[e + 1] = start_L1[e] + count[e];
    }
    EPMOE_CHECK(
        start_L1.back() == num_rows,
        check.op, ": tokens_per_expert must add up to the ", num_rows, " rows, got ", start_L1.back());
  }

  int64_t num_experts() const {
    return static_cast<int64_t>(start_L1.size()) - 1;
  }
  int64_t count(int64_t expert) const {
    return start_L1[expert + 1] - start_L1[expert];
  }
  Tensor of(Tensor& rows_1RX, int64_t expert) const {
    return torch::stable::narrow(rows_1RX, 1, start_L1[expert], count(expert));
  }
};

inline bool is_large(const Blocks& blocks, int64_t expert, int64_t num_threads) {
  return num_threads == 1 || 2 * num_threads * blocks.count(expert) > blocks.start_L1.back();
}

// Calls body(expert, thread) for every expert. Small blocks are shared out among the threads, one GEMM on one core, as a
// batched GEMM would; an expert with a large share of the rows gets all threads for itself, one after the other.
template <class Body>
void for_experts(const Blocks& blocks, const Body& body) {
  const int64_t num_threads = torch::stable::get_num_threads();
  const int64_t num_experts = blocks.num_experts();
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    if (is_large(blocks, expert, num_threads)) {
      body(expert, 0);
    }
  }
  if (num_threads == 1) {
    return;
  }
  // Neighbours stay on one thread, or threads would wait for each other where new memory comes in large pages. Who has
  // finished its own experts helps with what is left of the others'.
  const auto first_of = [&](int64_t share) { return share * num_experts / num_threads; };
  std::vector<std::atomic<int64_t>> taken(static_cast<size_t>(num_threads));
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t turn = 0; turn < num_threads; ++turn) {
        const int64_t share = (thread + turn) % num_threads;
        const int64_t past = first_of(share + 1);
        for (int64_t expert; (expert = first_of(share) + taken[share]++) < past;) {
          if (!is_large(blocks, expert, num_threads)) {
            body(expert, thread);
          }
        }
      }
    }
  });
}

}  // namespace epmoe::cpu
