"""Expert choice, arXiv:2202.09368: not tokens choose experts, every expert takes its best tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.config_routers import ExpertChoiceOptions
from epmoe.moe.routers.common import UNAVAILABLE, groups_of, scored, without_unusable
from epmoe.moe.routers.family import Family
from epmoe.ops.reference import usable_rows
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: ExpertChoiceOptions, top_k: int) -> Routing:
    """Every expert's ``floor(n K / E)`` tokens (at least one) with the largest probability, n valid ones in a group.

    The weight is the raw probability, a softmax over experts. A token may have any number of experts, none among
    them. The list has ``E*C`` entries per group, C for a group without padding: the best of every expert, the second
    best of every expert, and so on.
    """
    logits_TE = inputs.logits_TE
    num_experts = logits_TE.shape[1]
    num_groups, size = groups_of(inputs)
    usable_T = usable_rows(logits_TE, inputs.valid_T)
    probs_TE, score_TE = scored(logits_TE, usable_T)
    place_GSE, chosen_GSE = best_tokens(score_TE.view(num_groups, size, num_experts), usable_T, top_k)
    slots = min(size, max(size * top_k // num_experts, 1))
    place_GCE = place_GSE[:, :slots]
    active_GCE = chosen_GSE.gather(1, place_GCE)
    weight_GCE = probs_TE.view(num_groups, size, num_experts).gather(1, place_GCE) * active_GCE
    first_G = torch.arange(num_groups, device=logits_TE.device) * size
    choice_GSE = _rank_among_chosen(logits_TE, chosen_GSE.view_as(logits_TE)).view_as(place_GSE)
    expert_GCE = torch.arange(num_experts, device=logits_TE.device).expand_as(place_GCE)
    token_GCE = place_GCE + first_G.view(-1, 1, 1)
    logits_TE, nonfinite_tokens = without_unusable(logits_TE, inputs.valid_T, usable_T)
    return Routing(
        token_A=_listed(token_GCE),
        expert_A=_listed(expert_GCE),
        weight_A=_listed(weight_GCE),
        active_A=_listed(active_GCE),
        choice_A=_listed(choice_GSE.gather(1, place_GCE)),
        probs_TE=probs_TE,
        logits_TE=logits_TE,
        valid_T=usable_T,
        nonfinite_tokens=nonfinite_tokens,
    )


def best_tokens(score_GSE: Tensor, usable_T: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Each expert's tokens of each group, best first, and which of them it takes -> int64 places, bool by place.

    It takes ``floor(n K / E)`` of n usable tokens, at least one; at equal scores the earlier.
    """
    num_groups, size, num_experts = score_GSE.shape
    place_GSE = score_GSE.argsort(dim=1, descending=True, stable=True)
    num_usable_G = usable_T.view(num_groups, size).sum(1)
    taken_G11 = (num_usable_G * top_k // num_experts).clamp(min=1).view(-1, 1, 1)
    rank_1S1 = torch.arange(size, device=score_GSE.device).view(1, -1, 1)
    taken_GSE = (rank_1S1 < taken_G11).expand_as(place_GSE)
    chosen_GSE = torch.zeros_like(taken_GSE).scatter(1, place_GSE, taken_GSE)
    return place_GSE, chosen_GSE & (score_GSE != UNAVAILABLE)


def _rank_among_chosen(logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """How many of the experts that chose a token it likes better than each of them -> int64 ``[T, E]``."""
    order_TE = logits_TE.masked_fill(~chosen_TE, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order_TE.argsort(dim=-1)


def _listed(values_GCE: Tensor) -> Tensor:
    return values_GCE.transpose(0, 1).reshape(-1)


FAMILY = Family(route=route)
