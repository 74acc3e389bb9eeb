// One warp per token: lane l looks after experts l, l + 32, ...
#pragma once

#include <limits>
#include <type_traits>

#include "routing.h"
#include "warp.cuh"

namespace epmoe::cuda {

template <class Scalar>
constexpr Scalar kInfinity = std::numeric_limits<Scalar>::infinity();

template <class Scalar>
struct RoutePointers {
  int64_t num_tokens;
  const Scalar* logits_TE;
  const bool* valid_T;
  Scalar* probs_TE;
  int64_t* ids_TK;
  Scalar* weights_TK;
  bool* active_TK;
};

template <class Scalar, class Expert>
struct Choice {
  Scalar logit;
  Expert expert;

  // The larger logit; of equal ones the lower expert.
  __device__ bool before(const Choice& other) const {
    return logit > other.logit || (logit == other.logit && expert < other.expert);
  }
};

// A token's logits as one lane sees them: in registers when kPerLane of them are enough, else read again each time.
template <class Scalar, int kPerLane>
struct LogitRow {
  using Expert = std::conditional_t<kPerLane == 0, int64_t, int>;
  const Scalar* logits_E;
  Expert num_experts;
  int lane;
  Scalar own[kPerLane == 0 ? 1 : kPerLane];

  __device__ LogitRow(const Scalar* logits_E, int64_t num_experts, int lane)
      : logits_E(logits_E), num_experts(static_cast<Expert>(num_experts)), lane(lane) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = i * kWarp + lane;
      own[i] = expert < num_experts ? logits_E[expert] : Scalar{0};
    }
  }

  // body(expert, logit) for each of this lane's experts, ascending.
  template <class Body>
  __device__ void each(const Body& body) const {
    if constexpr (kPerLane == 0) {
      for (Expert expert = lane; expert < num_experts; expert += kWarp) {
        body(expert, logits_E[expert]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i * kWarp + lane < num_experts) {
          body(i * kWarp + lane, own[i]);
        }
      }
    }
  }

  // No NaN or +inf logit, at least one finite logit.
  __device__ bool is_usable() const {
    bool broken = false;
    bool finite = false;
    each([&](Expert, Scalar logit) {
      broken |= !(logit < kInfinity<Scalar>);
      finite |= logit > -kInfinity<Scalar>;
    });
    return !__any_sync(kAllLanes, broken) && __any_sync(kAllLanes, finite);
  }

  // The best of those after `last`, the same in every lane.
  __device__ Choice<Scalar, Expert> next(const Choice<Scalar, Expert>& last) const {
    Choice<Scalar, Expert> best{-kInfinity<Scalar>, num_experts};
    each([&](Expert expert, Scalar logit) {
      const Choice<Scalar, Expert> mine{logit, expert};
      if (last.before(mine) && mine.before(best)) {
        best = mine;
      }
    });
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const Choice<Scalar, Expert> other{
          __shfl_xor_sync(kAllLanes, best.logit, step), __shfl_xor_sync(kAllLanes, best.expert, step)};
      if (other.before(best)) {
        best = other;
      }
    }
    return best;
  }
};

template <class Scalar>
__device__ void route_nowhere(
    int lane, int64_t num_experts, int64_t top_k, Scalar* probs_E, int64_t* ids_K, Scalar* weights_K, bool* active_K) {
  for (int64_t expert = lane; expert < num_experts; expert += kWarp) {
    probs_E[expert] = Scalar{0};
  }
  for (int64_t k = lane; k < top_k; k += kWarp) {
    ids_K[k] = k;
    weights_K[k] = Scalar{0};
    active_K[k] = false;
  }
}

template <class Scalar, int kPerLane>
__device__ void route_row(
    const LogitRow<Scalar, kPerLane>& row,
    double draw,
    const RouteOptions& options,
    Scalar* probs_E,
    int64_t* ids_K,
    Scalar* weights_K,
    bool* active_K) {
  using Expert = typename LogitRow<Scalar, kPerLane>::Expert;
  const int lane = row.lane;
  Scalar largest{0};
  Scalar second{0};
  Choice<Scalar, Expert> choice{kInfinity<Scalar>, -1};  // before all others: no logit here is +inf
  for (int64_t k = 0; k < options.top_k; ++k) {
    choice = row.next(choice);
    largest = k == 0 ? choice.logit : largest;
    second = k == 1 ? choice.logit : second;
    if (k % kWarp == lane) {  // lane l keeps choices l, l + 32, ...; their logits where their weights will be
      ids_K[k] = choice.expert;
      weights_K[k] = choice.logit;
    }
  }

  Scalar mine{0};
  row.each([&](Expert, Scalar logit) { mine += std::exp(logit - largest); });
  const Scalar total = warp_sum(mine);
  row.each([&](Expert expert, Scalar logit) { probs_E[expert] = std::exp(logit - largest) / total; });

  Scalar divisor = total;
  if (options.normalize) {
    mine = Scalar{0};
    for (int64_t k = lane; k < options.top_k; k += kWarp) {
      mine += std::exp(weights_K[k] - largest);
    }
    divisor = warp_sum(mine);
  }
  const bool use_second = options.policy == SecondPolicy::all ||
                          second_is_used(options.policy, largest, second, options.tau, draw);
  for (int64_t k = lane; k < options.top_k; k += kWarp) {
    const Scalar logit = weights_K[k];
    const bool active = logit > -kInfinity<Scalar> && (k != 1 || use_second);
    weights_K[k] = active ? std::exp(logit - largest) / divisor : Scalar{0};
    active_K[k] = active;
  }
}

template <class Scalar, int kPerLane>
__global__ void route_topk_kernel(RoutePointers<Scalar> data, RouteOptions options, Draws draws) {
  const int lane = lane_id();
  for (int64_t t = warp_id(); t < data.num_tokens; t += num_warps()) {
    const int64_t row_at = t * options.num_experts;
    const int64_t choice_at = t * options.top_k;
    Scalar* probs_E = data.probs_TE + row_at;
    int64_t* ids_K = data.ids_TK + choice_at;
    Scalar* weights_K = data.weights_TK + choice_at;
    bool* active_K = data.active_TK + choice_at;
    const LogitRow<Scalar, kPerLane> row(data.logits_TE + row_at, options.num_experts, lane);
    if (row.is_usable() && data.valid_T[t]) {
      route_row(row, draws.of(t), options, probs_E, ids_K, weights_K, active_K);
    } else {
      route_nowhere(lane, options.num_experts, options.top_k, probs_E, ids_K, weights_K, active_K);
    }
  }
}

template <class Scalar>
struct RouteBackwardPointers {
  int64_t num_tokens;
  const Scalar* d_probs_TE;
  const Scalar* d_weights_TK;
  const Scalar* probs_TE;
  const int64_t* ids_TK;
  const bool* active_TK;
  Scalar* d_logits_TE;

  __device__ RouteBackwardPointers of(int64_t t, const RouteOptions& options) const {
    const int64_t row = t * options.num_experts;
    const int64_t choice = t * options.top_k;
    return {1, d_probs_TE + row, d_weights_TK + choice, probs_TE + row,
            ids_TK + choice, active_TK + choice, d_logits_TE + row};
  }
};

// body(k) summed over the choices of all lanes.
template <class Scalar, class Body>
__device__ Scalar sum_choices(int lane, int64_t top_k, const Body& body) {
  Scalar mine{0};
  for (int64_t k = lane; k < top_k; k += kWarp) {
    mine += body(k);
  }
  return warp_sum(mine);
}

// Adds d_chosen(k) to d_logits[ids[k]], one choice after the other; each expert's lane does it, as no other lane has
// written there.
template <class Scalar, class Body>
__device__ void add_chosen(
    int lane, const RouteOptions& options, const int64_t* ids_K, Scalar* d_logits_E, const Body& d_chosen) {
  for (int64_t base = 0; base < options.top_k; base += kWarp) {
    const int64_t k = base + lane;
    const bool here = k < options.top_k;
    const int64_t own_id = here ? ids_K[k] : -1;
    const Scalar own = here ? d_chosen(k) : Scalar{0};
    const int last = static_cast<int>(options.top_k - base < kWarp ? options.top_k - base : kWarp);
    for (int source = 0; source < last; ++source) {
      const int64_t id = __shfl_sync(kAllLanes, own_id, source);
      const Scalar more = __shfl_sync(kAllLanes, own, source);
      if (id >= 0 && id < options.num_experts && id % kWarp == lane) {
        d_logits_E[id] += more;
      }
    }
  }
}

template <class Scalar>
__device__ void route_row_backward(int lane, const RouteBackwardPointers<Scalar>& row, const RouteOptions& options) {
  const int64_t num_experts = options.num_experts;
  const int64_t top_k = options.top_k;
  const auto d_kept = [&](int64_t k) { return row.d_weights_TK[k] * static_cast<Scalar>(row.active_TK[k]); };
  const auto prob = [&](int64_t k) {
    const int64_t id = row.ids_TK[k];
    return id >= 0 && id < num_experts ? row.probs_TE[id] : Scalar{0};
  };
  const auto d_raw = [&](int64_t k) { return d_kept(k) * prob(k); };

  Scalar mean{0};
  for (int64_t expert = lane; expert < num_experts; expert += kWarp) {
    mean += row.d_probs_TE[expert] * row.probs_TE[expert];
  }
  mean = warp_sum(mean);
  if (!options.normalize) {
    mean += sum_choices<Scalar>(lane, top_k, d_raw);
  }
  for (int64_t expert = lane; expert < num_experts; expert += kWarp) {
    row.d_logits_TE[expert] = row.probs_TE[expert] * (row.d_probs_TE[expert] - mean);
  }
  if (!options.normalize) {
    add_chosen(lane, options, row.ids_TK, row.d_logits_TE, d_raw);
    return;
  }
  const Scalar total = sum_choices<Scalar>(lane, top_k, prob);
  // The total is 0 in a row that was not usable.
  const auto share = [&](int64_t k) { return total > Scalar{0} ? prob(k) / total : Scalar{0}; };
  const Scalar chosen_mean = sum_choices<Scalar>(lane, top_k, [&](int64_t k) { return d_kept(k) * share(k); });
  add_chosen(lane, options, row.ids_TK, row.d_logits_TE, [&](int64_t k) {
    return share(k) * (d_kept(k) - chosen_mean);
  });
}

template <class Scalar>
__global__ void route_topk_backward_kernel(RouteBackwardPointers<Scalar> data, RouteOptions options) {
  const int lane = lane_id();
  for (int64_t t = warp_id(); t < data.num_tokens; t += num_warps()) {
    route_row_backward(lane, data.of(t, options), options);
  }
}

}  // namespace epmoe::cuda
