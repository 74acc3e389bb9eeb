#include "route_topk.cuh"

#include "kernels.h"
#include "launch.h"
#include "operators.h"

namespace epmoe::cuda {
namespace {

constexpr int64_t kRouteThreads = 128;
constexpr int64_t kTokensPerBlock = kRouteThreads / kWarp;

template <class Scalar>
auto route_topk_kernel_for(int64_t num_experts) {
  if (num_experts <= 2 * kWarp) {
    return &route_topk_kernel<Scalar, 2>;
  }
  if (num_experts <= 8 * kWarp) {
    return &route_topk_kernel<Scalar, 8>;
  }
  return &route_topk_kernel<Scalar, 0>;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> route_topk(
    const Tensor& logits_in,
    const Tensor& valid_in,
    const std::optional<Tensor>& uniform_T,
    const std::optional<Tensor>& sample_T,
    const std::optional<Tensor>& position_T,
    int64_t top_k,
    bool normalize,
    const std::string& second_policy,
    double tau,
    int64_t seed,
    int64_t layer) {
  const RouteTopk given(
      kDevice, logits_in, valid_in, uniform_T, sample_T, position_T, top_k, normalize, second_policy, tau, seed, layer);
  const int64_t num_tokens = given.valid_T.size(0);
  if (num_tokens != 0) {
    const Launcher launch("route_topk", given.logits_TE);
    for_wide(given.logits_TE.scalar_type(), [&]<class Scalar>() {
      const RoutePointers<Scalar> data{
          num_tokens,
          given.logits_TE.const_data_ptr<Scalar>(),
          given.valid_T.const_data_ptr<bool>(),
          given.probs_TE.mutable_data_ptr<Scalar>(),
          given.ids_TK.mutable_data_ptr<int64_t>(),
          given.weights_TK.mutable_data_ptr<Scalar>(),
          given.active_TK.mutable_data_ptr<bool>()};
      launch(
          route_topk_kernel_for<Scalar>(given.options.num_experts),
          ceil_div(num_tokens, kTokensPerBlock), kRouteThreads, data, given.options, given.draws);
    });
  }
  return {given.probs_TE, given.ids_TK, given.weights_TK, given.active_TK};
}

Tensor route_topk_backward(
    const Tensor& d_probs_in,
    const Tensor& d_weights_in,
    const Tensor& probs_in,
    const Tensor& topk_ids_in,
    const Tensor& active_in,
    bool normalize) {
  const RouteTopkBackward given(
      kDevice, d_probs_in, d_weights_in, probs_in, topk_ids_in, active_in, normalize);
  const int64_t num_tokens = given.probs_TE.size(0);
  if (num_tokens != 0) {
    const Launcher launch("route_topk_backward", given.probs_TE);
    for_wide(given.probs_TE.scalar_type(), [&]<class Scalar>() {
      const RouteBackwardPointers<Scalar> data{
          num_tokens,
          given.d_probs_TE.const_data_ptr<Scalar>(),
          given.d_weights_TK.const_data_ptr<Scalar>(),
          given.probs_TE.const_data_ptr<Scalar>(),
          given.ids_TK.const_data_ptr<int64_t>(),
          given.active_TK.const_data_ptr<bool>(),
          given.d_logits_TE.mutable_data_ptr<Scalar>()};
      launch(
          &route_topk_backward_kernel<Scalar>,
          ceil_div(num_tokens, kTokensPerBlock), kRouteThreads, data, given.options);
    });
  }
  return given.d_logits_TE;
}

}  // namespace epmoe::cuda
