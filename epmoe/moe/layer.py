"""The mixture-of-experts layer: the whole chain on one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from epmoe.config import MoEConfig
from epmoe.moe.dispatcher import Dispatcher, LocalDispatcher
from epmoe.moe.losses import LossFunction, LossInputs, choice_counts
from epmoe.moe.plan import expert_capacity
from epmoe.moe.recompute import Remake, Replay, kept, plain
from epmoe.moe.router import Router
from epmoe.types import DispatchPlan, RouterReport, Routing, TokenContext


class MoELayer(nn.Module):
    """Sparse mixture of experts: ``y = sum over chosen experts of weight * expert(x)``; the caller adds the residual.

    Args:
        router: Tokens to assignments.
        experts: Module from ``ExpertBatch`` to rows, with ``num_experts``.
        moe: Groups, capacity and the names of the losses.
        losses: Name -> function of the routing and the plan.

    A token whose choices are all dropped gets y = 0.
    """

    def __init__(
        self, router: Router, experts: nn.Module, moe: MoEConfig, losses: Mapping[str, LossFunction]
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.dispatcher: Dispatcher = LocalDispatcher(weigh_rows=moe.save == "hidden")
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None
        """Adds counts up over all ranks; None = there is only this one."""
        self.moe, self.losses = moe, dict(losses)

    def forward(
        self,
        x_BSD: Tensor,
        ctx: TokenContext | None = None,
        replay: Replay | None = None,
        remake: Remake = plain,
    ) -> tuple[Tensor, RouterReport]:
        """Routes, dispatches, computes, combines.

        Args:
            x_BSD: Tokens, sequence after sequence; ``[B, S, D]``.
            ctx: Padding mask and sample numbers. None: all tokens are valid and nothing random can be drawn.
            replay: For a pass that will be recomputed: an empty one, which the second pass gets again.
            remake: Computes what need not be kept for the backward pass.

        Returns:
            y_BSD and the report with losses (differentiable sums) and metrics; in a second pass an empty report.

        Raises:
            ValueError: In training, a policy draws random numbers (the default router's second expert, jitter) and
                ``ctx.sample_B`` is missing.
        """
        num_sequences, seq_len = x_BSD.shape[:2]
        x_TD = x_BSD.flatten(0, 1)
        ctx = ctx or TokenContext()
        group_size = seq_len if self.moe.group == "sequence" else num_sequences * seq_len
        capacity = expert_capacity(self.moe, group_size, training=self.training)
        inputs = self.router.project(
            x_TD, ctx, seq_len=seq_len, group_size=group_size, capacity=capacity, remake=remake
        )
        routing, plan = (None, None) if replay is None else (replay.routing, replay.plan)
        again = plan is not None
        if routing is None:
            with nullcontext() if replay is None else kept():
                routing = self.router.decide(inputs)
        batch, plan = self.dispatcher.dispatch(
            x_TD,
            routing,
            num_experts=self.moe.num_experts,
            group_size=group_size,
            capacity=capacity,
            plan=plan,
        )
        y_TD = self.dispatcher.combine(self.experts(batch), routing, plan)
        y_BSD = y_TD.to(x_BSD.dtype).view_as(x_BSD)
        if again:
            return y_BSD, RouterReport(losses={}, metrics={})
        if replay is not None:
            replay.remember(routing, plan)
        with nullcontext() if replay is None else kept():
            return y_BSD, self.report(routing, plan, ctx, seq_len)

    def report(self, routing: Routing, plan: DispatchPlan, ctx: TokenContext, seq_len: int) -> RouterReport:
        """Losses and metrics of one forward pass. With ``balance_scope: global``, in training, a collective."""
        metrics = routing_metrics(routing, plan)
        inputs = LossInputs(routing=routing, plan=plan, seq_len=seq_len)
        if self.moe.balance_scope == "global" and "balance" in self.losses:
            metrics["counted_E"] = self._counted(routing)
            inputs = self._with_global_counts(inputs, metrics, ctx)
        return RouterReport(
            losses={name: loss(inputs) for name, loss in self.losses.items()}, metrics=metrics
        )

    def _counted(self, routing: Routing) -> Tensor:
        first_only = balance_count(self.moe) == "top1"
        return choice_counts(routing, 1, self.moe.num_experts, first_only=first_only)[0]

    def _with_global_counts(
        self, inputs: LossInputs, metrics: Mapping[str, Tensor], ctx: TokenContext
    ) -> LossInputs:
        total_X = torch.cat((metrics["counted_E"], metrics["valid_tokens"].view(1)))
        if self.training:  # evaluation passes are not the same on all ranks where one of them generates text
            if ctx.counted is not None:
                total_X = total_X + torch.cat((*ctx.counted[self.router.layer],)).to(total_X.device)
            if self.sum_over_ranks is not None:
                total_X = self.sum_over_ranks(total_X)  # a collective of E + 1 numbers
        return replace(inputs, global_count_E=total_X[:-1], global_tokens=total_X[-1])


def balance_count(moe: MoEConfig) -> str:
    """Which choices the balance loss counts: ``top1`` or ``all``."""
    return moe.router.balance_count if moe.balance_count == "auto" else moe.balance_count


@torch.no_grad()
def routing_metrics(routing: Routing, plan: DispatchPlan) -> dict[str, Tensor]:
    """Sums over this rank's tokens from which drop rate, entropy and load are computed; no host sync.

    demand_E: active assignments before capacity. kept_E: after it. assignments: their number before. overflow_tokens:
    valid tokens without any kept choice. entropy: sum of the router's entropies in nats.
    """
    num_tokens = routing.valid_T.shape[0]
    kept_T = torch.zeros(num_tokens, dtype=torch.int64, device=plan.slot_A.device)
    kept_T.index_add_(0, routing.token_A, (plan.slot_A >= 0).long())
    entropy_TE = torch.special.entr(routing.probs_TE)
    return {
        "demand_E": plan.demand_GE.sum(0),
        "kept_E": plan.tokens_per_expert_E,
        "assignments": plan.demand_GE.sum(),
        "overflow_tokens": (routing.valid_T & (kept_T == 0)).sum(),
        "valid_tokens": routing.valid_T.sum(),
        "nonfinite_tokens": routing.nonfinite_tokens,
        "entropy": entropy_TE.sum(),
    }
