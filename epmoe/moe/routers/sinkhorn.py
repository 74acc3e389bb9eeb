"""Sinkhorn routing, as in S-BASE (arXiv:2202.01169): balanced by a transport plan, weighted by the router itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from epmoe.config_routers import SinkhornOptions
from epmoe.moe.routers.common import (
    PRIORITY_STEPS,
    UNAVAILABLE,
    Choices,
    as_routing,
    groups_of,
    probabilities,
    top_ids,
)
from epmoe.moe.routers.family import Family
from epmoe.ops.reference import usable_rows
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: SinkhornOptions, top_k: int) -> Routing:
    """In training the K best of a group's plan, in evaluation of the logits; weights are never rescaled.

    The weight is the sigmoid of the logit for K = 1, else its probability.
    """
    logits_TE = inputs.logits_TE
    usable_T = usable_rows(logits_TE, inputs.valid_T)
    clean_TE, probs_TE = probabilities(logits_TE, usable_T)
    preferred_TE = clean_TE
    if inputs.training:
        num_groups, size = groups_of(inputs)
        plan_GSE = log_plan(
            clean_TE.detach().view(num_groups, size, logits_TE.shape[1]),
            usable_T.view(num_groups, size),
            tolerance=options.tolerance,
            iterations=options.iterations,
        )
        closed_TE = clean_TE == -torch.inf
        steps_TE = (plan_GSE.view_as(clean_TE).masked_fill(closed_TE, 0.0) * PRIORITY_STEPS).round().long()
        preferred_TE = steps_TE.masked_fill(closed_TE, UNAVAILABLE)
    ids_TK = top_ids(preferred_TE, top_k)
    active_TK = usable_T.unsqueeze(1) & clean_TE.gather(1, ids_TK).isfinite()
    gate_TE = clean_TE.sigmoid() if top_k == 1 else probs_TE
    choices = Choices(
        probs_TE=probs_TE,
        ids_TK=ids_TK,
        weights_TK=gate_TE.gather(1, ids_TK) * active_TK,
        active_TK=active_TK,
    )
    return as_routing(inputs, options, choices)


@torch.no_grad()
def log_plan(logits_GSE: Tensor, usable_GS: Tensor, *, tolerance: float, iterations: int) -> Tensor:
    """Logarithm of diag(d0) exp(logits) diag(d1), rows summing to 1/n and columns to 1/E -> float64 ``[G, S, E]``.

    From d1 = 1: ``d0 = (1/n) / (K d1)``, ``d1 = (1/E) / (K^T d0)``, until d1 changes by less than ``tolerance`` on
    average. Everything stays in logarithms, where no logit is too large. A group that is done stands still, so that
    its neighbours do not change it and nobody has to ask the device. Rows of tokens that are not usable say nothing.
    """
    num_experts = logits_GSE.shape[2]
    # A token that is left out has no part in any column. Finite, because -inf times 0 and -inf - -inf are NaN.
    log_GSE = logits_GSE.double()
    shut_GSE = ~usable_GS.unsqueeze(2) | (log_GSE == -torch.inf)
    closed_G1E = shut_GSE.all(1, keepdim=True)
    log_num_G11 = usable_GS.sum(1).clamp(min=1).double().log().view(-1, 1, 1)
    column_G1E = log_GSE.new_zeros(log_GSE.shape[0], 1, num_experts)
    row_GS1 = log_GSE.new_zeros(*log_GSE.shape[:2], 1)
    done_G11 = torch.zeros_like(log_num_G11, dtype=torch.bool)
    for _ in range(iterations):
        new_row_GS1 = -log_num_G11 - _log_sum(log_GSE + column_G1E, shut_GSE, dim=2)
        new_column_G1E = -math.log(num_experts) - _log_sum(log_GSE + new_row_GS1, shut_GSE, dim=1)
        new_column_G1E = new_column_G1E.masked_fill(closed_G1E, 0.0)
        change_G11 = (new_column_G1E.exp() - column_G1E.exp()).abs().mean(2, keepdim=True)
        row_GS1 = torch.where(done_G11, row_GS1, new_row_GS1)
        column_G1E = torch.where(done_G11, column_G1E, new_column_G1E)
        done_G11 = done_G11 | (change_G11 < tolerance)
    return log_GSE + row_GS1 + column_G1E


def _log_sum(log_GSE: Tensor, shut_GSE: Tensor, *, dim: int) -> Tensor:
    """Logarithm of the sum of exponentials along ``dim``, without what is shut; 0 where everything is."""
    open_GSE = log_GSE.masked_fill(shut_GSE, -torch.inf)
    total_GXE = open_GSE.logsumexp(dim, keepdim=True)
    return total_GXE.masked_fill(shut_GSE.all(dim, keepdim=True), 0.0)


FAMILY = Family(route=route)
