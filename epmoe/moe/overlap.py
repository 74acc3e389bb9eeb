"""Rows that travel in parts while others are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from epmoe.comm.exchange import Exchange, Trip, depart
from epmoe.moe.dispatch import (
    AllToAllDispatcher,
    Dispatcher,
    Experts,
    PaddedDispatcher,
    expert_batch,
    expert_major,
    homeward,
    in_parts,
    nothing,
    rank_major,
)
from epmoe.types import DispatchPlan, ExpertBatch, Limits, PartPlan, Routing


class ExpertsInParts(Protocol):
    """Experts that can be computed a few at a time."""

    def in_parts(self, sizes: Sequence[int], run: Callable[[list[Experts]], Tensor]) -> Tensor:
        """``run`` of a function for every so many of them, consecutive ones, in one forward pass of the module."""


class OverlapDispatcher(Dispatcher):
    """Rows travel as another dispatcher says, in parts, one while another is computed. Of three, time going right:

        there     0   1     2
        experts       0     1     2
        home                0     1     2

    so at most one part travels there and one home at a time; the backward pass is the picture read from the right.
    """

    exchange: Exchange

    def __init__(self, inner: AllToAllDispatcher | PaddedDispatcher) -> None:
        super().__init__(inner.exchange, weigh_rows=inner.weigh_rows, spread=inner.spread)
        self.inner = inner
        self.static = inner.static

    def plan(self, routing: Routing, limits: Limits) -> DispatchPlan:
        """That of the other dispatcher."""
        return self.inner.plan(routing, limits)

    def carry(
        self,
        rows_ND: Tensor,
        weight_N1: Tensor | None,
        parts: tuple[PartPlan, ...],
        experts: Experts | ExpertsInParts,
        meanwhile: Callable[[], None] = nothing,
    ) -> Tensor:
        """Rows in the order of sending through their experts -> their results in the same order."""
        leaving = in_parts(parts, rows_ND, weight_N1)
        first = self._send(*leaving[0])
        meanwhile()

        def run(functions: list[Experts]) -> Tensor:
            arriving, going_home, home = first, None, []
            for number, compute in enumerate(functions):
                batch = arriving()
                if number + 1 < len(parts):
                    arriving = self._send(*leaving[number + 1])
                rows_RD = compute(batch)
                if going_home is not None:
                    home.append(going_home())
                going_home = depart(
                    homeward(self.exchange, parts[number]), rank_major(parts[number], rows_RD)
                )
            assert going_home is not None  # there is at least one part
            return torch.cat([*home, going_home()])

        sizes = [part.tokens_per_expert_L.shape[0] for part in parts]
        return experts.in_parts(sizes, run)  # type: ignore[union-attr]  # shard_experts sees to it

    def _send(self, part: PartPlan, rows_nD: Tensor, weight_n1: Tensor | None) -> Callable[[], ExpertBatch]:
        """Sends the rows of a part off -> what waits for them."""
        there, exact = (
            Trip(exchange=self.exchange, splits=part.splits, exact=exact) for exact in (False, True)
        )
        arrive = depart(there, rows_nD)
        arrive_weight = None if weight_n1 is None else depart(exact, weight_n1)

        def batch() -> ExpertBatch:
            rows_RD = expert_major(part, arrive())
            weight_R1 = None if arrive_weight is None else expert_major(part, arrive_weight())
            return expert_batch(part, rows_RD, weight_R1)

        return batch
