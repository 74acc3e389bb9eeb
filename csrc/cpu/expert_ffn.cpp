#include <optional>

#include "activation.h"
#include "experts.h"

namespace epmoe::cpu {
namespace {

constexpr int64_t kCost = 8;  // an activated element, in units of copied ones

// What both operators are given, checked. The matrices may have any strides: torch's GEMM reads them.
struct Given {
  Tensor rows_RD, w_in_LDX, w_out_LFD;
  std::optional<Tensor> weight_R;
  Activation activation;
  int64_t num_rows, hidden_width, width;
  Blocks blocks;

  Given(
      const Check& check,
      const Tensor& rows_in,
      const std::optional<Tensor>& weight_in,
      const Tensor& w_in,
      const Tensor& w_out,
      const Tensor& tokens_per_expert_in,
      std::optional<int64_t> rows_per_expert,
      const std::string& kind)
      : rows_RD(check.floating(rows_in, "rows", {kAnySize, kAnySize})),
        w_in_LDX(w_in),
        w_out_LFD(w_out),
        num_rows(rows_RD.size(0)) {
    const ScalarType dtype = rows_RD.scalar_type();
    if (weight_in.has_value()) {
      weight_R =
          torch::stable::to(check.floating(*weight_in, "weight", {num_rows}), compute_dtype(dtype));
    }
    activation = parse_activation(check, kind, "activation");
    check.dtype(dtype, w_in, "w_in");
    check.shaped(w_in, "w_in", {kAnySize, rows_RD.size(1), kAnySize});
    const int64_t num_experts = w_in.size(0);
    hidden_width = w_in.size(2);
    width = activated_width(check, activation, hidden_width, "w_in");
    check.dtype(dtype, w_out, "w_out");
    check.shaped(w_out, "w_out", {num_experts, width, kAnySize});
    const Tensor counts_L = check.of(ScalarType::Long, tokens_per_expert_in, "tokens_per_expert", {num_experts});
    blocks = Blocks(check, counts_L, rows_per_expert, num_rows);
  }
};

// Calls body(r) for the rows of a block, on all threads that are free.
template <class Body>
void for_rows(const Given& given, int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, grain(kCost * given.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      body(r);
    }
  });
}

// act = weight * activation(hidden), for the rows from `start` on.
void activate(const Given& given, int64_t start, const Matrix& hidden_nX, const Matrix& act_nF) {
  if (given.width == 0) {  // of any number of rows, which are not to be counted
    return;
  }
  for_activation(given.activation, [&]<class Kind>(Kind kind) {
    for_floating(hidden_nX.dtype, [&]<class Scalar>() {
      const auto* weight = given.weight_R.has_value() ? given.weight_R->const_data_ptr<compute_t<Scalar>>() : nullptr;
      const auto* hidden = reinterpret_cast<const Scalar*>(hidden_nX.data);
      auto* act = reinterpret_cast<Scalar*>(act_nF.data);
      for_rows(given, hidden_nX.num_rows, [&](int64_t r) {
        const Scalar* gate = hidden + r * given.hidden_width;
        const Scalar* up = Kind::kGated ? gate + given.width : gate;
        activate_row(kind, gate, up, weight == nullptr ? 1 : weight[start + r], given.width, act + r * given.width);
      });
    });
  });
}

// act, the gradient of the activation, becomes the weighted activation; d_hidden and d_weight are written.
void activate_backward(
    const Given& given,
    int64_t start,
    const Matrix& hidden_nX,
    const Matrix& act_nF,
    const Matrix& d_hidden_nX,
    const Tensor& d_weight_R) {
  if (given.width == 0 && !given.weight_R.has_value()) {
    return;
  }
  for_activation(given.activation, [&]<class Kind>(Kind kind) {
    for_floating(hidden_nX.dtype, [&]<class Scalar>() {
      const bool weighted = given.weight_R.has_value();
      const auto* weight = weighted ? given.weight_R->const_data_ptr<compute_t<Scalar>>() : nullptr;
      auto* d_weight = weighted ? d_weight_R.mutable_data_ptr<compute_t<Scalar>>() : nullptr;
      const auto* hidden = reinterpret_cast<const Scalar*>(hidden_nX.data);
      auto* act = reinterpret_cast<Scalar*>(act_nF.data);
      auto* d_hidden = reinterpret_cast<Scalar*>(d_hidden_nX.data);
      const int64_t up = Kind::kGated ? given.width : 0;
      for_rows(given, hidden_nX.num_rows, [&](int64_t r) {
        const Scalar* gate = hidden + r * given.hidden_width;
        Scalar* d_gate = d_hidden + r * given.hidden_width;
        const auto dot = activate_row_backward(
            kind, gate, gate + up, weighted ? weight[start + r] : 1, given.width, d_gate, d_gate + up,
            act + r * given.width);
        if (weighted) {
          d_weight[start + r] = dot;
        }
      });
    });
  });
}

// The result if it is wanted, else nothing.
Tensor wanted(
    bool needed, const Check& check, const Tensor& like, const char* name, std::initializer_list<int64_t> sizes) {
  return needed ? check.fresh(like, name, sizes) : check.fresh(like, name, {0});
}

}  // namespace

// Per expert, while its rows are in the cache: product, activation, product.
std::tuple<Tensor, Tensor> expert_ffn(
    const Tensor& rows_in,
    const std::optional<Tensor>& weight_in,
    const Tensor& w_in,
    const Tensor& w_out,
    const Tensor& tokens_per_expert_in,
    std::optional<int64_t> rows_per_expert,
    const std::string& activation) {
  const Check check("expert_ffn", DeviceType::CPU, rows_in);
  const Given given(check, rows_in, weight_in, w_in, w_out, tokens_per_expert_in, rows_per_expert, activation);
  const Blocks& blocks = given.blocks;
  const Tensor hidden_RX = check.fresh(given.rows_RD, "hidden", {given.num_rows, given.hidden_width});
  const Tensor y_RD = check.fresh(given.rows_RD, "y", {given.num_rows, w_out.size(2)});
  const Scratch act(check, given.rows_RD, "act", blocks, given.width);
  for_experts(blocks, [&](int64_t expert, int64_t thread) {
    const int64_t start = blocks.start_L1[expert], count = blocks.count(expert);
    if (count == 0) {
      return;
    }
    const Matrix hidden_nX = rows_of(hidden_RX, start, count), act_nF = act.rows(thread, count);
    multiply(rows_of(given.rows_RD, start, count), matrix_of(given.w_in_LDX, expert), hidden_nX);
    activate(given, start, hidden_nX, act_nF);
    multiply(act_nF, matrix_of(given.w_out_LFD, expert), rows_of(y_RD, start, count));
  });
  return {y_RD, hidden_RX};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_ffn_backward(
    const Tensor& d_y_in,
    const Tensor& rows_in,
    const std::optional<Tensor>& weight_in,
    const Tensor& w_in,
    const Tensor& w_out,
    const Tensor& tokens_per_expert_in,
    std::optional<int64_t> rows_per_expert,
    const Tensor& hidden_in,
    const std::string& activation,
    bool needs_rows,
    bool needs_w_in,
    bool needs_w_out) {
  const Check check("expert_ffn_backward", DeviceType::CPU, rows_in);
  const Given given(check, rows_in, weight_in, w_in, w_out, tokens_per_expert_in, rows_per_expert, activation);
  const Blocks& blocks = given.blocks;
  const Tensor& like = given.rows_RD;
  const ScalarType dtype = like.scalar_type();
  const int64_t num_experts = blocks.num_experts(), d_model = like.size(1), d_out = w_out.size(2);
  const Tensor hidden_RX = check.of(dtype, hidden_in, "hidden", {given.num_rows, given.hidden_width});
  const Tensor d_y_RD = check.of(dtype, d_y_in, "d_y", {given.num_rows, d_out});
  const Tensor d_rows_RD = wanted(needs_rows, check, like, "d_rows", {given.num_rows, d_model});
  const Tensor d_w_in_LDX = wanted(needs_w_in, check, like, "d_w_in", {num_experts, d_model, given.hidden_width});
  const Tensor d_w_out_LFD = wanted(needs_w_out, check, like, "d_w_out", {num_experts, given.width, d_out});
  const Tensor d_weight_R =
      check.fresh(like, "d_weight", {given.weight_R.has_value() ? given.num_rows : 0}, compute_dtype(dtype));
  const Scratch act(check, like, "act", blocks, given.width);
  const Scratch d_hidden(check, like, "d_hidden", blocks, given.hidden_width);
  for_experts(blocks, [&](int64_t expert, int64_t thread) {
    const int64_t start = blocks.start_L1[expert], count = blocks.count(expert);
    // An expert without rows still has gradients of its matrices: products of no rows, which are zeros.
    const Matrix rows_nD = rows_of(like, start, count), d_y_nD = rows_of(d_y_RD, start, count);
    const Matrix act_nF = act.rows(thread, count), d_hidden_nX = d_hidden.rows(thread, count);
    if (count > 0) {
      multiply(d_y_nD, matrix_of(given.w_out_LFD, expert).transposed(), act_nF);
      activate_backward(given, start, rows_of(hidden_RX, start, count), act_nF, d_hidden_nX, d_weight_R);
    }
    if (needs_w_out) {
      multiply(act_nF.transposed(), d_y_nD, matrix_of(d_w_out_LFD, expert));
    }
    if (needs_rows && count > 0) {
      multiply(d_hidden_nX, matrix_of(given.w_in_LDX, expert).transposed(), rows_of(d_rows_RD, start, count));
    }
    if (needs_w_in) {
      multiply(rows_nD.transposed(), d_hidden_nX, matrix_of(d_w_in_LDX, expert));
    }
  });
  const ScalarType weight_dtype = weight_in.has_value() ? weight_in->scalar_type() : compute_dtype(dtype);
  return {d_rows_RD, torch::stable::to(d_weight_R, weight_dtype), d_w_in_LDX, d_w_out_LFD};
}

}  // namespace epmoe::cpu
