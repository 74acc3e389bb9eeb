"""The dense mixture: every expert for every token, in one or two levels.

Jacobs, Jordan, Nowlan and Hinton 1991; Jordan and Jacobs 1994 for the two levels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from epmoe.config_routers import DenseOptions
from epmoe.moe.routers.common import Choices, as_routing, choose
from epmoe.moe.routers.family import Family, RouterTensor
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: DenseOptions, top_k: int) -> Routing:
    """All experts of a token, most probable first, with the weights of the pooling.

    In training all of them are used, so that every one has an output, whatever its weight; in evaluation only those
    that count.
    """
    logits_TE = inputs.logits_TE
    if inputs.group_logits_TP is not None:
        logits_TE = two_level_logits(logits_TE, inputs.group_logits_TP)
    choices = choose(inputs, top_k, normalize=False, logits_TE=logits_TE)
    choices = _pooled(choices, options, training=inputs.training)
    return as_routing(inputs, options, choices, logits_TE=logits_TE)


def _pooled(choices: Choices, options: DenseOptions, *, training: bool) -> Choices:
    pooling = options.pooling if training else options.pooling_eval or options.pooling
    if pooling == "weighted_sum":
        return choices
    first_K = torch.arange(choices.ids_TK.shape[1], device=choices.ids_TK.device) == 0
    weights_TK = (
        choices.weights_TK if pooling == "max_scaled" else choices.active_TK.to(choices.probs_TE.dtype)
    )
    active_TK = choices.active_TK if training else choices.active_TK & first_K
    return replace(choices, weights_TK=weights_TK * first_K, active_TK=active_TK)


def two_level_logits(logits_TE: Tensor, group_logits_TP: Tensor) -> Tensor:
    """Logits whose softmax is g_i g_{j|i}: a group's probability times the expert's inside the group -> ``[T, E]``.

    Their log-sum-exp is that of the sums of both levels' logits, which the z-loss is made from. -inf where an expert
    or its group is not available, NaN throughout where a logit is NaN or +inf.

    Args:
        logits_TE: Inner level; groups are consecutive experts of equal number.
        group_logits_TP: Outer level.
    """
    num_groups = group_logits_TP.shape[1]
    inner_TPJ = logits_TE.unflatten(1, (num_groups, logits_TE.shape[1] // num_groups))
    closed_TP = (inner_TPJ == -torch.inf).all(-1) | (group_logits_TP == -torch.inf)
    both_TX = torch.cat((logits_TE, group_logits_TP), dim=1)
    broken_T1 = (both_TX.isnan() | (both_TX == torch.inf)).any(-1, keepdim=True)
    # Whatever has no finite softmax gets zeros to compute with, for the sake of the gradient, and its value at the end.
    outer_TP = group_logits_TP.masked_fill(closed_TP, -torch.inf)
    outer_TP = outer_TP.masked_fill(broken_T1 | closed_TP.all(-1, keepdim=True), 0.0)
    inner_TPJ = inner_TPJ.masked_fill((closed_TP | broken_T1).unsqueeze(-1), 0.0)
    joint_TPJ = outer_TP.log_softmax(-1).unsqueeze(-1) + inner_TPJ.log_softmax(-1)
    total_T1 = (outer_TP.unsqueeze(-1) + inner_TPJ).flatten(1).logsumexp(-1, keepdim=True)
    logits_TE = joint_TPJ.masked_fill(closed_TP.unsqueeze(-1), -torch.inf).flatten(1) + total_T1
    return logits_TE.masked_fill(broken_T1, torch.nan)


def _parts(options: DenseOptions, num_experts: int) -> tuple[RouterTensor, ...]:
    if options.num_groups == 1:
        return ()
    return (
        RouterTensor(
            name="group_weight", field="group_logits_TP", num_rows=options.num_groups, projects=True
        ),
    )


FAMILY = Family(route=route, parts=_parts)
