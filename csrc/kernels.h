// The native kernels by device. Their meaning is epmoe/ops/reference.py and ffn.py, function by function.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"

namespace epmoe::cpu {
#include "signatures.inc"

std::tuple<Tensor, Tensor> expert_ffn(
    const Tensor& rows_RD,
    const std::optional<Tensor>& weight_R,
    const Tensor& w_in_LDX,
    const Tensor& w_out_LFD,
    const Tensor& tokens_per_expert_L,
    std::optional<int64_t> rows_per_expert,
    const std::string& activation);

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_ffn_backward(
    const Tensor& d_y_RD,
    const Tensor& rows_RD,
    const std::optional<Tensor>& weight_R,
    const Tensor& w_in_LDX,
    const Tensor& w_out_LFD,
    const Tensor& tokens_per_expert_L,
    std::optional<int64_t> rows_per_expert,
    const Tensor& hidden_RX,
    const std::string& activation,
    bool needs_rows,
    bool needs_w_in,
    bool needs_w_out);
}  // namespace epmoe::cpu

namespace epmoe::cuda {
#include "signatures.inc"

Tensor activate(const Tensor& hidden_RX, const std::optional<Tensor>& weight_R, const std::string& kind);

std::tuple<Tensor, Tensor, Tensor> activate_backward(
    const Tensor& d_act_RF, const Tensor& hidden_RX, const std::optional<Tensor>& weight_R, const std::string& kind);
}  // namespace epmoe::cuda
