#include "experts.h"

namespace epmoe::cpu {

Tensor grouped_gemm(const Tensor& rows_in, const Tensor& weight_in, const Tensor& tokens_per_expert_in) {
  const Check check("grouped_gemm", DeviceType::CPU, rows_in);
  const Tensor rows_RD = check.floating(rows_in, "rows", {kAnySize, kAnySize});
  check.dtype(rows_RD.scalar_type(), weight_in, "weight");
  check.shaped(weight_in, "weight", {kAnySize, rows_RD.size(1), kAnySize});
  const Tensor tokens_per_expert_L =
      check.of(ScalarType::Long, tokens_per_expert_in, "tokens_per_expert", {weight_in.size(0)});
  const Blocks blocks(check, tokens_per_expert_L, rows_RD.size(0));

  const Tensor out_RF = check.fresh(rows_RD, "out", {rows_RD.size(0), weight_in.size(2)});
  Tensor rows_1RD = as_batch(rows_RD);
  Tensor weight_LDF = detach(weight_in);
  for_experts(blocks, [&](int64_t expert, int64_t) {
    if (blocks.count(expert) > 0) {
      const Tensor out_1nF = part_of(out_RF, blocks.start_L1[expert], blocks.count(expert));
      multiply(blocks.of(rows_1RD, expert), torch::stable::narrow(weight_LDF, 0, expert, 1), out_1nF);
    }
  });
  return out_RF;
}

Tensor grouped_gemm_weight_grad(const Tensor& rows_in, const Tensor& d_out_in, const Tensor& tokens_per_expert_in) {
  const Check check("grouped_gemm_weight_grad", DeviceType::CPU, rows_in);
  const Tensor rows_RD = check.floating(rows_in, "rows", {kAnySize, kAnySize});
  const Tensor d_out_RF = check.of(rows_RD.scalar_type(), d_out_in, "d_out", {rows_RD.size(0), kAnySize});
  const Tensor tokens_per_expert_L =
      check.of(ScalarType::Long, tokens_per_expert_in, "tokens_per_expert", {kAnySize});
  const Blocks blocks(check, tokens_per_expert_L, rows_RD.size(0));

  const Tensor d_weight_LDF =
      check.fresh(rows_RD, "d_weight", {blocks.num_experts(), rows_RD.size(1), d_out_RF.size(1)});
  Tensor rows_1RD = as_batch(rows_RD);
  Tensor d_out_1RF = as_batch(d_out_RF);
  for_experts(blocks, [&](int64_t expert, int64_t) {
    Tensor d_weight_1DF = part_of(d_weight_LDF, expert * rows_RD.size(1), rows_RD.size(1));
    if (blocks.count(expert) > 0) {
      multiply(torch::stable::transpose(blocks.of(rows_1RD, expert), 1, 2), blocks.of(d_out_1RF, expert), d_weight_1DF);
    } else {
      torch::stable::zero_(d_weight_1DF);
    }
  });
  return d_weight_LDF;
}

}  // namespace epmoe::cpu
