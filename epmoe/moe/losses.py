"""Auxiliary losses: pure functions, each a differentiable sum over valid tokens without its coefficient.

The trainer divides every sum by the number of valid tokens of the whole step, over all ranks, whether they count in the
task loss or not. What may change a loss besides its tokens:

    z, sequence_balance, balance over groups (moe.group: sequence) or sequences   nothing
    balance over all ranks (scope global)                   accumulation: counts of the micro-batches so far stand
                                                            for those of the whole step
    balance over a micro-batch, importance, load,           ranks and micro-batches: they want balance inside each
    device_balance, communication_balance                   rank's micro-batch
    batchwise_threshold                                     as the last where its batch is a rank's micro-batch
                                                            (moe.group: rank); with sequences as batches nothing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from epmoe.types import DispatchPlan, Routing

CV_EPS = 1e-10
"""Added to the squared mean below a squared coefficient of variation, as in tensor2tensor and V-MoE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss of one layer and micro-batch is made from."""

    routing: Routing
    plan: DispatchPlan
    seq_len: int
    """Tokens per sequence, S."""
    global_count_E: Tensor | None = None
    """int64 assignments over all ranks, and this and earlier micro-batches of the step; for ``balance_scope:
    global`` alone."""
    global_tokens: Tensor | None = None
    """int64 scalar: the valid tokens they belong to."""


LossFunction = Callable[[LossInputs], Tensor]


def balance_loss(probs_TE: Tensor, count_GE: Tensor, valid_T: Tensor, *, count_per_token: int) -> Tensor:
    """Load balance per group: sum over groups of n_g * E * sum_e f_e m_e -> scalar; n_g when p is uniform.

    ``f_e`` is the share of counted assignments that chose e (constant), ``m_e`` the mean probability of e, both over
    the n_g valid tokens of the group. GShard (arXiv:2006.16668 Algorithm 1), Switch (arXiv:2101.03961 eq. 4).

    Args:
        probs_TE: Router probabilities, zero rows for invalid tokens.
        count_GE: int64 assignments per group and expert, before capacity.
        valid_T: bool.
        count_per_token: Assignments counted per token: 1 for first choices, K for all.
    """
    num_groups, num_experts = count_GE.shape
    if num_groups == 0:
        return probs_TE.sum()
    prob_sum_GE = probs_TE.view(num_groups, -1, num_experts).sum(1)
    num_valid_G = valid_T.view(num_groups, -1).sum(1).clamp(min=1).to(probs_TE.dtype)
    product_G = (count_GE.to(probs_TE.dtype) * prob_sum_GE).sum(1)
    return num_experts * (product_G / (num_valid_G * count_per_token)).sum()


def global_balance_loss(
    probs_TE: Tensor, count_E: Tensor, num_tokens: Tensor, *, count_per_token: int
) -> Tensor:
    """Load balance against counts of more tokens than are here -> scalar: E * sum_e f_e sum_t p_te.

    Summed over ranks it is ``balance_loss`` of the whole batch as one group (arXiv:2501.11873).

    Args:
        probs_TE: This rank's probabilities, zero rows for invalid tokens.
        count_E: Assignments to each expert among all tokens.
        num_tokens: Number of these tokens.
        count_per_token: Assignments counted per token.
    """
    share_E = count_E.to(probs_TE.dtype) / (num_tokens.clamp(min=1).to(probs_TE.dtype) * count_per_token)
    return probs_TE.shape[1] * (share_E * probs_TE.sum(0)).sum()


def choice_counts(routing: Routing, num_groups: int, num_experts: int, *, first_only: bool) -> Tensor:
    """Assignments of each group's valid tokens to each expert, before capacity -> int64 ``[G, E]``.

    Args:
        first_only: Count first choices alone.
    """
    tokens_per_group = routing.valid_T.shape[0] // max(num_groups, 1)
    counted_A = routing.active_A & (routing.choice_A == 0) if first_only else routing.active_A
    bin_A = routing.token_A // max(tokens_per_group, 1) * num_experts + routing.expert_A
    count_X = torch.zeros(num_groups * num_experts, dtype=torch.int64, device=bin_A.device)
    return count_X.scatter_add_(0, bin_A, counted_A.long()).view(num_groups, num_experts)


def z_loss(logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Sum over valid tokens of logsumexp(logits)^2 -> scalar. ST-MoE, arXiv:2202.08906 eq. 5."""
    return torch.where(valid_T, logits_TE.logsumexp(-1).square(), 0.0).sum()


def squared_variation(total_E: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance / mean^2 -> scalar; 0 when all are equal or zero."""
    mean = total_E.mean()
    return (total_E - mean).square().mean() / (mean.square() + CV_EPS)


def importance(routing: Routing, num_experts: int) -> Tensor:
    """Sum of every expert's gates over tokens, before capacity, differentiable -> ``[E]``."""
    if routing.importance_E is not None:
        return routing.importance_E
    return routing.weight_A.new_zeros(num_experts).index_add(0, routing.expert_A, routing.weight_A)


def importance_loss(importance_E: Tensor, valid_T: Tensor) -> Tensor:
    """CV(importance)^2 of this micro-batch, once per valid token -> scalar. arXiv:1701.06538 eq. 7."""
    return valid_T.sum() * squared_variation(importance_E)


def load_loss(load_E: Tensor | None, demand_GE: Tensor, valid_T: Tensor, dtype: torch.dtype) -> Tensor:
    """CV(load)^2 of this micro-batch, once per valid token -> scalar. arXiv:1701.06538 eq. 11.

    Args:
        load_E: Smooth estimate of the load; None = what was chosen, a constant.
        demand_GE: int64 choices.
        dtype: Of a counted load.
    """
    load_E = demand_GE.sum(0).to(dtype) if load_E is None else load_E
    return valid_T.sum() * squared_variation(load_E)


def affinity_counts(logits_TE: Tensor, valid_T: Tensor, num_groups: int, top_k: int) -> Tensor:
    """How many valid tokens of each group have each expert among their k largest logits -> int64 ``[G, E]``.

    What would be chosen without bias and limits of groups, which the sequence-wise balance loss counts.
    """
    num_experts = logits_TE.shape[1]
    best_TK = logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    counted_TK = valid_T.unsqueeze(1) & logits_TE.gather(1, best_TK).isfinite()
    count_TE = torch.zeros_like(logits_TE, dtype=torch.int64).scatter(1, best_TK, counted_TK.long())
    tokens_per_group = logits_TE.shape[0] // max(num_groups, 1)
    return count_TE.view(num_groups, tokens_per_group, num_experts).sum(1)


def device_balance_loss(
    probs_TE: Tensor, count_E: Tensor, valid_T: Tensor, *, num_devices: int, top_k: int
) -> Tensor:
    """n * sum over devices of f'_d P'_d -> scalar; n when devices are even. arXiv:2401.06066 eq. 15 to 17.

    f' is the mean over a device's experts of E * count / (k n), constant; P' the sum of their mean probabilities.

    Args:
        count_E: Assignments to each expert in this micro-batch.
        num_devices: Groups of consecutive experts.
    """
    num_valid = valid_T.sum().clamp(min=1).to(probs_TE.dtype)
    share_P = count_E.view(num_devices, -1).sum(1).to(probs_TE.dtype) / (num_valid * top_k)
    prob_sum_P = probs_TE.sum(0).view(num_devices, -1).sum(1)
    return num_devices * (share_P * prob_sum_P).sum()


def tokens_per_device(routing: Routing, num_devices: int, num_experts: int) -> Tensor:
    """How many tokens go to each group of consecutive experts, each token once -> int64 ``[P]``."""
    num_tokens, size = routing.valid_T.shape[0], num_experts // num_devices
    bin_A = routing.token_A * num_devices + routing.expert_A // size
    count_X = torch.zeros(num_tokens * num_devices, dtype=torch.int64, device=bin_A.device)
    count_X.scatter_add_(0, bin_A, routing.active_A.long())
    return (count_X.view(num_tokens, num_devices) > 0).sum(0)


def communication_balance_loss(probs_TE: Tensor, tokens_P: Tensor, valid_T: Tensor, *, limit: int) -> Tensor:
    """n * sum over devices of f''_d P''_d -> scalar; n when devices are even. arXiv:2405.04434 section 2.2.3.

    f'' is D / (M n) times the tokens sent to a device, constant; P'' the sum of its experts' mean probabilities.

    Args:
        tokens_P: Tokens sent to each of the D devices.
        limit: Devices a token is sent to at most, M.
    """
    num_devices = tokens_P.shape[0]
    num_valid = valid_T.sum().clamp(min=1).to(probs_TE.dtype)
    share_P = num_devices * tokens_P.to(probs_TE.dtype) / (limit * num_valid)
    return (share_P * probs_TE.sum(0).view(num_devices, -1).sum(1)).sum()


def batchwise_threshold_loss(routing: Routing) -> Tensor:
    """sum over tokens and experts of (M_threshold - M_batch) (p - threshold) -> scalar. arXiv:1701.06538 appendix F.

    Never negative, and zero when the thresholds say what the batch kept. Both masks are constants, so a threshold's
    gradient is the number of tokens it should let through less those it does.
    """
    assert routing.threshold_E is not None  # checked with the configuration
    gate_TE, threshold_E = routing.probs_TE, routing.threshold_E
    num_tokens, num_experts = gate_TE.shape
    place_A = routing.token_A * num_experts + routing.expert_A
    kept_X = torch.zeros(num_tokens * num_experts, dtype=torch.bool, device=place_A.device)
    kept_TE = kept_X.scatter(0, place_A, routing.active_A).view_as(gate_TE)
    open_TE = routing.valid_T.unsqueeze(1) & (routing.logits_TE != -torch.inf)
    above_TE = open_TE & (gate_TE > threshold_E)
    return ((above_TE.to(gate_TE.dtype) - kept_TE.to(gate_TE.dtype)) * (gate_TE - threshold_E)).sum()
