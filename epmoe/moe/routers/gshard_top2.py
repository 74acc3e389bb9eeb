"""GShard's top-2 router with a random second expert, arXiv:2006.16668 Algorithm 1."""

from __future__ import annotations

import math

import torch

from epmoe.config_routers import Top2Options
from epmoe.moe.routers.common import (
    Choices,
    as_routing,
    choose,
    drawn_uniform,
    numbers_given,
    top_ids,
)
from epmoe.moe.routers.family import Family
from epmoe.ops import philox
from epmoe.types import RouterInputs, Routing

FUSED = ("all", "random", "threshold", "none")
"""Policies that the operator ``route_topk`` knows."""


def route(inputs: RouterInputs, options: Top2Options, top_k: int = 2) -> Routing:
    """Two experts per token; the weights g1/(g1+g2) and g2/(g1+g2) are fixed before anything is dropped.

    In training the second expert is used with probability min(1, a2/tau), tau = 0.5 in the paper, or by another
    policy; a skipped second choice takes no slot and the first one's weight does not change.
    """
    policy = options.second_policy if inputs.training else options.second_policy_eval
    fused = policy if policy in FUSED else "all"
    choices = choose(inputs, top_k, normalize=True, second_policy=fused, tau=options.tau)
    if policy == "sampling":
        choices = _sampled(inputs, choices)
    if policy == "relative":
        choices = _relative(inputs, choices, options.ratio)
    if options.literal_alg1:
        choices = _literal(inputs, choices)
    return as_routing(inputs, options, choices)


def _sampled(inputs: RouterInputs, best: Choices) -> Choices:
    """The second expert drawn among all but the first, by its probability (Gumbel-max on the logits)."""
    shape = tuple(inputs.logits_TE.shape)
    uniform_TE = numbers_given(inputs, "uniform_TE", shape, "sampling")
    if uniform_TE is None:
        uniform_TE = drawn_uniform(inputs, philox.GUMBEL, shape[1])
    usable_T1 = best.active_TK[:, :1]
    clean_TE = inputs.logits_TE.masked_fill(~usable_T1, 0.0)
    first_T1 = best.ids_TK[:, :1]
    noisy_TE = (clean_TE.detach().double() + philox.gumbel(uniform_TE)).scatter(1, first_T1, -torch.inf)
    second_T1 = top_ids(noisy_TE, 1)
    ids_TK = torch.cat((first_T1, second_T1), dim=1)
    second_T1 = usable_T1 & noisy_TE.gather(1, second_T1).isfinite()  # another expert is available
    active_TK = torch.cat((usable_T1, second_T1), dim=1)
    weights_TK = (
        clean_TE.gather(1, ids_TK).masked_fill(usable_T1 & ~active_TK, -torch.inf).softmax(-1) * active_TK
    )
    return Choices(probs_TE=best.probs_TE, ids_TK=ids_TK, weights_TK=weights_TK, active_TK=active_TK)


def _relative(inputs: RouterInputs, choices: Choices, ratio: float) -> Choices:
    """The second expert only where p2 >= ratio * p1 (ST-MoE, arXiv:2202.08906), in float64 from the two logits."""
    chosen_TK = inputs.logits_TE.gather(1, choices.ids_TK).double()
    near_T = chosen_TK[:, 1] - chosen_TK[:, 0] >= math.log(ratio)
    active_TK = torch.stack((choices.active_TK[:, 0], choices.active_TK[:, 1] & near_T), dim=1)
    return Choices(
        probs_TE=choices.probs_TE,
        ids_TK=choices.ids_TK,
        weights_TK=choices.weights_TK * active_TK,
        active_TK=active_TK,
    )


def _literal(inputs: RouterInputs, choices: Choices) -> Choices:
    """Every second choice takes a slot, as in the pseudo-code; the skipped ones keep their weight of 0."""
    available_TK = inputs.logits_TE.gather(1, choices.ids_TK).isfinite()
    active_TK = choices.active_TK[:, :1] & available_TK
    return Choices(
        probs_TE=choices.probs_TE, ids_TK=choices.ids_TK, weights_TK=choices.weights_TK, active_TK=active_TK
    )


FAMILY = Family(route=route)
