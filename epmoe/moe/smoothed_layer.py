"""A layer whose output in training is the mean over noisy copies of its input (``moe.router.smoothing.draws``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from epmoe.moe.layer import Beside, MoELayer, as_tokens
from epmoe.moe.recompute import KEEP, Recompute
from epmoe.moe.routers.common import missing_draws
from epmoe.moe.smoothing import noisy_copy
from epmoe.types import RouterReport, TokenContext


class SmoothedMoELayer(MoELayer):
    """All copies go where the input goes, or with ``reroute`` each where it would go itself. Evaluation knows none."""

    def forward(
        self,
        x_BSD: Tensor,
        ctx: TokenContext | None = None,
        beside: Callable[[Tensor], Tensor] | None = None,
        recompute: Recompute = KEEP,
    ) -> tuple[Tensor, RouterReport]:
        """As of ``MoELayer``."""
        smoothing = self.router.options.smoothing
        if not self.training or smoothing is None:
            return super().forward(x_BSD, ctx, beside, recompute)
        self.check_pass(x_BSD, ctx)
        ctx, shared = ctx or TokenContext(), Beside(beside, x_BSD)
        run = self._rerouted if smoothing.reroute else self._along
        y_BSD, report = run(x_BSD, ctx, shared, recompute)
        return shared.added_to(y_BSD), report

    def _along(
        self, x_BSD: Tensor, ctx: TokenContext, shared: Beside, recompute: Recompute
    ) -> tuple[Tensor, RouterReport]:
        limits, plan = self.limits(x_BSD), recompute.plan_of_first_pass()
        routing, outputs = self.router(x_BSD, ctx, limits, recompute), []
        for copy_BSD in copies_of(self, x_BSD, ctx):
            y_TD, plan = self.compute(copy_BSD, ctx, routing, limits, plan, shared, recompute)
            outputs.append(y_TD)
        assert plan is not None  # there is a copy
        return as_tokens(mean_of(outputs), x_BSD), self.report(routing, plan, x_BSD.shape[1], recompute)

    def _rerouted(
        self, x_BSD: Tensor, ctx: TokenContext, _: Beside, recompute: Recompute
    ) -> tuple[Tensor, RouterReport]:
        """Mean outputs and losses; the metrics are those of the first copy, so that a token is counted once."""
        outputs, reports = [], []
        for copy_BSD, own in zip(copies_of(self, x_BSD, ctx), recompute.of_copies(), strict=False):
            limits, plan = self.limits(copy_BSD), own.plan_of_first_pass()
            routing = self.router(copy_BSD, ctx, limits, own)
            y_TD, plan = self.compute(copy_BSD, ctx, routing, limits, plan, recompute=own)
            outputs.append(as_tokens(y_TD, x_BSD))
            reports.append(self.report(routing, plan, x_BSD.shape[1], own))
        losses = {name: mean_of([report.losses[name] for report in reports]) for name in reports[0].losses}
        return mean_of(outputs), RouterReport(losses=losses, metrics=reports[0].metrics)


def copies_of(layer: MoELayer, x_BSD: Tensor, ctx: TokenContext) -> Iterator[Tensor]:
    """The inputs whose outputs a layer averages: in training those with noise, else x itself."""
    smoothing = layer.router.options.smoothing
    if not layer.training or smoothing is None or not smoothing.draws:
        yield x_BSD
        return
    draws = layer.router.draws(ctx, x_BSD.shape[1], x_BSD.device)
    if draws is None:
        raise missing_draws("smoothing")
    for index in range(smoothing.draws):
        yield noisy_copy(x_BSD.flatten(0, 1), draws, index, smoothing.sigma).view_as(x_BSD)


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(0)
