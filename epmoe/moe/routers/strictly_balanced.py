"""Strictly balanced gating, arXiv:1701.06538 appendix F: equally many tokens for every expert, then thresholds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from epmoe.config_routers import StrictlyBalancedOptions
from epmoe.moe.routers.common import UNAVAILABLE, Choices, as_routing, groups_of, scored
from epmoe.moe.routers.expert_choice import best_tokens
from epmoe.moe.routers.family import Family, RouterTensor
from epmoe.ops.reference import usable_rows
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: StrictlyBalancedOptions, top_k: int) -> Routing:
    """Gates are the probabilities under a mask, rescaled per token; a token outside the mask has no expert.

    In training every expert keeps its ``floor(n K / E)`` best of a group's n valid tokens (at least one); in
    evaluation a token has the experts whose probability is above their threshold, which the loss
    ``batchwise_threshold`` has trained to say the same. The list has ``T*E`` entries.
    """
    logits_TE = inputs.logits_TE
    threshold_E = inputs.threshold_E
    assert threshold_E is not None  # a part of the family
    num_groups, size = groups_of(inputs)
    usable_T = usable_rows(logits_TE, inputs.valid_T)
    probs_TE, score_TE = scored(logits_TE, usable_T)
    if inputs.training:
        _, mask_GSE = best_tokens(score_TE.view(num_groups, size, logits_TE.shape[1]), usable_T, top_k)
        mask_TE = mask_GSE.view_as(probs_TE)
    else:
        mask_TE = (probs_TE > threshold_E) & (score_TE != UNAVAILABLE)
    order_TE = logits_TE.masked_fill(~mask_TE, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    active_TE = mask_TE.gather(1, order_TE)
    # The softmax over what is left: the gates rescaled, and none of them so small that it divides by 0.
    kept_TE = logits_TE.masked_fill(~mask_TE, -torch.inf).gather(1, order_TE)
    none_T1 = ~mask_TE.any(-1, keepdim=True)
    weights_TE = kept_TE.masked_fill(none_T1, 0.0).softmax(-1) * active_TE
    choices = Choices(probs_TE=probs_TE, ids_TK=order_TE, weights_TK=weights_TE, active_TK=active_TE)
    return as_routing(inputs, options, choices, usable_T=usable_T, threshold_E=threshold_E)


def _even_share(
    num_experts: int,
) -> Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray[np.float32]]:
    return lambda _, shape: np.full(shape, 1.0 / num_experts, dtype=np.float32)


def _parts(_: StrictlyBalancedOptions, num_experts: int) -> tuple[RouterTensor, ...]:
    threshold = RouterTensor(
        name="threshold",
        field="threshold_E",
        num_rows=num_experts,
        projects=False,
        init=_even_share(num_experts),
    )
    return (threshold,)


FAMILY = Family(route=route, parts=_parts)
