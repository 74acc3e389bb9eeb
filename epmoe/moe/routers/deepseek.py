"""DeepSeek's routers: V1 (arXiv:2401.06066), V2's limit of devices (arXiv:2405.04434), V3's sigmoid scores with a
bias that balances the load without a loss (arXiv:2412.19437, arXiv:2408.15664)."""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.config_routers import DeepSeekOptions
from epmoe.moe.routers.common import Choices, as_routing, top_ids
from epmoe.moe.routers.family import Family, RouterTensor
from epmoe.moe.routers.topk import normalizes
from epmoe.ops.reference import usable_rows
from epmoe.types import RouterInputs, Routing

SMALLEST_SUM = 1e-20
"""Added to the sum that weights are divided by."""


def route(inputs: RouterInputs, options: DeepSeekOptions, top_k: int) -> Routing:
    """The k largest of score + bias inside the best groups; the weights are the scores without the bias.

    ``probs_TE`` is each score's share of a token's scores.
    """
    usable_T = usable_rows(inputs.logits_TE, inputs.valid_T)
    unusable_T1 = ~usable_T.unsqueeze(1)
    logits_TE = inputs.logits_TE.masked_fill(unusable_T1, 0.0)
    score_TE = logits_TE.sigmoid() if options.score == "sigmoid" else logits_TE.softmax(-1)
    score_TE = score_TE.masked_fill(unusable_T1, 0.0)
    biased_TE = score_TE.detach() if inputs.bias_E is None else score_TE.detach() + inputs.bias_E
    # -inf, not 0: a biased score may be negative, and what is not available must never win against it.
    biased_TE = biased_TE.masked_fill(logits_TE == -torch.inf, -torch.inf)
    if options.groups_kept is not None:
        biased_TE = _limited(biased_TE, options.num_groups, options.groups_kept, options.group_score)
    ids_TK = top_ids(biased_TE, top_k)
    active_TK = usable_T.unsqueeze(1) & biased_TE.gather(1, ids_TK).isfinite()
    weights_TK = score_TE.gather(1, ids_TK) * active_TK
    if normalizes(options.normalize, top_k):
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + SMALLEST_SUM)
    choices = Choices(
        probs_TE=score_TE / (score_TE.sum(-1, keepdim=True) + SMALLEST_SUM),
        ids_TK=ids_TK,
        weights_TK=weights_TK * options.scale,
        active_TK=active_TK,
    )
    return as_routing(inputs, options, choices)


def _limited(biased_TE: Tensor, num_groups: int, kept: int, group_score: str) -> Tensor:
    """-inf outside the ``kept`` groups with the largest score: their largest element, or the sum of their two."""
    num_tokens, num_experts = biased_TE.shape
    size = num_experts // num_groups
    best_TP2 = biased_TE.view(num_tokens, num_groups, size).sort(-1, descending=True).values[..., :2]
    group_TP = best_TP2[..., 0]
    if group_score == "top2" and size > 1:
        # A group with one available expert is worth what that is, not -inf.
        second_TP = best_TP2[..., 1]
        group_TP = group_TP + second_TP.masked_fill(second_TP == -torch.inf, 0.0)
    open_TP = torch.zeros_like(group_TP, dtype=torch.bool).scatter(1, top_ids(group_TP, kept), True)
    return biased_TE.masked_fill(~open_TP.repeat_interleave(size, dim=1), -torch.inf)


def balance_step(bias_E: Tensor, demand_E: Tensor, options: DeepSeekOptions, step: int) -> Tensor:
    """b + u * sign(mean(c) - c): experts with less than their share become a little likelier."""
    rate = options.bias_rate
    if not rate or (options.bias_steps is not None and step >= options.bias_steps):
        return bias_E
    # Whole numbers, so that an expert with exactly its share is left alone.
    behind_E = demand_E.sum() - demand_E * demand_E.shape[0]
    return bias_E + rate * behind_E.sign().to(bias_E.dtype)


def _parts(options: DeepSeekOptions, num_experts: int) -> tuple[RouterTensor, ...]:
    if options.bias_rate is None:
        return ()
    bias = RouterTensor(
        name="bias", field="bias_E", num_rows=num_experts, projects=False, update=balance_step
    )
    return (bias,)


FAMILY = Family(route=route, parts=_parts)
