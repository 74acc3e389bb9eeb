"""The mixture-of-experts layer: the whole chain on one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from epmoe.config import MoEConfig
from epmoe.moe.dispatch import Dispatcher, LocalDispatcher, nothing
from epmoe.moe.expert_dropout import with_labels
from epmoe.moe.experts import reset_modules
from epmoe.moe.inputs import check_inputs
from epmoe.moe.losses import LossFunction, LossInputs, choice_counts
from epmoe.moe.plan import expert_capacity
from epmoe.moe.recompute import KEEP, Recompute
from epmoe.moe.router import Router
from epmoe.moe.routers.common import missing_draws
from epmoe.types import DispatchPlan, LayerSums, Limits, RouterReport, Routing, TokenContext


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
        self.before_training: Callable[[MoELayer], None] | None = None
        """Called before a pass that will be differentiated, to refuse what would train wrongly."""
        self.earlier: LayerSums | None = None
        """What the router did with this rank's earlier micro-batches of the step (``balance_scope: global``); whoever
        has several says so."""
        self.moe, self.losses = moe, dict(losses)

    def forward(
        self,
        x_BSD: Tensor,
        ctx: TokenContext | None = None,
        beside: Callable[[Tensor], Tensor] | None = None,
        recompute: Recompute = KEEP,
    ) -> tuple[Tensor, RouterReport]:
        """Routes, dispatches, computes, combines.

        Args:
            x_BSD: Tokens, sequence after sequence; ``[B, S, D]``.
            ctx: Padding mask and sample numbers. None: all tokens are valid and nothing random can be drawn.
            beside: Computed from x_BSD too, while rows travel if the dispatcher overlaps, and added to the result.
            recompute: What is not kept for the backward pass. For a pass that checkpoint computes again a new
                ``Replay()``, which the second pass gets too.

        Returns:
            y_BSD (as wide as the experts' outputs) and the report with losses (differentiable sums) and metrics; in a
            second pass an empty report.

        Raises:
            TypeError, ValueError: Vectors and context do not fit (``epmoe.moe.inputs``).
            ValueError: In training, a policy draws random numbers (the default router's second expert, jitter) and
                ``ctx.sample_B`` is missing. Or the ``Replay`` has served another call.
            RuntimeError: In training, its experts are spread over ranks and nobody reduces their gradients.
        """
        self.check_pass(x_BSD, ctx)
        ctx, shared = ctx or TokenContext(), Beside(beside, x_BSD)
        limits, plan = self.limits(x_BSD), recompute.plan_of_first_pass()
        routing = self.router(x_BSD, ctx, limits, recompute)
        y_TD, plan = self.compute(x_BSD, ctx, routing, limits, plan, shared, recompute)
        y_BSD = shared.added_to(as_tokens(y_TD, x_BSD))
        return y_BSD, self.report(routing, plan, x_BSD.shape[1], recompute)

    def check_pass(self, x_BSD: Tensor, ctx: TokenContext | None) -> None:
        """The beginning of every forward pass, whatever the layer computes."""
        check_inputs(x_BSD, ctx, self.router.d_model)
        if self.before_training is not None and self.training and torch.is_grad_enabled():
            self.before_training(self)

    def reset_parameters(self) -> None:
        """Draws router and experts anew, as after ``to_empty``; equal seeds give the same weights in every layout.

        Raises:
            ValueError: An expert has tensors and no ``reset_parameters``.
        """
        reset_modules(self)

    def route(self, x_BSD: Tensor, ctx: TokenContext | None = None) -> Routing:
        """The router's decision alone: which experts a token would take."""
        routing: Routing = self.router(x_BSD, ctx or TokenContext(), self.limits(x_BSD))
        return routing

    def limits(self, x_BSD: Tensor) -> Limits:
        """Tokens that share a capacity, and each expert's slots among them."""
        num_sequences, seq_len = x_BSD.shape[:2]
        group_size = seq_len if self.moe.group == "sequence" else num_sequences * seq_len
        capacity = expert_capacity(self.moe, group_size, training=self.training)
        return Limits(num_experts=self.moe.num_experts, group_size=group_size, capacity=capacity)

    def compute(
        self,
        x_BSD: Tensor,
        ctx: TokenContext,
        routing: Routing,
        limits: Limits,
        plan: DispatchPlan | None = None,
        meanwhile: Callable[[], None] = nothing,
        recompute: Recompute = KEEP,
    ) -> tuple[Tensor, DispatchPlan]:
        """What the experts make of the tokens, summed with the routing's weights -> ``[T, D]``."""
        with recompute.same_random_numbers(self.experts):
            rows_TD = self.rows(x_BSD, ctx)
            return self.dispatcher.apply(rows_TD, routing, limits, self.experts, plan, meanwhile)

    def rows(self, x_BSD: Tensor, ctx: TokenContext) -> Tensor:
        """What is dispatched: the tokens, with whose they are where the experts ask for it.

        Raises:
            ValueError: They do, and ``ctx.sample_B`` is missing.
        """
        x_TD = x_BSD.flatten(0, 1)
        if not getattr(self.experts, "wants_labels", False):
            return x_TD
        draws = self.router.draws(ctx, x_BSD.shape[1], x_BSD.device)
        if draws is None:
            raise missing_draws("expert_dropout")
        return with_labels(x_TD, draws)

    def report(
        self,
        routing: Routing,
        plan: DispatchPlan,
        seq_len: int,
        recompute: Recompute = KEEP,
    ) -> RouterReport:
        """Losses and metrics of one forward pass, nothing in a second one. With ``balance_scope: global``, in training,
        a collective."""
        if recompute.routing is not None:
            return RouterReport(losses={}, metrics=None)
        recompute.remember(routing, plan)
        with recompute.kept():
            return self._report(routing, plan, seq_len)

    def _report(self, routing: Routing, plan: DispatchPlan, seq_len: int) -> RouterReport:
        metrics = routing_metrics(routing, plan)
        inputs = LossInputs(routing=routing, plan=plan, seq_len=seq_len)
        if self.moe.balance_scope == "global" and "balance" in self.losses:
            counted_E = self._counted(routing)
            metrics = replace(metrics, counted_E=counted_E)
            inputs = self._with_global_counts(inputs, counted_E, metrics.valid_tokens)
        return RouterReport(
            losses={name: loss(inputs) for name, loss in self.losses.items()}, metrics=metrics
        )

    def _counted(self, routing: Routing) -> Tensor:
        first_only = balance_count(self.moe) == "top1"
        return choice_counts(routing, 1, self.moe.num_experts, first_only=first_only)[0]

    def _with_global_counts(self, inputs: LossInputs, counted_E: Tensor, valid_tokens: Tensor) -> LossInputs:
        total_X = torch.cat((counted_E, valid_tokens.view(1)))
        if self.training:  # evaluation passes are not the same on all ranks where one of them generates text
            earlier = self.earlier
            if earlier is not None and earlier.counted_E is not None:
                before_X = torch.cat((earlier.counted_E, earlier.valid_tokens.view(1)))
                total_X = total_X + before_X.long().to(total_X.device)
            if self.sum_over_ranks is not None:
                total_X = self.sum_over_ranks(total_X)  # a collective of E + 1 numbers
        return replace(inputs, global_count_E=total_X[:-1], global_tokens=total_X[-1])


def as_tokens(y_TD: Tensor, x_BSD: Tensor) -> Tensor:
    """Summed rows in the dtype and the sequences of the input."""
    y_BSD: Tensor = y_TD.to(x_BSD.dtype).unflatten(0, x_BSD.shape[:2])
    return y_BSD


class Beside:
    """Something that is computed once from a layer's input, while its rows travel, and added to its output."""

    def __init__(self, fn: Callable[[Tensor], Tensor] | None, x_BSD: Tensor) -> None:
        self.fn, self.x_BSD = fn, x_BSD
        self.result_BSD: Tensor | None = None

    def __call__(self) -> None:
        if self.fn is not None and self.result_BSD is None:
            self.result_BSD = self.fn(self.x_BSD)

    def added_to(self, y_BSD: Tensor) -> Tensor:
        """The sum; y itself where there is nothing."""
        self()
        return y_BSD if self.result_BSD is None else y_BSD + self.result_BSD


def balance_count(moe: MoEConfig) -> str:
    """Which choices the balance loss counts: ``top1`` or ``all``."""
    if moe.router.fixed_top_k == 1:
        return "top1"  # further ones are retries, which depend on capacity
    return moe.router.balance_count if moe.balance_count == "auto" else moe.balance_count


@torch.no_grad()
def routing_metrics(routing: Routing, plan: DispatchPlan) -> LayerSums:
    """What the router did with this rank's tokens; no host sync."""
    num_tokens = routing.valid_T.shape[0]
    kept_T = torch.zeros(num_tokens, dtype=torch.int64, device=plan.slot_A.device)
    kept_T.index_add_(0, routing.token_A, (plan.slot_A >= 0).long())
    entropy_TE = torch.special.entr(routing.probs_TE)
    return LayerSums(
        demand_E=plan.demand_GE.sum(0),
        kept_E=plan.tokens_per_expert_E,
        assignments=plan.demand_GE.sum(),
        overflow_tokens=(routing.valid_T & (kept_T == 0)).sum(),
        valid_tokens=routing.valid_T.sum(),
        nonfinite_tokens=routing.nonfinite_tokens,
        entropy=entropy_TE.sum(),
    )
