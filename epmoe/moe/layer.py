"""The mixture-of-experts layer: the whole chain on one screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor, nn

from epmoe.config import MoEConfig
from epmoe.config_routers import SmoothingOptions
from epmoe.moe.dispatcher import Dispatcher, LocalDispatcher
from epmoe.moe.expert_dropout import with_labels
from epmoe.moe.experts import reset_modules
from epmoe.moe.inputs import check_inputs
from epmoe.moe.losses import LossFunction, LossInputs, choice_counts
from epmoe.moe.plan import expert_capacity
from epmoe.moe.recompute import Remake, Replay, kept, plain, same_random_numbers
from epmoe.moe.router import Router
from epmoe.moe.routers.common import missing_draws
from epmoe.moe.smoothing import noisy_copy
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
        self.before_training: Callable[[MoELayer], None] | None = None
        """Called before a pass that will be differentiated, to refuse what would train wrongly."""
        self.moe, self.losses = moe, dict(losses)

    def forward(
        self,
        x_BSD: Tensor,
        ctx: TokenContext | None = None,
        beside: Callable[[Tensor], Tensor] | None = None,
        replay: Replay | None = None,
        remake: Remake = plain,
    ) -> tuple[Tensor, RouterReport]:
        """Routes, dispatches, computes, combines.

        Args:
            x_BSD: Tokens, sequence after sequence; ``[B, S, D]``.
            ctx: Padding mask and sample numbers. None: all tokens are valid and nothing random can be drawn.
            beside: Computed from x_BSD too, while rows travel if the dispatcher overlaps, and added to the result.
            replay: For a pass that will be recomputed: an empty one, which the second pass gets again.
            remake: Computes what need not be kept for the backward pass.

        Returns:
            y_BSD (as wide as the experts' outputs) and the report with losses (differentiable sums) and metrics; in a
            second pass an empty report.

        Raises:
            TypeError, ValueError: Vectors and context do not fit (``epmoe.moe.inputs``).
            ValueError: In training, a policy draws random numbers (the default router's second expert, jitter) and
                ``ctx.sample_B`` is missing. Or ``replay`` has served another call.
            RuntimeError: In training, its experts are spread over ranks and nobody reduces their gradients.
        """
        self.check_pass(x_BSD, ctx)
        ctx = ctx or TokenContext()
        copies = self.copies(x_BSD, ctx)
        if self.rerouted:
            replays = repeat(None) if replay is None else replay.of_copies()
            pairs = zip(copies, replays, strict=False)
            y_BSD, report = _mean([self._chain(copy, (copy,), ctx, None, own, remake) for copy, own in pairs])
            return y_BSD if beside is None else y_BSD + beside(x_BSD), report
        return self._chain(x_BSD, copies, ctx, beside, replay, remake)

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

    def _chain(
        self,
        x_BSD: Tensor,
        copies: Iterable[Tensor],
        ctx: TokenContext,
        beside: Callable[[Tensor], Tensor] | None,
        replay: Replay | None,
        remake: Remake,
    ) -> tuple[Tensor, RouterReport]:
        """The mean output of copies of the input that all go where the input goes, plus what is computed beside."""
        group_size, capacity = self.group_and_capacity(x_BSD)
        plan = None if replay is None else replay.plan_of_first_pass()
        again = plan is not None
        routing = self.route(x_BSD, ctx, replay, remake)
        outputs, beside_BSD = [], None
        for copy_BSD in copies:
            batch, plan = self.dispatcher.dispatch(
                self.rows(copy_BSD, ctx),
                routing,
                num_experts=self.moe.num_experts,
                group_size=group_size,
                capacity=capacity,
                plan=plan,
            )
            if beside is not None and beside_BSD is None:
                beside_BSD = beside(x_BSD)
            with same_random_numbers(replay, self.experts):
                rows_RD = self.experts(batch)
            outputs.append(self.dispatcher.combine(rows_RD, routing, plan))
        y_BSD = mean_of(outputs).to(x_BSD.dtype).unflatten(0, x_BSD.shape[:2])
        if beside_BSD is not None:
            y_BSD = y_BSD + beside_BSD
        if again:
            return y_BSD, RouterReport(losses={}, metrics={})
        assert plan is not None  # there is a copy
        if replay is not None:
            replay.remember(routing, plan)
        with kept(replay):
            return y_BSD, self.report(routing, plan, ctx, x_BSD.shape[1])

    def route(
        self, x_BSD: Tensor, ctx: TokenContext | None, replay: Replay | None = None, remake: Remake = plain
    ) -> Routing:
        """The router's decision. Arguments as for ``forward``."""
        group_size, capacity = self.group_and_capacity(x_BSD)
        routing: Routing = self.router(
            x_BSD.flatten(0, 1),
            ctx or TokenContext(),
            seq_len=x_BSD.shape[1],
            group_size=group_size,
            capacity=capacity,
            replay=replay,
            remake=remake,
        )
        return routing

    def group_and_capacity(self, x_BSD: Tensor) -> tuple[int, int]:
        """Tokens that share a capacity, and each expert's slots among them."""
        num_sequences, seq_len = x_BSD.shape[:2]
        group_size = seq_len if self.moe.group == "sequence" else num_sequences * seq_len
        return group_size, expert_capacity(self.moe, group_size, training=self.training)

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

    @property
    def _noisy(self) -> SmoothingOptions | None:
        """How the input is smoothed now; None = it is not."""
        smoothing = self.router.options.smoothing
        return smoothing if self.training and smoothing is not None and smoothing.draws else None

    @property
    def rerouted(self) -> bool:
        """Whether every copy of the input is routed on its own."""
        return self._noisy is not None and self._noisy.reroute

    def copies(self, x_BSD: Tensor, ctx: TokenContext) -> Iterator[Tensor]:
        """The inputs whose outputs are averaged: noisy copies with ``smoothing.draws``, in training; else x itself."""
        smoothing = self._noisy
        if smoothing is None:
            yield x_BSD
            return
        draws = self.router.draws(ctx, x_BSD.shape[1], x_BSD.device)
        if draws is None:
            raise missing_draws("smoothing")
        for index in range(smoothing.draws):
            yield noisy_copy(x_BSD.flatten(0, 1), draws, index, smoothing.sigma).view_as(x_BSD)

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


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(0)


def _mean(results: Sequence[tuple[Tensor, RouterReport]]) -> tuple[Tensor, RouterReport]:
    """Mean outputs and losses; the metrics are those of the first copy, so that a token is counted once."""
    outputs, reports = zip(*results, strict=True)
    losses = {name: mean_of([report.losses[name] for report in reports]) for name in reports[0].losses}
    return mean_of(outputs), RouterReport(losses=losses, metrics=reports[0].metrics)


def balance_count(moe: MoEConfig) -> str:
    """Which choices the balance loss counts: ``top1`` or ``all``."""
    if moe.router.fixed_top_k == 1:
        return "top1"  # further ones are retries, which depend on capacity
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
