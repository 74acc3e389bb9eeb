#include "activation.h"

namespace epmoe::cpu {
namespace {

// Both activation operators' inputs, checked.
struct Inputs {
  Tensor hidden_RX;
  std::optional<Tensor> weight_R;
  int64_t num_rows, hidden_width, width;

  Inputs(const Check& check, const Tensor& hidden, const std::optional<Tensor>& weight, const std::string& kind)
      : hidden_RX(check.floating(hidden, "hidden", {kAnySize, kAnySize})),
        num_rows(hidden_RX.size(0)),
        hidden_width(hidden_RX.size(1)) {
    if (weight.has_value()) {
      weight_R = torch::stable::to(
          check.floating(*weight, "weight", {num_rows}), compute_dtype(hidden_RX.scalar_type()));
    }
    for_kind(check, kind, [&]<class Kind>(Kind) {
      EPMOE_CHECK(
          !Kind::kGated || hidden_width % 2 == 0,
          check.op, ": hidden has ", hidden_width, " columns, but swiglu needs pairs of gate and up columns");
      width = Kind::kGated ? hidden_width / 2 : hidden_width;
    });
  }
};

constexpr int64_t kCost = 8;  // an activated element, in units of copied ones

}  // namespace

Tensor activate(const Tensor& hidden, const std::optional<Tensor>& weight_in, const std::string& kind) {
  const Check check("activate", DeviceType::CPU, hidden);
  const Inputs in(check, hidden, weight_in, kind);
  Tensor act_RF = check.fresh(in.hidden_RX, "act", {in.num_rows, in.width});
  if (in.num_rows == 0) {  // of any width, with which nothing is to be counted
    return act_RF;
  }
  for_kind(check, kind, [&]<class Kind>(Kind activation) {
    for_floating(in.hidden_RX.scalar_type(), [&]<class Scalar>() {
      const Scalar* hidden_rows = in.hidden_RX.const_data_ptr<Scalar>();
      const auto* weight = in.weight_R.has_value() ? in.weight_R->const_data_ptr<compute_t<Scalar>>() : nullptr;
      Scalar* act = act_RF.mutable_data_ptr<Scalar>();
      torch::stable::parallel_for(0, in.num_rows, grain(kCost * in.width), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const Scalar* gate = hidden_rows + r * in.hidden_width;
          const Scalar* up = Kind::kGated ? gate + in.width : gate;
          activate_row(activation, gate, up, weight == nullptr ? 1 : weight[r], in.width, act + r * in.width);
        }
      });
    });
  });
  return act_RF;
}

std::tuple<Tensor, Tensor, Tensor> activate_backward(
    const Tensor& d_act_in, const Tensor& hidden, const std::optional<Tensor>& weight_in, const std::string& kind) {
  const Check check("activate_backward", DeviceType::CPU, hidden);
  const Inputs in(check, hidden, weight_in, kind);
  const ScalarType dtype = in.hidden_RX.scalar_type();
  const Tensor d_act_RF = check.of(dtype, d_act_in, "d_act", {in.num_rows, in.width});
  Tensor d_hidden_RX = check.fresh(in.hidden_RX, "d_hidden", {in.num_rows, in.hidden_width});
  Tensor act_RF = check.fresh(in.hidden_RX, "act", {in.num_rows, in.width});
  Tensor d_weight_R = check.fresh(in.hidden_RX, "d_weight", {in.num_rows}, compute_dtype(dtype));
  if (in.num_rows == 0) {
    return {d_hidden_RX, act_RF, d_weight_R};
  }
  for_kind(check, kind, [&]<class Kind>(Kind activation) {
    for_floating(dtype, [&]<class Scalar>() {
      const Scalar* d_act = d_act_RF.const_data_ptr<Scalar>();
      const Scalar* hidden_rows = in.hidden_RX.const_data_ptr<Scalar>();
      const auto* weight = in.weight_R.has_value() ? in.weight_R->const_data_ptr<compute_t<Scalar>>() : nullptr;
      Scalar* d_hidden = d_hidden_RX.mutable_data_ptr<Scalar>();
      Scalar* act = act_RF.mutable_data_ptr<Scalar>();
      auto* d_weight = d_weight_R.mutable_data_ptr<compute_t<Scalar>>();
      const int64_t up_columns = Kind::kGated ? in.width : 0;
      torch::stable::parallel_for(0, in.num_rows, grain(kCost * in.width), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const Scalar* gate = hidden_rows + r * in.hidden_width;
          Scalar* d_gate = d_hidden + r * in.hidden_width;
          d_weight[r] = activate_row_backward(
              activation,
              d_act + r * in.width,
              gate,
              gate + up_columns,
              weight == nullptr ? 1 : weight[r],
              in.width,
              d_gate,
              d_gate + up_columns,
              act + r * in.width);
        }
      });
    });
  });
  return {d_hidden_RX, act_RF, d_weight_R};
}

}  // namespace epmoe::cpu
