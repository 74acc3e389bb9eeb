// The native kernels by device. Their meaning is epmoe/ops/reference.py, function by function.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"

namespace epmoe::cpu {
#include "signatures.inc"

Tensor activate(const Tensor& hidden_RX, const std::optional<Tensor>& weight_R, const std::string& kind);

std::tuple<Tensor, Tensor, Tensor> activate_backward(
    const Tensor& d_act_RF, const Tensor& hidden_RX, const std::optional<Tensor>& weight_R, const std::string& kind);

Tensor grouped_gemm(const Tensor& rows_RD, const Tensor& weight_LDF, const Tensor& tokens_per_expert_L);

Tensor grouped_gemm_weight_grad(
    const Tensor& rows_RD, const Tensor& d_out_RF, const Tensor& tokens_per_expert_L);

std::tuple<Tensor, Tensor> expert_ffn(
    const Tensor& rows_in,
    const std::optional<Tensor>& weight_in,
    const Tensor& w_in,
    const Tensor& w_out,
    const Tensor& counts,
    std::optional<int64_t>,
    const std::string& kind);
std::tuple<Tensor, Tensor, Tensor> expert_ffn_backward(
    const Tensor& d_y,
    const Tensor& rows_in,
    const std::optional<Tensor>& weight_in,
    const Tensor& w_in,
    const Tensor& w_out,
    const Tensor& counts,
    const Tensor& hidden_in,
    const std::string& kind);
}  // namespace epmoe::cpu

namespace epmoe::cuda {
#include "signatures.inc"
}  // namespace epmoe::cuda
