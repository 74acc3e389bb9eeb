"""Rows on their way to the experts and back, in one go or in parts that travel while others are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epmoe.comm.exchange import Exchange, Trip, depart, exchange_rows
from epmoe.ops import permute
from epmoe.types import ExpertBatch, PartPlan


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """What the experts get instead of one batch where work and travel overlap: a batch for each part of them.

    The rows of the first part are on their way when this is made. In three parts, time going right:

        there     0   1     2
        experts       0     1     2
        home                0     1     2

    so at most one part travels there and one home at a time; the backward pass is the picture read from the right.
    """

    send: Callable[[int], Callable[[], ExpertBatch]]
    """Sends the rows of a part off -> what waits for them."""
    send_home: Callable[[int, Tensor], Callable[[], Tensor]]
    """The same for its results."""
    num_local: tuple[int, ...]
    """Experts of each part, consecutive ones."""
    _arriving: Callable[[], ExpertBatch] | None = None

    def __post_init__(self) -> None:
        self._arriving = self.send(0)

    def through(self, compute: Sequence[Callable[[ExpertBatch], Tensor]]) -> Tensor:
        """Each part through its function; the results, home again, in the order in which rows were sent."""
        arriving, going_home, home = self._arriving, None, []
        for part, experts in enumerate(compute):
            assert arriving is not None  # as many functions as parts
            batch = arriving()
            arriving = self.send(part + 1) if part + 1 < len(self.num_local) else None
            rows_RD = experts(batch)
            if going_home is not None:
                home.append(going_home())
            going_home = self.send_home(part, rows_RD)
        assert going_home is not None  # at least one part
        return torch.cat([*home, going_home()])


def to_experts(
    exchange: Exchange | None,
    rows_ND: Tensor,
    weight_N1: Tensor | None,
    parts: tuple[PartPlan, ...],
    *,
    overlap: bool,
) -> ExpertBatch | Pipeline:
    """Rows, and where there are some their weights, to the ranks of their experts.

    Args:
        exchange: None = the experts are here.
        parts: What travels together.
        overlap: Return when the first part has left; else there is one part, and it has arrived.
    """
    if exchange is None:
        [part] = parts
        return _batch(part, rows_ND, weight_N1)
    if not overlap:
        [part] = parts
        trip, exact = (Trip(exchange=exchange, splits=part.splits, exact=exact) for exact in (False, True))
        rows_RD = _expert_major(part, exchange_rows(trip, rows_ND))
        weight_R1 = None if weight_N1 is None else _expert_major(part, exchange_rows(exact, weight_N1))
        return _batch(part, rows_RD, weight_R1)
    sizes = [sum(part.splits[0]) for part in parts]
    rows = rows_ND.split(sizes)
    weights = [None] * len(parts) if weight_N1 is None else weight_N1.split(sizes)

    def send(number: int) -> Callable[[], ExpertBatch]:
        part, weight_n1 = parts[number], weights[number]
        trip, exact = (Trip(exchange=exchange, splits=part.splits, exact=exact) for exact in (False, True))
        arrive = depart(trip, rows[number])
        arrive_weight = None if weight_n1 is None else depart(exact, weight_n1)

        def batch() -> ExpertBatch:
            rows_RD = _expert_major(part, arrive())
            weight_R1 = None if arrive_weight is None else _expert_major(part, arrive_weight())
            return _batch(part, rows_RD, weight_R1)

        return batch

    def send_home(number: int, rows_RD: Tensor) -> Callable[[], Tensor]:
        part = parts[number]
        trip = Trip(exchange=exchange, splits=part.splits, home=True)
        return depart(trip, _rank_major(part, rows_RD))

    num_local = tuple(part.tokens_per_expert_L.shape[0] for part in parts)
    return Pipeline(send=send, send_home=send_home, num_local=num_local)


def bring_home(
    exchange: Exchange | None, rows_RD: Tensor, parts: tuple[PartPlan, ...], *, overlap: bool
) -> Tensor:
    """Results back on the ranks their rows came from, in the order of sending; a pipeline's already are."""
    if exchange is None or overlap:
        return rows_RD
    [part] = parts
    trip = Trip(exchange=exchange, splits=part.splits, home=True)
    return exchange_rows(trip, _rank_major(part, rows_RD))


def _batch(part: PartPlan, rows_RD: Tensor, weight_R1: Tensor | None) -> ExpertBatch:
    return ExpertBatch(
        rows_RD=rows_RD,
        tokens_per_expert_L=part.tokens_per_expert_L,
        rows_per_expert=part.rows_per_expert,
        weight_R=None if weight_R1 is None else weight_R1[:, 0],
    )


def _expert_major(part: PartPlan, rows_RX: Tensor) -> Tensor:
    """Received rows, those of each expert together."""
    if part.expert_order_R is not None:
        return permute(rows_RX, part.expert_order_R)
    return _swap_blocks(rows_RX, len(part.splits[-1]), part.tokens_per_expert_L.shape[0])


def _rank_major(part: PartPlan, rows_RX: Tensor) -> Tensor:
    """The inverse."""
    if part.rank_order_R is not None:
        return permute(rows_RX, part.rank_order_R)
    return _swap_blocks(rows_RX, part.tokens_per_expert_L.shape[0], len(part.splits[-1]))


def _swap_blocks(rows_RX: Tensor, outer: int, inner: int) -> Tensor:
    """Rows in ``outer`` x ``inner`` equal blocks, the inner ones outside: rank-major to expert-major and back."""
    blocks = rows_RX.view(outer, inner, rows_RX.shape[0] // (outer * inner), rows_RX.shape[1])
    return blocks.transpose(0, 1).reshape(rows_RX.shape)
