"""A layer's pass that also returns what every expert said, for losses that compare experts (``epmoe.moe.mixture``)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epmoe.moe.dispatch import LocalDispatcher
from epmoe.moe.layer import MoELayer
from epmoe.moe.routers.common import missing_draws
from epmoe.moe.smoothed_layer import copies_of, mean_of
from epmoe.ops import DROPLESS, philox
from epmoe.types import DispatchPlan, Draws, Limits, RouterReport, Routing, TokenContext

SOFTMAX_ROUTERS = ("dense", "gshard_top2", "switch", "topk", "noisy_topk")
"""Families whose probabilities are the softmax of the logits in their decision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOutputs:
    """One pass, expert by expert: K per token, its choices in their order and then its probes."""

    y_BSO: Tensor
    """The layer's output."""
    report: RouterReport
    """The layer's report; probes are not in it."""
    outputs_TKO: Tensor
    """Each expert's own output, without weight; zeros where it was not evaluated."""
    logits_TK: Tensor
    """The router's logits of these experts, differentiable; -inf where one was not evaluated (padding, dropped)."""
    expert_TK: Tensor
    """int64: which experts they are; -1 where one was not evaluated."""


def run_experts(
    layer: MoELayer, x_BSD: Tensor, ctx: TokenContext | None = None, *, probes: int = 0
) -> ExpertOutputs:
    """Routes, computes and combines as ``layer(x_BSD, ctx)`` does, and keeps what every expert said.

    Args:
        layer: Holds all its experts (local dispatcher).
        x_BSD: Tokens, ``[B, S, D]``.
        ctx: As for the layer.
        probes: Further experts per token, drawn from those it did not choose: evaluated, and not in the output. With a
            sparse router their losses tell the router what it misses.

    Raises:
        ValueError: The experts are spread over ranks; the router's probabilities are no softmax of its logits; noisy
            copies of the input are routed on their own; ``probes`` without ``ctx.sample_B`` or more than there are
            experts left.
    """
    _check(layer, probes)
    ctx = ctx or TokenContext()
    limits = layer.limits(x_BSD)
    routing = layer.router(x_BSD, ctx, limits)
    rows_NO, plan = _rows(layer, x_BSD, ctx, routing, limits)
    y_TO = LocalDispatcher().combine(rows_NO, routing, plan).to(x_BSD.dtype)
    num_tokens = x_BSD.shape[0] * x_BSD.shape[1]
    width = routing.token_A.shape[0] // num_tokens if num_tokens else layer.moe.top_k
    outputs_TKO, expert_TK = _by_token(rows_NO, plan, routing, width)
    if probes:
        draws = layer.router.draws(ctx, x_BSD.shape[1], x_BSD.device)
        if draws is None:
            raise missing_draws("probes")
        extra = _probe_routing(routing, draws, probes)
        dropless = replace(limits, capacity=DROPLESS)
        found = _by_token(*_rows(layer, x_BSD, ctx, extra, dropless), extra, probes)
        outputs_TKO, expert_TK = torch.cat((outputs_TKO, found[0]), 1), torch.cat((expert_TK, found[1]), 1)
    return ExpertOutputs(
        y_BSO=y_TO.unflatten(0, x_BSD.shape[:2]),
        report=layer.report(routing, plan, x_BSD.shape[1]),
        outputs_TKO=outputs_TKO,
        logits_TK=routing.logits_TE.gather(1, expert_TK.clamp(min=0)).masked_fill(expert_TK < 0, -torch.inf),
        expert_TK=expert_TK,
    )


def _check(layer: MoELayer, probes: int) -> None:
    if not isinstance(layer.dispatcher, LocalDispatcher):
        raise ValueError(
            f"the outputs of a token's experts can only be compared where all of them are, one row for each, and "
            f"{type(layer.dispatcher).__name__} brings them back as one sum: EDD and the losses of mixtures need "
            f"parallel.ep_size=1 and dispatcher auto or local"
        )
    name = layer.moe.router.name
    if name not in SOFTMAX_ROUTERS:
        raise ValueError(
            f"router {name} has probabilities that are not the softmax of its logits, which losses of mixtures are "
            f"made from; routers that go: {', '.join(SOFTMAX_ROUTERS)}"
        )
    smoothing = layer.router.options.smoothing
    if layer.training and smoothing is not None and smoothing.draws and smoothing.reroute:
        raise ValueError(
            "smoothing.reroute=true gives every noisy copy of the input experts of its own, so a token has no one "
            "output per expert; set reroute: false"
        )
    left = layer.moe.num_experts - layer.moe.top_k
    if not 0 <= probes <= left:
        raise ValueError(f"probes={probes} must be between 0 and the {left} experts that are not chosen")


def _rows(
    layer: MoELayer, x_BSD: Tensor, ctx: TokenContext, routing: Routing, limits: Limits
) -> tuple[Tensor, DispatchPlan]:
    """What the experts say, without weights, averaged over the noisy copies where the input is smoothed."""
    rows = []
    for copy_BSD in copies_of(layer, x_BSD, ctx):
        batch, plan = LocalDispatcher().dispatch(copy_BSD.flatten(0, 1), routing, limits)
        rows.append(layer.experts(batch))
    return mean_of(rows), plan


def _by_token(rows_NO: Tensor, plan: DispatchPlan, routing: Routing, width: int) -> tuple[Tensor, Tensor]:
    """Rows and the numbers of their experts at [token, choice]; zeros and -1 elsewhere."""
    num_tokens = routing.valid_T.shape[0]
    place_N = (routing.token_A * width + routing.choice_A)[plan.assignment_N]
    outputs_XO = rows_NO.new_zeros(num_tokens * width, rows_NO.shape[1]).index_copy(0, place_N, rows_NO)
    expert_X = torch.full((num_tokens * width,), -1, device=place_N.device)
    expert_X = expert_X.index_copy(0, place_N, routing.expert_A[plan.assignment_N])
    return outputs_XO.view(num_tokens, width, rows_NO.shape[1]), expert_X.view(num_tokens, width)


def _probe_routing(routing: Routing, draws: Draws, probes: int) -> Routing:
    """So many experts more per token, of weight 0, at random among the available ones it does not go to."""
    num_tokens, num_experts = routing.logits_TE.shape
    uniform_TE = philox.uniform(
        draws.seed, philox.PROBE, draws.layer, draws.sample_T, draws.position_T, num_experts
    )
    chosen_X = torch.zeros(num_tokens * num_experts, dtype=torch.int64, device=uniform_TE.device)
    chosen_X.scatter_add_(0, routing.token_A * num_experts + routing.expert_A, routing.active_A.long())
    free_TE = (chosen_X.view(num_tokens, num_experts) == 0) & (routing.logits_TE != -torch.inf)
    free_TE = free_TE & routing.valid_T.unsqueeze(1)
    expert_TQ = uniform_TE.masked_fill(~free_TE, 2.0).sort(dim=-1, stable=True).indices[:, :probes]
    token_T = torch.arange(num_tokens, device=expert_TQ.device)
    return replace(
        routing,
        token_A=token_T.repeat_interleave(probes),
        expert_A=expert_TQ.reshape(-1),
        weight_A=routing.weight_A.new_zeros(num_tokens * probes),
        active_A=free_TE.gather(1, expert_TQ).reshape(-1),
        choice_A=torch.arange(probes, device=expert_TQ.device).repeat(num_tokens),
    )
