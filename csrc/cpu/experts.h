// Consecutive blocks of rows, one for each expert: their products, who computes them, and memory for what lies between.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "kernels.h"

namespace epmoe::cpu {

// A matrix in memory that a tensor holds.
struct Matrix {
  char* data;
  ScalarType dtype;
  int64_t num_rows, num_columns, row_stride, column_stride;

  Matrix transposed() const {
    return {data, dtype, num_columns, num_rows, column_stride, row_stride};
  }

  // As a batch of one. Not a view: those are made by the dispatcher, and worker threads know nothing of inference mode,
  // outside which nothing that was made inside may be written, nor that no gradients are wanted.
  Tensor tensor() const {
    return torch::stable::from_blob(
        data,
        {1, num_rows, num_columns},
        {num_rows * num_columns, row_stride, column_stride},
        torch::stable::Device(DeviceType::CPU),
        dtype);
  }
};

// Matrix `index` of a stack of any strides.
inline Matrix matrix_of(const Tensor& stack_LXY, int64_t index) {
  const auto* data = static_cast<const char*>(stack_LXY.const_data_ptr());
  const auto size = static_cast<int64_t>(stack_LXY.element_size());
  return {
      const_cast<char*>(data) + index * stack_LXY.stride(0) * size,
      stack_LXY.scalar_type(),
      stack_LXY.size(1),
      stack_LXY.size(2),
      stack_LXY.stride(1),
      stack_LXY.stride(2)};
}

// `count` rows from `first` on, of a contiguous matrix.
inline Matrix rows_of(const Tensor& rows_RX, int64_t first, int64_t count) {
  const auto* data = static_cast<const char*>(rows_RX.const_data_ptr());
  const int64_t width = rows_RX.size(1);
  const auto size = static_cast<int64_t>(rows_RX.element_size());
  return {const_cast<char*>(data) + first * width * size, rows_RX.scalar_type(), count, width, width, 1};
}

// out = a @ b by torch's GEMM, whatever library that is. Batches of one: measured 1 to 8% faster than mm of the same.
inline void multiply(const Matrix& a, const Matrix& b, const Matrix& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a.tensor()), from(b.tensor()), from(out.tensor())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// Consecutive blocks of rows, one for each expert, and how they are shared out among the threads.
struct Blocks {
  std::vector<int64_t> start_L1;
  int64_t num_threads = 1;

  Blocks() = default;

  // Of equal size, where that is known; else as they are counted.
  Blocks(
      const Check& check,
      const Tensor& tokens_per_expert_L,
      std::optional<int64_t> rows_per_expert,
      int64_t num_rows)
      : start_L1(static_cast<size_t>(tokens_per_expert_L.size(0)) + 1), num_threads(torch::stable::get_num_threads()) {
    if (rows_per_expert.has_value()) {
      const int64_t even = num_experts() == 0 ? 0 : num_rows / num_experts();
      EPMOE_CHECK(
          even * num_experts() == num_rows && (num_experts() == 0 || *rows_per_expert == even),
          check.op, ": rows_per_expert=", *rows_per_expert, " of ", num_experts(), " experts must be the ", num_rows,
          " rows");
      for (int64_t e = 0; e < num_experts(); ++e) {
        start_L1[e + 1] = start_L1[e] + even;
      }
      return;
    }
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
  // More than half of what one thread would have, if all had the same.
  bool is_large(int64_t expert) const {
    return num_threads == 1 || count(expert) > start_L1.back() / (2 * num_threads);
  }
  int64_t most_rows(bool large) const {
    int64_t most = 0;
    for (int64_t e = 0; e < num_experts(); ++e) {
      most = is_large(e) == large ? std::max(most, count(e)) : most;
    }
    return most;
  }
};

// Rows for one expert at a time: one for each thread that computes small ones, or a single large one. Together never
// more rows than the blocks have, but for the gaps. A thread's memory begins a whole number of cache lines after
// another's, so that no two write to one line, and so that a GEMM that looks at alignment sees the same one everywhere.
struct Scratch {
  int64_t width, stride;
  Tensor memory_N;

  Scratch(const Check& check, const Tensor& like, const char* name, const Blocks& blocks, int64_t width)
      : width(width), stride((blocks.most_rows(false) * width + kLine - 1) / kLine * kLine) {
    const int64_t size = std::max(blocks.most_rows(true) * width, blocks.num_threads * stride);
    memory_N = check.fresh(like, name, {size});
  }

  Matrix rows(int64_t thread, int64_t count) const {
    auto* data = static_cast<char*>(memory_N.mutable_data_ptr());
    const int64_t bytes = thread * stride * static_cast<int64_t>(memory_N.element_size());
    return {data + bytes, memory_N.scalar_type(), count, width, width, 1};
  }

 private:
  static constexpr int64_t kLine = 64;  // numbers, of two bytes or more
};

// Calls body(expert, thread) for every expert. Small blocks are shared out among the threads, one GEMM on one core, as
// a batched GEMM would; an expert with a large share of the rows gets all threads for itself, one after the other.
// Which is which follows from the counts and the number of threads, so that equal calls give equal bits; which thread
// computes a small block does not matter for them.
template <class Body>
void for_experts(const Blocks& blocks, const Body& body) {
  const int64_t num_threads = blocks.num_threads;
  const int64_t num_experts = blocks.num_experts();
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    if (blocks.is_large(expert)) {
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
          if (!blocks.is_large(expert)) {
            body(expert, thread);
          }
        }
      }
    }
  });
}

}  // namespace epmoe::cpu
