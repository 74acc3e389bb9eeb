#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"
#include "philox.h"

namespace epmoe::cpu {
namespace {

enum class SecondPolicy { all, none, threshold, random };

SecondPolicy parse_policy(const std::string& name) {
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

// No NaN or +inf logit, at least one finite logit.
template <class Scalar>
bool is_usable(const Scalar* logits, int64_t num_experts) {
  constexpr Scalar kInfinity = std::numeric_limits<Scalar>::infinity();
  int broken = 0;
  int finite = 0;
#pragma omp simd reduction(| : broken, finite)
  for (int64_t e = 0; e < num_experts; ++e) {
    broken |= !(logits[e] < kInfinity);
    finite |= logits[e] > -kInfinity;
  }
  return finite != 0 && broken == 0;
}

// The experts of the largest logits in falling order; of equal ones the lowest expert first.
template <class Scalar>
void choose(const Scalar* logits, int64_t num_experts, int64_t top_k, std::vector<int64_t>& order, int64_t* ids) {
  constexpr int64_t kInsertionLimit = 8;
  if (top_k > kInsertionLimit) {
    for (int64_t e = 0; e < num_experts; ++e) {
      order[e] = e;
    }
    std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int64_t a, int64_t b) {
      return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
    std::copy_n(order.begin(), top_k, ids);
    return;
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    if (e >= top_k && !(logits[e] > logits[ids[top_k - 1]])) {
      continue;
    }
    int64_t place = std::min(e, top_k - 1);
    for (; place > 0 && logits[e] > logits[ids[place - 1]]; --place) {
      ids[place] = ids[place - 1];
    }
    ids[place] = e;
  }
}

// A row of finite or -inf logits with its largest, turned into probabilities; `probs` may be `logits`.
template <class Scalar>
void softmax(const Scalar* logits, Scalar largest, int64_t count, Scalar* probs) {
  for (int64_t i = 0; i < count; ++i) {
    probs[i] = std::exp(logits[i] - largest);
  }
  Lanes<Scalar, kRouterLanes> lanes;
  for_lanes<kRouterLanes>(count, [&](int64_t i, int64_t lane) { lanes.partial[lane] += probs[i]; });
  const Scalar sum = lanes.total();
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    probs[i] /= sum;
  }
}

// In float64 and without contraction, so that every device decides alike.
bool second_is_used(SecondPolicy policy, double first, double second, double tau, double draw) {
  if (policy == SecondPolicy::none) {
    return false;
  }
  const double twice_a2 = 2.0 / (1.0 + std::exp(first - second));
  return policy == SecondPolicy::threshold ? twice_a2 > 2.0 * tau : twice_a2 * (0.5 / tau) > draw;
}

// Where the draws of the second-expert decision come from: numbers, or Philox counters. Holds what it points into.
struct Draws {
  std::optional<Tensor> uniform_T, sample_T, position_T;
  const float* uniform_float = nullptr;
  const double* uniform_double = nullptr;
  const int64_t* sample = nullptr;
  const int64_t* position = nullptr;
  int64_t seed = 0;
  int64_t layer = 0;

  double of(int64_t t) const {
    if (uniform_float != nullptr) {
      return uniform_float[t];
    }
    if (uniform_double != nullptr) {
      return uniform_double[t];
    }
    return sample == nullptr ? 0.0 : philox_uniform(seed, kSecondExpertStream, layer, sample[t], position[t]);
  }
};

Draws checked_draws(
    const Check& check,
    const std::optional<Tensor>& uniform_T,
    const std::optional<Tensor>& sample_T,
    const std::optional<Tensor>& position_T,
    int64_t num_tokens,
    int64_t seed,
    int64_t layer) {
  const bool counted = sample_T.has_value() && position_T.has_value();
  EPMOE_CHECK(
      uniform_T.has_value() ? !sample_T.has_value() && !position_T.has_value() : counted,
      "route_topk: second_policy='random' needs either uniform or both sample and position");
  Draws draws;
  if (counted) {
    check.at_least(0, layer, "layer");
    check.at_most(kMaxLayer - 1, layer, "layer");
    draws.sample_T = check.of(ScalarType::Long, *sample_T, "sample", {num_tokens});
    draws.position_T = check.of(ScalarType::Long, *position_T, "position", {num_tokens});
    draws.sample = draws.sample_T->const_data_ptr<int64_t>();
    draws.position = draws.position_T->const_data_ptr<int64_t>();
    draws.seed = seed;
    draws.layer = layer;
    return draws;
  }
  draws.uniform_T = check.wide(*uniform_T, "uniform", {num_tokens});
  if (draws.uniform_T->scalar_type() == ScalarType::Float) {
    draws.uniform_float = draws.uniform_T->const_data_ptr<float>();
  } else {
    draws.uniform_double = draws.uniform_T->const_data_ptr<double>();
  }
  return draws;
}

struct Options {
  int64_t num_experts;
  int64_t top_k;
  bool normalize;
  SecondPolicy policy;
  double tau;
};

template <class Scalar>
void route_row(
    const Scalar* logits,
    bool valid,
    double draw,
    const Options& options,
    std::vector<int64_t>& order,
    Scalar* probs,
    int64_t* ids,
    Scalar* weights,
    bool* active) {
  const int64_t num_experts = options.num_experts;
  const int64_t top_k = options.top_k;
  if (!valid || !is_usable(logits, num_experts)) {
    std::fill_n(probs, num_experts, Scalar{0});
    std::fill_n(weights, top_k, Scalar{0});
    std::fill_n(active, top_k, false);
    for (int64_t k = 0; k < top_k; ++k) {
      ids[k] = k;
    }
    return;
  }
  choose(logits, num_experts, top_k, order, ids);
  const Scalar largest = logits[ids[0]];
  softmax(logits, largest, num_experts, probs);
  for (int64_t k = 0; k < top_k; ++k) {
    active[k] = std::isfinite(logits[ids[k]]);
    weights[k] = options.normalize ? logits[ids[k]] : probs[ids[k]];
  }
  if (options.policy != SecondPolicy::all) {
    active[1] &= second_is_used(options.policy, largest, logits[ids[1]], options.tau, draw);
  }
  if (options.normalize) {
    softmax(weights, largest, top_k, weights);
  }
  for (int64_t k = 0; k < top_k; ++k) {
    weights[k] = active[k] ? weights[k] : Scalar{0};
  }
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
  const Check check{"route_topk", DeviceType::CPU};
  const Tensor logits_TE = check.wide(logits_in, "logits", {kAnySize, kAnySize});
  const int64_t num_tokens = logits_TE.size(0);
  const int64_t num_experts = logits_TE.size(1);
  const Tensor valid_T = check.of(ScalarType::Bool, valid_in, "valid", {num_tokens});
  const SecondPolicy policy = parse_policy(second_policy);
  check.at_least(policy == SecondPolicy::all ? 1 : 2, top_k, "top_k");
  check.at_most(num_experts, top_k, "top_k");

  EPMOE_CHECK(
      tau > 0 || policy == SecondPolicy::all || policy == SecondPolicy::none,
      "route_topk: tau=", tau, " must be positive");
  Draws draws;
  if (policy == SecondPolicy::random) {
    draws = checked_draws(check, uniform_T, sample_T, position_T, num_tokens, seed, layer);
  }

  Tensor probs_TE = check.fresh(logits_TE, "probs", {num_tokens, num_experts});
  Tensor ids_TK = check.fresh(logits_TE, "ids", {num_tokens, top_k}, ScalarType::Long);
  Tensor weights_TK = check.fresh(logits_TE, "weights", {num_tokens, top_k});
  Tensor active_TK = check.fresh(logits_TE, "active", {num_tokens, top_k}, ScalarType::Bool);
  if (num_tokens == 0) {
    return {probs_TE, ids_TK, weights_TK, active_TK};
  }
  const Options options{num_experts, top_k, normalize, policy, tau};
  for_wide(logits_TE.scalar_type(), [&]<class Scalar>() {
    const Scalar* logits = logits_TE.const_data_ptr<Scalar>();
    const uint8_t* valid = flags_of(valid_T);
    Scalar* probs = probs_TE.mutable_data_ptr<Scalar>();
    int64_t* ids = ids_TK.mutable_data_ptr<int64_t>();
    Scalar* weights = weights_TK.mutable_data_ptr<Scalar>();
    bool* active = active_TK.mutable_data_ptr<bool>();
    torch::stable::parallel_for(0, num_tokens, grain(8 * num_experts), [&](int64_t begin, int64_t end) {
      std::vector<int64_t> order(static_cast<size_t>(num_experts));
      for (int64_t t = begin; t < end; ++t) {
        route_row<Scalar>(
            logits + t * num_experts,
            valid[t] != 0,
            draws.of(t),
            options,
            order,
            probs + t * num_experts,
            ids + t * top_k,
            weights + t * top_k,
            active + t * top_k);
      }
    });
  });
  return {probs_TE, ids_TK, weights_TK, active_TK};
}

namespace {

// out = probs * (gradient - <gradient, probs> - more): the backward of a softmax. `out` may be `gradient`.
template <class Scalar>
void softmax_backward(const Scalar* gradient, const Scalar* probs, Scalar more, int64_t count, Scalar* out) {
  Lanes<Scalar, kRouterLanes> lanes;
  for_lanes<kRouterLanes>(count, [&](int64_t i, int64_t lane) { lanes.partial[lane] += gradient[i] * probs[i]; });
  const Scalar mean = lanes.total() + more;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    out[i] = probs[i] * (gradient[i] - mean);
  }
}

template <class Scalar>
void route_row_backward(
    const Scalar* d_probs,
    const Scalar* d_weights,
    const Scalar* probs,
    const int64_t* ids,
    const Scalar* chosen,
    const uint8_t* active,
    const Options& options,
    std::vector<Scalar>& scratch,
    Scalar* d_logits) {
  const int64_t top_k = options.top_k;
  Scalar* d_chosen = scratch.data();
  for (int64_t k = 0; k < top_k; ++k) {
    d_chosen[k] = d_weights[k] * static_cast<Scalar>(active[k] != 0);
  }
  Scalar more{0};  // what raw weights add to the mean of the gradients of the probabilities
  if (options.normalize) {
    Scalar* share = scratch.data() + top_k;
    softmax(chosen, *std::max_element(chosen, chosen + top_k), top_k, share);
    softmax_backward(d_chosen, share, Scalar{0}, top_k, d_chosen);
  } else {
    for (int64_t k = 0; k < top_k; ++k) {
      d_chosen[k] *= probs[ids[k]];
      more += d_chosen[k];
    }
  }
  softmax_backward(d_probs, probs, more, options.num_experts, d_logits);
  for (int64_t k = 0; k < top_k; ++k) {
    d_logits[ids[k]] += d_chosen[k];
  }
}

}  // namespace

Tensor route_topk_backward(
    const Tensor& d_probs_in,
    const Tensor& d_weights_in,
    const Tensor& probs_in,
    const Tensor& topk_ids_in,
    const Tensor& chosen_logits_in,
    const Tensor& active_in,
    bool normalize) {
  const Check check{"route_topk_backward", DeviceType::CPU};
  const Tensor probs_TE = check.wide(probs_in, "probs", {kAnySize, kAnySize});
  const ScalarType dtype = probs_TE.scalar_type();
  const int64_t num_tokens = probs_TE.size(0);
  const int64_t num_experts = probs_TE.size(1);
  const Tensor ids_TK = check.of(ScalarType::Long, topk_ids_in, "topk_ids", {num_tokens, kAnySize});
  const int64_t top_k = ids_TK.size(1);
  const Tensor d_probs_TE = check.of(dtype, d_probs_in, "d_probs", {num_tokens, num_experts});
  const Tensor d_weights_TK = check.of(dtype, d_weights_in, "d_weights", {num_tokens, top_k});
  const Tensor chosen_TK = check.of(dtype, chosen_logits_in, "chosen_logits", {num_tokens, top_k});
  const Tensor active_TK = check.of(ScalarType::Bool, active_in, "active", {num_tokens, top_k});
  check.at_least(1, top_k, "top_k");
  const int64_t* ids = ids_TK.const_data_ptr<int64_t>();
  check.indices(ids, ids_TK.numel(), num_experts, "topk_ids");

  Tensor d_logits_TE = check.fresh(probs_TE, "d_logits", {num_tokens, num_experts});
  if (num_tokens == 0) {
    return d_logits_TE;
  }
  const Options options{num_experts, top_k, normalize, SecondPolicy::all, 0.0};
  for_wide(dtype, [&]<class Scalar>() {
    const Scalar* d_probs = d_probs_TE.const_data_ptr<Scalar>();
    const Scalar* d_weights = d_weights_TK.const_data_ptr<Scalar>();
    const Scalar* probs = probs_TE.const_data_ptr<Scalar>();
    const Scalar* chosen = chosen_TK.const_data_ptr<Scalar>();
    const uint8_t* active = flags_of(active_TK);
    Scalar* d_logits = d_logits_TE.mutable_data_ptr<Scalar>();
    torch::stable::parallel_for(0, num_tokens, grain(4 * num_experts), [&](int64_t begin, int64_t end) {
      std::vector<Scalar> scratch(static_cast<size_t>(2 * top_k));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t * num_experts;
        const int64_t pick = t * top_k;
        route_row_backward<Scalar>(
            d_probs + row,
            d_weights + pick,
            probs + row,
            ids + pick,
            chosen + pick,
            active + pick,
            options,
            scratch,
            d_logits + row);
      }
    });
  });
  return d_logits_TE;
}

}  // namespace epmoe::cpu
