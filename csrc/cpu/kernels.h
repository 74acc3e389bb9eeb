// The CPU kernels. Their meaning is epmoe/ops/reference.py, function by function.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"

namespace epmoe::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> route_topk(
    const Tensor& logits_TE,
    const Tensor& valid_T,
    const std::optional<Tensor>& uniform_T,
    const std::optional<Tensor>& sample_T,
    const std::optional<Tensor>& position_T,
    int64_t top_k,
    bool normalize,
    const std::string& second_policy,
    double tau,
    int64_t seed,
    int64_t layer);

Tensor route_topk_backward(
    const Tensor& d_probs_TE,
    const Tensor& d_weights_TK,
    const Tensor& probs_TE,
    const Tensor& topk_ids_TK,
    const Tensor& chosen_logits_TK,
    const Tensor& active_TK,
    bool normalize);

std::tuple<Tensor, Tensor> assign_slots(
    const Tensor& expert_A,
    const Tensor& group_A,
    const Tensor& active_A,
    int64_t num_groups,
    int64_t num_experts,
    int64_t capacity);

Tensor permute(const Tensor& x_TD, const Tensor& token_N);

Tensor combine(
    const Tensor& rows_ND, const std::optional<Tensor>& weight_N, const Tensor& token_N, int64_t num_tokens);

std::tuple<Tensor, Tensor> combine_backward(
    const Tensor& d_y_TD, const Tensor& rows_ND, const Tensor& weight_N, const Tensor& token_N);

Tensor activate(const Tensor& hidden_RX, const std::optional<Tensor>& weight_R, const std::string& kind);

std::tuple<Tensor, Tensor, Tensor> activate_backward(
    const Tensor& d_act_RF, const Tensor& hidden_RX, const std::optional<Tensor>& weight_R, const std::string& kind);

Tensor grouped_gemm(const Tensor& rows_RD, const Tensor& weight_LDF, const Tensor& tokens_per_expert_L);

Tensor grouped_gemm_weight_grad(
    const Tensor& rows_RD, const Tensor& d_out_RF, const Tensor& tokens_per_expert_L);

// Rows per task of parallel_for: enough work that waking a thread pays.
inline int64_t grain(int64_t elements_per_row) {
  constexpr int64_t kElementsPerTask = 16384;
  return kElementsPerTask / (elements_per_row + 1) + 1;
}

}  // namespace epmoe::cpu
