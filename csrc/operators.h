// What each operator is given, checked, with memory for what it returns: the same on every device.
#pragma once

#include <optional>
#include <string>

#include "checks.h"
#include "routing.h"

namespace epmoe {

constexpr int64_t kDropless = -1;

inline SecondPolicy parse_policy(const std::string& name) {
  if (name == "all") {
    return SecondPolicy::all;
  }
  if (name == "none") {
    return SecondPolicy::none;
  }
  if (name == "threshold") {
    return SecondPolicy::threshold;
  }
  EPMOE_CHECK(
      name == "random", "route_topk: second_policy='", name, "' must be 'all', 'none', 'threshold' or 'random'");
  return SecondPolicy::random;
}

enum class Activation { swiglu, gelu, relu };

inline Activation parse_activation(const Check& check, const std::string& value, const char* name) {
  if (value == "swiglu") {
    return Activation::swiglu;
  }
  if (value == "gelu") {
    return Activation::gelu;
  }
  EPMOE_CHECK(value == "relu", check.op, ": ", name, "='", value, "' must be one of swiglu, gelu, relu");
  return Activation::relu;
}

// Activated columns of that many: gate and then up columns for swiglu.
inline int64_t activated_width(const Check& check, Activation activation, int64_t columns, const char* name) {
  if (activation != Activation::swiglu) {
    return columns;
  }
  EPMOE_CHECK(
      columns % 2 == 0,
      check.op, ": ", name, " has ", columns, " columns, but swiglu needs pairs of gate and up columns");
  return columns / 2;
}

struct RouteTopk {
  Tensor logits_TE, valid_T;
  std::optional<Tensor> uniform_T, sample_T, position_T;  // what `draws` points into
  Draws draws;
  RouteOptions options;
  Tensor probs_TE, ids_TK, weights_TK, active_TK;

  RouteTopk(
      DeviceType device,
      const Tensor& logits_in,
      const Tensor& valid_in,
      const std::optional<Tensor>& uniform_in,
      const std::optional<Tensor>& sample_in,
      const std::optional<Tensor>& position_in,
      int64_t top_k,
      bool normalize,
      const std::string& second_policy,
      double tau,
      int64_t seed,
      int64_t layer) {
    const Check check("route_topk", device, logits_in);
    logits_TE = check.wide(logits_in, "logits", {kAnySize, kAnySize});
    const int64_t num_tokens = logits_TE.size(0);
    const int64_t num_experts = logits_TE.size(1);
    valid_T = check.of(ScalarType::Bool, valid_in, "valid", {num_tokens});
    options = {num_experts, top_k, normalize, parse_policy(second_policy), tau};
    check.at_least(options.policy == SecondPolicy::all ? 1 : 2, top_k, "top_k");
    check.at_most(num_experts, top_k, "top_k");
    EPMOE_CHECK(
        tau > 0 || options.policy == SecondPolicy::all || options.policy == SecondPolicy::none,
        "route_topk: tau=", tau, " must be positive");
    if (options.policy == SecondPolicy::random) {
      take_draws(check, uniform_in, sample_in, position_in, num_tokens, seed, layer);
    }
    probs_TE = check.fresh(logits_TE, "probs", {num_tokens, num_experts});
    ids_TK = check.fresh(logits_TE, "ids", {num_tokens, top_k}, ScalarType::Long);
    weights_TK = check.fresh(logits_TE, "weights", {num_tokens, top_k});
    active_TK = check.fresh(logits_TE, "active", {num_tokens, top_k}, ScalarType::Bool);
  }

 private:
  void take_draws(
      const Check& check,
      const std::optional<Tensor>& uniform_in,
      const std::optional<Tensor>& sample_in,
      const std::optional<Tensor>& position_in,
      int64_t num_tokens,
      int64_t seed,
      int64_t layer) {
    const bool counted = sample_in.has_value() && position_in.has_value();
    EPMOE_CHECK(
        uniform_in.has_value() ? !sample_in.has_value() && !position_in.has_value() : counted,
        "route_topk: second_policy='random' needs either uniform or both sample and position");
    if (counted) {
      check.at_least(0, layer, "layer");
      check.at_most(kMaxLayer - 1, layer, "layer");
      sample_T = check.of(ScalarType::Long, *sample_in, "sample", {num_tokens});
      position_T = check.of(ScalarType::Long, *position_in, "position", {num_tokens});
      draws.sample = sample_T->const_data_ptr<int64_t>();
      draws.position = position_T->const_data_ptr<int64_t>();
      draws.seed = seed;
      draws.layer = layer;
      return;
    }
    uniform_T = check.wide(*uniform_in, "uniform", {num_tokens});
    if (uniform_T->scalar_type() == ScalarType::Float) {
      draws.uniform_float = uniform_T->const_data_ptr<float>();
    } else {
      draws.uniform_double = uniform_T->const_data_ptr<double>();
    }
  }
};

struct RouteTopkBackward {
  Tensor d_probs_TE, d_weights_TK, probs_TE, ids_TK, active_TK;
  RouteOptions options;
  Tensor d_logits_TE;

  RouteTopkBackward(
      DeviceType device,
      const Tensor& d_probs_in,
      const Tensor& d_weights_in,
      const Tensor& probs_in,
      const Tensor& topk_ids_in,
      const Tensor& active_in,
      bool normalize) {
    const Check check("route_topk_backward", device, probs_in);
    probs_TE = check.wide(probs_in, "probs", {kAnySize, kAnySize});
    const ScalarType dtype = probs_TE.scalar_type();
    const int64_t num_tokens = probs_TE.size(0);
    const int64_t num_experts = probs_TE.size(1);
    ids_TK = check.of(ScalarType::Long, topk_ids_in, "topk_ids", {num_tokens, kAnySize});
    const int64_t top_k = ids_TK.size(1);
    d_probs_TE = check.of(dtype, d_probs_in, "d_probs", {num_tokens, num_experts});
    d_weights_TK = check.of(dtype, d_weights_in, "d_weights", {num_tokens, top_k});
    active_TK = check.of(ScalarType::Bool, active_in, "active", {num_tokens, top_k});
    check.at_least(1, top_k, "top_k");
    options = {num_experts, top_k, normalize, SecondPolicy::all, 0.0};
    d_logits_TE = check.fresh(probs_TE, "d_logits", {num_tokens, num_experts});
  }
};

struct AssignSlots {
  Tensor expert_A, group_A, active_A;
  int64_t num_groups, num_experts, capacity;
  Tensor slot_A, demand_GE;

  AssignSlots(
      DeviceType device,
      const Tensor& expert_in,
      const Tensor& group_in,
      const Tensor& active_in,
      int64_t num_groups,
      int64_t num_experts,
      int64_t capacity)
      : num_groups(num_groups), num_experts(num_experts), capacity(capacity) {
    const Check check("assign_slots", device, expert_in);
    expert_A = check.of(ScalarType::Long, expert_in, "expert", {kAnySize});
    const int64_t num_entries = expert_A.size(0);
    group_A = check.of(ScalarType::Long, group_in, "group", {num_entries});
    active_A = check.of(ScalarType::Bool, active_in, "active", {num_entries});
    check.at_least(0, num_groups, "num_groups");
    check.at_least(0, num_experts, "num_experts");
    check.at_least(kDropless, capacity, "capacity");
    check.product(num_groups, num_experts, "num_groups*num_experts");
    slot_A = check.fresh(expert_A, "slot", {num_entries});
    demand_GE = check.fresh(expert_A, "demand", {num_groups, num_experts});
  }
};

struct Uniform {
  Tensor sample_T, position_T;
  int64_t num_tokens, num_lanes, first_block;
  Tensor draws_TL;

  Uniform(
      DeviceType device,
      const Tensor& sample_in,
      const Tensor& position_in,
      int64_t stream,
      int64_t layer,
      int64_t lanes,
      int64_t first_lane) {
    const Check check("uniform", device, sample_in);
    sample_T = check.of(ScalarType::Long, sample_in, "sample", {kAnySize});
    num_tokens = sample_T.size(0);
    position_T = check.of(ScalarType::Long, position_in, "position", {num_tokens});
    check.at_least(0, stream, "stream");
    check.at_most(kMaxStream, stream, "stream");
    check.at_least(0, layer, "layer");
    check.at_most(kMaxLayer - 1, layer, "layer");
    check.at_least(0, lanes, "num_lanes");
    check.at_least(0, first_lane, "first_lane");
    EPMOE_CHECK(first_lane % 4 == 0, "uniform: first_lane=", first_lane, " must be a multiple of 4");
    num_lanes = lanes;
    first_block = first_lane / 4;
    draws_TL = check.fresh(sample_T, "draws", {num_tokens, num_lanes}, ScalarType::Float);
  }
};

struct Permute {
  Tensor x_TD, token_N;
  int64_t num_tokens, num_rows, width;
  Tensor rows_ND;

  Permute(DeviceType device, const Tensor& x_in, const Tensor& token_in) {
    const Check check("permute", device, x_in);
    x_TD = check.floating(x_in, "x", {kAnySize, kAnySize});
    token_N = check.of(ScalarType::Long, token_in, "token", {kAnySize});
    num_tokens = x_TD.size(0);
    num_rows = token_N.size(0);
    width = x_TD.size(1);
    rows_ND = check.fresh(x_TD, "rows", {num_rows, width});
  }
};

struct Combine {
  Tensor rows_ND, token_N;
  std::optional<Tensor> weight_N;
  int64_t num_rows, width;
  Tensor y_TD;

  Combine(
      DeviceType device,
      const Tensor& rows_in,
      const std::optional<Tensor>& weight_in,
      const Tensor& token_in,
      int64_t num_tokens) {
    const Check check("combine", device, rows_in);
    rows_ND = check.floating(rows_in, "rows", {kAnySize, kAnySize});
    num_rows = rows_ND.size(0);
    width = rows_ND.size(1);
    token_N = check.of(ScalarType::Long, token_in, "token", {num_rows});
    if (weight_in.has_value()) {
      weight_N = torch::stable::to(
          check.floating(*weight_in, "weight", {num_rows}), compute_dtype(rows_ND.scalar_type()));
    }
    check.at_least(0, num_tokens, "num_tokens");
    y_TD = check.fresh(rows_ND, "y", {num_tokens, width});
  }
};

struct CombineBackward {
  Tensor d_y_TD, rows_ND, weight_N, token_N;
  int64_t num_rows, width, num_tokens;
  Tensor d_rows_ND, d_weight_N;  // the latter in the compute dtype

  CombineBackward(
      DeviceType device,
      const Tensor& d_y_in,
      const Tensor& rows_in,
      const Tensor& weight_in,
      const Tensor& token_in) {
    const Check check("combine_backward", device, rows_in);
    rows_ND = check.floating(rows_in, "rows", {kAnySize, kAnySize});
    num_rows = rows_ND.size(0);
    width = rows_ND.size(1);
    d_y_TD = check.of(rows_ND.scalar_type(), d_y_in, "d_y", {kAnySize, width});
    num_tokens = d_y_TD.size(0);
    weight_N = torch::stable::to(
        check.floating(weight_in, "weight", {num_rows}), compute_dtype(rows_ND.scalar_type()));
    token_N = check.of(ScalarType::Long, token_in, "token", {num_rows});
    d_rows_ND = check.fresh(rows_ND, "d_rows", {num_rows, width});
    d_weight_N = check.fresh(weight_N, "d_weight", {num_rows});
  }
};

// What both activation operators are given.
struct Activated {
  Tensor hidden_RX;
  std::optional<Tensor> weight_R;
  Activation activation;
  int64_t num_rows, hidden_width, width;

  Activated(
      const Check& check, const Tensor& hidden_in, const std::optional<Tensor>& weight_in, const std::string& kind)
      : hidden_RX(check.floating(hidden_in, "hidden", {kAnySize, kAnySize})),
        num_rows(hidden_RX.size(0)),
        hidden_width(hidden_RX.size(1)) {
    if (weight_in.has_value()) {
      weight_R = torch::stable::to(
          check.floating(*weight_in, "weight", {num_rows}), compute_dtype(hidden_RX.scalar_type()));
    }
    activation = parse_activation(check, kind, "kind");
    width = activated_width(check, activation, hidden_width, "hidden");
  }
};

struct Activate : Activated {
  Tensor act_RF;

  Activate(const Check& check, const Tensor& hidden_in, const std::optional<Tensor>& weight_in, const std::string& kind)
      : Activated(check, hidden_in, weight_in, kind),
        act_RF(check.fresh(hidden_RX, "act", {num_rows, width})) {}
};

struct ActivateBackward : Activated {
  Tensor d_act_RF, d_hidden_RX, act_RF, d_weight_R;  // the latter in the compute dtype

  ActivateBackward(
      const Check& check,
      const Tensor& d_act_in,
      const Tensor& hidden_in,
      const std::optional<Tensor>& weight_in,
      const std::string& kind)
      : Activated(check, hidden_in, weight_in, kind),
        d_act_RF(check.of(hidden_RX.scalar_type(), d_act_in, "d_act", {num_rows, width})),
        d_hidden_RX(check.fresh(hidden_RX, "d_hidden", {num_rows, hidden_width})),
        act_RF(check.fresh(hidden_RX, "act", {num_rows, width})),
        d_weight_R(check.fresh(hidden_RX, "d_weight", {num_rows}, compute_dtype(hidden_RX.scalar_type()))) {}
};

}  // namespace epmoe
