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
}  // namespace epmoe::cpu

namespace epmoe::cuda {
#include "signatures.inc"
}  // namespace epmoe::cuda
