"""Rows and counts between the ranks that share the experts.

An exchange is a value: a few steps, each an all-to-all among some of the W ranks. Rows lie in W blocks, one for every
rank. A step among n ranks sends each of them the W/n blocks that have to go its way; what arrives is W blocks again,
and after the last step they are those that the W ranks sent here, in rank order, whatever the steps were:

    flat           every rank with every rank                                  1 step,  W = n
    hierarchical   ranks of a node, then ranks of equal number in their nodes  2 steps, W = ranks per node * nodes

The way home is the same steps backwards, and so is the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from epmoe import env
from epmoe.comm.waiting import wait_for
from epmoe.comm.wire import pack, unpack

Group = dist.ProcessGroup | None
"""The ranks that take part; None = all of the job, as in torch.distributed."""
Splits = tuple[int, ...]
"""Rows in each of the W blocks."""
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """How rows get from rank to rank. Made by ``flat`` and ``hierarchical``; every rank has its own, of its groups."""

    groups: tuple[Group, ...]
    """The ranks of each step."""
    sizes: tuple[int, ...]
    """How many they are; their product is W."""
    wire: torch.dtype | None = None
    """Rows (not their weights, not counts) travel in this dtype, there, back and in the backward pass; None = their
    own. Those that stay on their rank are rounded too, so that no layout changes a number."""
    layer: int | None = None
    """Named when a peer is lost."""
    observe: Callable[[int, int], None] | None = None
    """Called with the global rank of the receiver and the bytes for every message to another rank, in every pass.
    Blocks without rows are messages too."""

    @property
    def num_ranks(self) -> int:
        """Ranks that share the experts, W."""
        return math.prod(self.sizes)

    def __deepcopy__(self, _: object) -> Exchange:
        return self  # a copy of a layer talks to the same ranks

    def __reduce__(self) -> tuple[Any, ...]:
        return Disconnected, ()


DISCONNECTED = (
    "this layer was loaded from a file, where its experts were spread over ranks; call "
    "epmoe.shard_experts(model, mesh) to join it to the ranks of this job"
)


class Disconnected:
    """What a process group is in a file: a layer that was saved with its experts spread over ranks."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(DISCONNECTED)


def flat(group: Group) -> Exchange:
    """One step: every rank sends to every other."""
    return Exchange(groups=(group,), sizes=(dist.get_world_size(group),))


def hierarchical(node: Group, rail: Group) -> Exchange:
    """Two steps: inside the node to the rank that has the receiver's number there, and from it to the receiver's node.

    Between nodes a rank sends one message to each other node instead of one to each of its ranks. Ranks must be
    numbered node by node.

    Args:
        node: The ranks of this node.
        rail: The ranks with this one's number in their nodes, one of every node.
    """
    return Exchange(groups=(node, rail), sizes=(dist.get_world_size(node), dist.get_world_size(rail)))


# ------------------------------------------------------------------------------------------- one step
def _by_column(items: Sequence[_Item], inner: int) -> list[_Item]:
    """What lies in rows of ``inner``, column by column."""
    return [item for column in range(inner) for item in items[column::inner]]


def _swap(rows_NX: Tensor, block_sizes: Sequence[int], inner: int) -> Tensor:
    """The same for blocks of rows; one row or one column stays as it is."""
    if inner in (1, len(block_sizes)):
        return rows_NX
    return torch.cat(_by_column(rows_NX.split(list(block_sizes)), inner))


def _send(
    exchange: Exchange, step: int, rows_NX: Tensor, before: Splits, after: Splits, *, home: bool, later: bool
) -> tuple[Tensor, Any]:
    """One all-to-all -> the rows it brings, and with ``later`` what to wait for until they are there.

    Args:
        before, after: Blocks before and after the step, as it is on the way there.
        home: The other way round: from ``after`` to ``before``.
    """
    group, num_peers = exchange.groups[step], exchange.sizes[step]
    per_peer = len(before) // num_peers
    send = [sum(before[peer::num_peers]) for peer in range(num_peers)]
    receive = [sum(after[peer * per_peer : (peer + 1) * per_peer]) for peer in range(num_peers)]
    if home:
        send, receive = receive, send
    else:
        rows_NX = _swap(rows_NX, before, num_peers)
    env.fault("dispatch.exchange")
    if exchange.observe is not None:
        _tell(exchange.observe, group, [rows * rows_NX.shape[1] * rows_NX.itemsize for rows in send])
    rows_RX = rows_NX.new_empty(sum(receive), rows_NX.shape[1])
    try:
        work = dist.all_to_all_single(
            rows_RX, rows_NX.contiguous(), receive, send, group=group, async_op=later
        )
    except RuntimeError as error:
        _name_layer(error, exchange)
        raise
    return rows_RX, work


def _tell(observe: Callable[[int, int], None], group: Group, sent: list[int]) -> None:
    for peer, num_bytes in zip(dist.get_process_group_ranks(group), sent, strict=True):
        if peer != dist.get_rank():
            observe(peer, num_bytes)


def _name_layer(error: RuntimeError, exchange: Exchange) -> None:
    if exchange.layer is not None:
        error.add_note(f"layer {exchange.layer}")


# ------------------------------------------------------------------------------------------- a whole trip
@dataclass(frozen=True, slots=True, kw_only=True)
class Trip:
    """Rows of one pass and their gradients: where from, where to."""

    exchange: Exchange
    splits: tuple[Splits, ...]
    """Rows in the blocks as they leave for the experts, after each step, and so as they arrive there."""
    home: bool = False
    """From the experts back."""
    exact: bool = False
    """In their own dtype, whatever ``wire`` says."""

    @property
    def wire(self) -> torch.dtype | None:
        """What the rows travel in."""
        return None if self.exact else self.exchange.wire


def _begin(trip: Trip, rows_NX: Tensor, *, home: bool, later: bool) -> tuple[Tensor, Any]:
    """The trip up to the step that may take long: the last one there, the first one home; between nodes, if any."""
    splits, last = trip.splits, len(trip.splits) - 2
    rows_NX = pack(rows_NX, trip.wire)
    for step in range(0 if home else last):
        rows_NX, _ = _send(
            trip.exchange, step, rows_NX, splits[step], splits[step + 1], home=False, later=False
        )
    return _send(trip.exchange, last, rows_NX, splits[last], splits[last + 1], home=home, later=later)


def _end(trip: Trip, rows_NX: Tensor, work: Any, dtype: torch.dtype, *, home: bool) -> Tensor:
    """Waits for it, and goes on to where the trip ends."""
    try:
        wait_for(work)
    except RuntimeError as error:
        _name_layer(error, trip.exchange)
        raise
    splits, sizes = trip.splits, trip.exchange.sizes
    for step in range(len(sizes) - 1, -1, -1) if home else ():
        if step < len(sizes) - 1:
            rows_NX, _ = _send(
                trip.exchange, step, rows_NX, splits[step], splits[step + 1], home=True, later=False
            )
        by_peer = _by_column(splits[step], sizes[step])
        rows_NX = _swap(rows_NX, by_peer, len(by_peer) // sizes[step])
    return unpack(rows_NX, dtype, trip.wire)


class _Travel(torch.autograd.Function):
    """There and, in the backward pass, back again."""

    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return _end(trip, *_begin(trip, rows_NX, home=trip.home, later=False), rows_NX.dtype, home=trip.home)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        trip, [grad] = ctx.trip, grads
        there = not trip.home
        return _end(trip, *_begin(trip, grad, home=there, later=False), grad.dtype, home=there), None


def exchange_rows(trip: Trip, rows_NX: Tensor) -> Tensor:
    """Takes rows along on a trip and returns what it brings here, differentiable."""
    apply: Callable[..., Tensor] = _Travel.apply
    return apply(rows_NX, trip)


# ------------------------------------------------------------------------------------------- in the background
@dataclass(slots=True)
class _UnderWay:
    """A trip between its departure and its arrival."""

    trip: Trip
    dtype: torch.dtype
    rows_NX: Tensor | None = None
    work: Any = None

    def depart(self, rows_NX: Tensor, *, home: bool) -> None:
        self.rows_NX, self.work = _begin(self.trip, rows_NX, home=home, later=True)

    def arrive(self, *, home: bool) -> Tensor:
        rows_NX, work = self.rows_NX, self.work
        assert rows_NX is not None  # it has departed
        self.rows_NX = self.work = None
        return _end(self.trip, rows_NX, work, self.dtype, home=home)


class _Depart(torch.autograd.Function):
    """Sends rows off; in the backward pass waits for their gradient, which ``_Arrive`` has sent off by then.

    What ties the two in the graph is an empty tensor: nobody sees rows that are not there yet.
    """

    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, under_way: _UnderWay) -> Tensor:
        ctx.under_way = under_way
        under_way.depart(rows_NX, home=under_way.trip.home)
        return rows_NX.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        return ctx.under_way.arrive(home=not ctx.under_way.trip.home), None


class _Arrive(torch.autograd.Function):
    """Waits for the rows; in the backward pass sends their gradient off."""

    @staticmethod
    def forward(ctx: Any, departed: Tensor, under_way: _UnderWay) -> Tensor:
        ctx.under_way = under_way
        return under_way.arrive(home=under_way.trip.home)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.under_way.depart(grads[0], home=not ctx.under_way.trip.home)
        return grads[0].new_empty(0), None


def depart(trip: Trip, rows_NX: Tensor) -> Callable[[], Tensor]:
    """Begins a trip and returns at once; the result, called once, waits for the rows and returns them, differentiable.

    The backward pass sends the gradient off where the forward pass waited and waits where it had sent: as autograd
    runs last what was done first, the computation in between hides the way of the gradient too. Of several steps only
    the one between nodes is in the background.
    """
    under_way = _UnderWay(trip, rows_NX.dtype)
    leave: Callable[..., Tensor] = _Depart.apply
    arrive: Callable[..., Tensor] = _Arrive.apply
    departed = leave(rows_NX, under_way)
    return lambda: arrive(departed, under_way)


# ------------------------------------------------------------------------------------------- counts
def exchange_counts(exchange: Exchange, tokens_per_expert_E: Tensor) -> Tensor:
    """Tells every rank how many rows each rank sends to each of its experts; no gradient.

    Returns:
        counts_SWL: int64, for the blocks as they leave, after each step, and as they arrive (S = steps + 1).
    """
    num_ranks = exchange.num_ranks
    ones = (1,) * num_ranks
    counts_WL = tokens_per_expert_E.view(num_ranks, -1)
    stages = [counts_WL]
    for step in range(len(exchange.sizes)):
        counts_WL, _ = _send(exchange, step, counts_WL, ones, ones, home=False, later=False)
        stages.append(counts_WL)
    return torch.stack(stages)


def require_equal_rows(exchange: Exchange, num_rows: int, device: torch.device) -> None:
    """Checks that all ranks of an exchange send as many rows. A collective.

    Raises:
        ValueError: On every rank that meets another number.
    """
    mine = torch.tensor([num_rows], device=device)
    for group in exchange.groups:
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, mine, group=group)
        numbers = sorted({int(number) for number in found})
        if len(numbers) > 1:
            raise ValueError(
                f"padded dispatch sends {num_rows} rows from this rank and {' or '.join(map(str, numbers))} from those "
                f"it shares experts with; feed the same [B, S] everywhere (fill up with TokenContext.valid_BS), or use "
                f"moe.dispatcher='all_to_all'"
            )


@dataclass(frozen=True, slots=True)
class SumCounts:
    """Adds integers up over the ranks of a group: an all-reduce of a few numbers, no gradient."""

    group: Group

    def __call__(self, count_X: Tensor) -> Tensor:
        """``[X]`` -> the sums, ``[X]``."""
        total_X = count_X.clone()
        dist.all_reduce(total_X, group=self.group)
        return total_X

    def __deepcopy__(self, _: object) -> SumCounts:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Disconnected, ()
