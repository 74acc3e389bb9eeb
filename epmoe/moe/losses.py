"""Auxiliary losses: pure functions, each a differentiable sum over valid tokens without its coefficient.

The trainer divides every sum by the global number of tokens of the step, exactly like the task loss. With
``group: sequence``, the default, no layout, accumulation or padding changes them. With ``group: rank`` the balance
loss is that of each rank's micro-batch and depends on how sequences are spread over ranks and micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.types import Routing


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


def first_choice_counts(routing: Routing, num_groups: int, num_experts: int) -> Tensor:
    """How many valid tokens of each group have each expert as their first choice -> int64 ``[G, E]``."""
    tokens_per_group = routing.valid_T.shape[0] // max(num_groups, 1)
    first_A = routing.active_A & (routing.choice_A == 0)
    bin_A = routing.token_A // max(tokens_per_group, 1) * num_experts + routing.expert_A
    count_X = torch.zeros(num_groups * num_experts, dtype=torch.int64, device=bin_A.device)
    return count_X.scatter_add_(0, bin_A, first_A.long()).view(num_groups, num_experts)


def z_loss(logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Sum over valid tokens of logsumexp(logits)^2 -> scalar. ST-MoE, arXiv:2202.08906 eq. 5."""
    return torch.where(valid_T, logits_TE.logsumexp(-1).square(), 0.0).sum()
