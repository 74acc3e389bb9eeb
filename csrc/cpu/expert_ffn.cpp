#include "activation.h"
#include "experts.h"

namespace epmoe::cpu {
namespace {

struct Arguments {
  Tensor rows_RD;
  std::optional<Tensor> weight_R;
  Tensor w_in_LDX, w_out_LFD, counts_L;
  int64_t num_rows, hidden_width, width;
  Blocks blocks;
};

// Scratch rows for the experts that are computed at the same time.
int64_t scratch_rows(const Blocks& blocks, int64_t num_threads) {
  int64_t large = 0, small = 0;
  for (int64_t e = 0; e < blocks.num_experts(); ++e) {
    (is_large(blocks, e, num_threads) ? large : small) = std::max(is_large(blocks, e, num_threads) ? large : small, blocks.count(e));
  }
  return std::max(large, small * num_threads);
}
int64_t small_rows(const Blocks& blocks, int64_t num_threads) {
  int64_t small = 0;
  for (int64_t e = 0; e < blocks.num_experts(); ++e) {
    if (!is_large(blocks, e, num_threads)) small = std::max(small, blocks.count(e));
  }
  return small;
}

}  // namespace

std::tuple<Tensor, Tensor> expert_ffn(
    const Tensor& rows_in,
    const std::optional<Tensor>& weight_in,
    const Tensor& w_in,
    const Tensor& w_out,
    const Tensor& counts,
    std::optional<int64_t>,
    const std::string& kind) {
  const Check check("expert_ffn", DeviceType::CPU, rows_in);
  const Tensor rows_RD = check.floating(rows_in, "rows", {kAnySize, kAnySize});
  const Blocks blocks(check, counts, rows_RD.size(0));
  const int64_t num_rows = rows_RD.size(0), hidden_width = w_in.size(2), width = w_out.size(1);
  const Tensor hidden_RX = check.fresh(rows_RD, "hidden", {num_rows, hidden_width});
  const Tensor y_RD = check.fresh(rows_RD, "y", {num_rows, w_out.size(2)});
  const int64_t threads = torch::stable::get_num_threads();
  const Tensor act_SF = check.fresh(rows_RD, "act", {scratch_rows(blocks, threads), width});
  const int64_t small = small_rows(blocks, threads);
  Tensor rows_1RD = as_batch(rows_RD);
  Tensor w_in_LDX = detach(w_in), w_out_LFD = detach(w_out);
  for_kind(check, kind, [&]<class Kind>(Kind activation) {
    for_floating(rows_RD.scalar_type(), [&]<class Scalar>() {
      for_experts(blocks, [&](int64_t expert, int64_t thread) {
        const int64_t start = blocks.start_L1[expert], count = blocks.count(expert);
        if (count == 0) return;
        const Tensor hidden_1nX = part_of(hidden_RX, start, count);
        multiply(blocks.of(rows_1RD, expert), torch::stable::narrow(w_in_LDX, 0, expert, 1), hidden_1nX);
        const int64_t first = thread * small;
        const Scalar* hidden = hidden_RX.const_data_ptr<Scalar>() + start * hidden_width;
        Scalar* act = act_SF.mutable_data_ptr<Scalar>() + first * width;
        torch::stable::parallel_for(0, count, grain(8 * width), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            const Scalar* gate = hidden + r * hidden_width;
            activate_row(activation, gate, Kind::kGated ? gate + width : gate, compute_t<Scalar>{1}, width, act + r * width);
          }
        });
        multiply(part_of(act_SF, first, count), torch::stable::narrow(w_out_LFD, 0, expert, 1), part_of(y_RD, start, count));
      });
    });
  });
  return {y_RD, hidden_RX};
}

std::tuple<Tensor, Tensor, Tensor> expert_ffn_backward(
    const Tensor& d_y,
    const Tensor& rows_in,
    const std::optional<Tensor>& weight_in,
    const Tensor& w_in,
    const Tensor& w_out,
    const Tensor& counts,
    const Tensor& hidden_in,
    const std::string& kind) {
  const Check check("expert_ffn", DeviceType::CPU, rows_in);
  const Tensor rows_RD = check.floating(rows_in, "rows", {kAnySize, kAnySize});
  const Blocks blocks(check, counts, rows_RD.size(0));
  const int64_t num_rows = rows_RD.size(0), hidden_width = w_in.size(2), width = w_out.size(1);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t scratch = scratch_rows(blocks, threads), small = small_rows(blocks, threads);
  const Tensor act_SF = check.fresh(rows_RD, "act", {scratch, width});
  const Tensor d_hidden_SX = check.fresh(rows_RD, "d_hidden", {scratch, hidden_width});
  const Tensor d_rows_RD = check.fresh(rows_RD, "d_rows", {num_rows, rows_RD.size(1)});
  const Tensor d_w_in = check.fresh(rows_RD, "d_w_in", {blocks.num_experts(), w_in.size(1), w_in.size(2)});
  const Tensor d_w_out = check.fresh(rows_RD, "d_w_out", {blocks.num_experts(), w_out.size(1), w_out.size(2)});
  Tensor rows_1RD = as_batch(rows_RD), d_y_1RD = as_batch(d_y);
  Tensor w_in_LXD = torch::stable::transpose(detach(w_in), 1, 2), w_out_LDF = torch::stable::transpose(detach(w_out), 1, 2);
  for_kind(check, kind, [&]<class Kind>(Kind activation) {
    for_floating(rows_RD.scalar_type(), [&]<class Scalar>() {
      for_experts(blocks, [&](int64_t expert, int64_t thread) {
        const int64_t start = blocks.start_L1[expert], count = blocks.count(expert);
        Tensor d_w_in_1DX = part_of(d_w_in, expert * w_in.size(1), w_in.size(1));
        Tensor d_w_out_1FD = part_of(d_w_out, expert * w_out.size(1), w_out.size(1));
        if (count == 0) {
          torch::stable::zero_(d_w_in_1DX);
          torch::stable::zero_(d_w_out_1FD);
          return;
        }
        const int64_t first = thread * small;
        const Tensor d_y_1nD = blocks.of(d_y_1RD, expert);
        Tensor act_1nF = part_of(act_SF, first, count);
        Tensor d_hidden_1nX = part_of(d_hidden_SX, first, count);
        multiply(d_y_1nD, torch::stable::narrow(w_out_LDF, 0, expert, 1), act_1nF);
        const Scalar* hidden = hidden_in.const_data_ptr<Scalar>() + start * hidden_width;
        Scalar* act = act_SF.mutable_data_ptr<Scalar>() + first * width;
        Scalar* d_hidden = d_hidden_SX.mutable_data_ptr<Scalar>() + first * hidden_width;
        const int64_t up = Kind::kGated ? width : 0;
        torch::stable::parallel_for(0, count, grain(8 * width), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            const Scalar* gate = hidden + r * hidden_width;
            Scalar* d_gate = d_hidden + r * hidden_width;
            activate_row_backward(activation, act + r * width, gate, gate + up, compute_t<Scalar>{1}, width, d_gate, d_gate + up, act + r * width);
          }
        });
        multiply(torch::stable::transpose(act_1nF, 1, 2), d_y_1nD, d_w_out_1FD);
        multiply(d_hidden_1nX, torch::stable::narrow(w_in_LXD, 0, expert, 1), part_of(d_rows_RD, start, count));
        multiply(torch::stable::transpose(blocks.of(rows_1RD, expert), 1, 2), d_hidden_1nX, d_w_in_1DX);
      });
    });
  });
  return {d_rows_RD, d_w_in, d_w_out};
}

}  // namespace epmoe::cpu
