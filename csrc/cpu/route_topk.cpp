#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "exp.h"
#include "lanes.h"
#include "operators.h"

namespace epmoe::cpu {
namespace {

// No NaN or +inf logit, at least one finite logit.
template <class Scalar>
[[gnu::always_inline]] inline bool is_usable(const Scalar* logits, int64_t num_experts) {
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

constexpr int64_t kWidest = 64;  // bytes of a vector register

// What a row needs besides its results.
template <class Scalar>
struct Scratch {
  std::vector<Scalar> left_E;  // whole vectors; what no logit fills stays NaN
  std::vector<int64_t> order_E;

  explicit Scratch(int64_t num_experts)
      : left_E(num_experts + kWidest / sizeof(Scalar), std::numeric_limits<Scalar>::quiet_NaN()),
        order_E(num_experts) {}
};

// Where the largest number is found first; NaN is passed over. One pass without branches: every lane of a vector keeps
// the largest of its own. Reads a whole vector at the end. Compilers take a vector apart where comparisons are joined.
template <int kBytes, class Scalar>
[[gnu::always_inline]] inline int64_t place_of_largest(const Scalar* values, int64_t count) {
  using Place = std::conditional_t<sizeof(Scalar) == 4, int32_t, int64_t>;
  using Values [[gnu::vector_size(kBytes)]] = Scalar;
  using Places [[gnu::vector_size(kBytes)]] = Place;
  constexpr Place kLanes = kBytes / sizeof(Scalar);
  constexpr Scalar kLowest = -std::numeric_limits<Scalar>::infinity();
  constexpr Place kNowhere = std::numeric_limits<Place>::max();
  Places here;
  for (Place i = 0; i < kLanes; ++i) {
    here[i] = i;
  }
  Values largest = Values{} + kLowest;
  Places place = Places{} + kNowhere;
  for (int64_t i = 0; i < count; i += kLanes, here += kLanes) {
    Values value;
    std::memcpy(&value, values + i, kBytes);
    const Places better = value > largest;
    largest = better ? value : largest;
    place = better ? here : place;
  }
  Scalar most = kLowest;
#pragma omp simd reduction(max : most)
  for (Place i = 0; i < kLanes; ++i) {
    most = largest[i] > most ? largest[i] : most;
  }
  if (most == kLowest) [[unlikely]] {  // nothing is better than nothing
    return std::find(values, values + count, kLowest) - values;
  }
  place = largest == Values{} + most ? place : Places{} + kNowhere;
  Place first = kNowhere;
#pragma omp simd reduction(min : first)
  for (Place i = 0; i < kLanes; ++i) {
    first = place[i] < first ? place[i] : first;
  }
  return first;
}

// The experts of the largest logits in falling order; of equal ones the lowest expert first.
template <int kBytes, class Scalar>
[[gnu::always_inline]] inline void choose(
    const Scalar* logits, int64_t num_experts, int64_t top_k, Scratch<Scalar>& scratch, int64_t* ids) {
  constexpr int64_t kMostRounds = 8;
  if (top_k > kMostRounds || num_experts > std::numeric_limits<int32_t>::max()) {
    std::vector<int64_t>& order = scratch.order_E;
    std::iota(order.begin(), order.end(), int64_t{0});
    std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int64_t a, int64_t b) {
      return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
    std::copy_n(order.begin(), top_k, ids);
    return;
  }
  Scalar* left = scratch.left_E.data();
  std::copy_n(logits, num_experts, left);
  for (int64_t k = 0; k < top_k; ++k) {
    ids[k] = place_of_largest<kBytes>(left, num_experts);
    left[ids[k]] = std::numeric_limits<Scalar>::quiet_NaN();
  }
}

// A row of finite or -inf logits with its largest, turned into probabilities; `probs` may be `logits`.
template <class Scalar>
[[gnu::always_inline]] inline void softmax(const Scalar* logits, Scalar largest, int64_t count, Scalar* probs) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    probs[i] = exp_negative(logits[i] - largest);
  }
  Lanes<Scalar, kRouterLanes> lanes;
  for_lanes<kRouterLanes>(count, [&](int64_t i, int64_t lane) { lanes.partial[lane] += probs[i]; });
  const Scalar sum = lanes.total();
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    probs[i] /= sum;
  }
}

template <int kBytes, class Scalar>
[[gnu::always_inline]] inline void route_row_of(
    const Scalar* logits,
    bool valid,
    double draw,
    const RouteOptions& options,
    Scratch<Scalar>& scratch,
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
  choose<kBytes>(logits, num_experts, top_k, scratch, ids);
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

#define EPMOE_ROUTE_ROW(TARGET, kBytes, Scalar)                                               \
  TARGET void route_row(                                                                      \
      const Scalar* logits,                                                                   \
      bool valid,                                                                             \
      double draw,                                                                            \
      const RouteOptions& options,                                                            \
      Scratch<Scalar>& scratch,                                                               \
      Scalar* probs,                                                                          \
      int64_t* ids,                                                                           \
      Scalar* weights,                                                                        \
      bool* active) {                                                                         \
    route_row_of<kBytes>(logits, valid, draw, options, scratch, probs, ids, weights, active); \
  }
EPMOE_VECTOR_WIDTHS(EPMOE_ROUTE_ROW, float)
EPMOE_VECTOR_WIDTHS(EPMOE_ROUTE_ROW, double)

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
      DeviceType::CPU, logits_in, valid_in, uniform_T, sample_T, position_T, top_k, normalize, second_policy, tau, seed,
      layer);
  const int64_t num_experts = given.options.num_experts;
  const int64_t num_tokens = given.valid_T.size(0);
  if (num_tokens == 0) {  // of any number of experts, with which nothing is to be counted
    return {given.probs_TE, given.ids_TK, given.weights_TK, given.active_TK};
  }
  for_wide(given.logits_TE.scalar_type(), [&]<class Scalar>() {
    const Scalar* logits = given.logits_TE.const_data_ptr<Scalar>();
    const uint8_t* valid = flags_of(given.valid_T);
    Scalar* probs = given.probs_TE.mutable_data_ptr<Scalar>();
    int64_t* ids = given.ids_TK.mutable_data_ptr<int64_t>();
    Scalar* weights = given.weights_TK.mutable_data_ptr<Scalar>();
    bool* active = given.active_TK.mutable_data_ptr<bool>();
    torch::stable::parallel_for(0, num_tokens, grain(8 * num_experts), [&](int64_t begin, int64_t end) {
      Scratch<Scalar> scratch(num_experts);
      for (int64_t t = begin; t < end; ++t) {
        route_row(
            logits + t * num_experts,
            valid[t] != 0,
            given.draws.of(t),
            given.options,
            scratch,
            probs + t * num_experts,
            ids + t * top_k,
            weights + t * top_k,
            active + t * top_k);
      }
    });
  });
  return {given.probs_TE, given.ids_TK, given.weights_TK, given.active_TK};
}

namespace {

// out = probs * (gradient - <gradient, probs> - more): the backward of a softmax. `out` may be `gradient`.
template <class Scalar>
[[gnu::always_inline]] inline void softmax_backward(
    const Scalar* gradient, const Scalar* probs, Scalar more, int64_t count, Scalar* out) {
  Lanes<Scalar, kRouterLanes> lanes;
  for_lanes<kRouterLanes>(count, [&](int64_t i, int64_t lane) { lanes.partial[lane] += gradient[i] * probs[i]; });
  const Scalar mean = lanes.total() + more;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    out[i] = probs[i] * (gradient[i] - mean);
  }
}

template <class Scalar>
[[gnu::always_inline]] inline void route_row_backward_of(
    const Scalar* d_probs,
    const Scalar* d_weights,
    const Scalar* probs,
    const int64_t* ids,
    const uint8_t* active,
    const RouteOptions& options,
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
    Scalar total{0};
    for (int64_t k = 0; k < top_k; ++k) {
      share[k] = probs[ids[k]];
      total += share[k];
    }
    for (int64_t k = 0; k < top_k; ++k) {
      share[k] = total > 0 ? share[k] / total : Scalar{0};  // 0: a row that was not usable
    }
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

#define EPMOE_ROUTE_ROW_BACKWARD(Scalar)                                                                   \
  EPMOE_VECTOR_CLONES void route_row_backward(                                                             \
      const Scalar* d_probs,                                                                               \
      const Scalar* d_weights,                                                                             \
      const Scalar* probs,                                                                                 \
      const int64_t* ids,                                                                                  \
      const uint8_t* active,                                                                               \
      const RouteOptions& options,                                                                         \
      std::vector<Scalar>& scratch,                                                                        \
      Scalar* d_logits) {                                                                                  \
    route_row_backward_of(d_probs, d_weights, probs, ids, active, options, scratch, d_logits);             \
  }
EPMOE_ROUTE_ROW_BACKWARD(float)
EPMOE_ROUTE_ROW_BACKWARD(double)

}  // namespace

Tensor route_topk_backward(
    const Tensor& d_probs_in,
    const Tensor& d_weights_in,
    const Tensor& probs_in,
    const Tensor& topk_ids_in,
    const Tensor& active_in,
    bool normalize) {
  const RouteTopkBackward given(
      DeviceType::CPU, d_probs_in, d_weights_in, probs_in, topk_ids_in, active_in, normalize);
  const int64_t num_experts = given.options.num_experts;
  const int64_t top_k = given.options.top_k;
  check_indices("route_topk_backward", given.ids_TK, num_experts, "topk_ids");
  const int64_t num_tokens = given.probs_TE.size(0);
  if (num_tokens == 0) {
    return given.d_logits_TE;
  }
  for_wide(given.probs_TE.scalar_type(), [&]<class Scalar>() {
    const Scalar* d_probs = given.d_probs_TE.const_data_ptr<Scalar>();
    const Scalar* d_weights = given.d_weights_TK.const_data_ptr<Scalar>();
    const Scalar* probs = given.probs_TE.const_data_ptr<Scalar>();
    const int64_t* ids = given.ids_TK.const_data_ptr<int64_t>();
    const uint8_t* active = flags_of(given.active_TK);
    Scalar* d_logits = given.d_logits_TE.mutable_data_ptr<Scalar>();
    torch::stable::parallel_for(0, num_tokens, grain(4 * num_experts), [&](int64_t begin, int64_t end) {
      std::vector<Scalar> scratch(static_cast<size_t>(2 * top_k));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t * num_experts;
        const int64_t pick = t * top_k;
        route_row_backward(
            d_probs + row,
            d_weights + pick,
            probs + row,
            ids + pick,
            active + pick,
            given.options,
            scratch,
            d_logits + row);
      }
    });
  });
  return given.d_logits_TE;
}

}  // namespace epmoe::cpu
