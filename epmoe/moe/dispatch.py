"""The way of the rows to their experts and back: within one rank, or over the ranks that share the experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from epmoe.comm.exchange import Exchange, Trip, exchange_counts, exchange_rows, require_equal_rows
from epmoe.moe.plan import ALONE, Spread, equal_parts, plan_exchange, plan_local, plan_padded, plan_slots
from epmoe.ops import DROPLESS, combine, permute
from epmoe.types import DispatchPlan, ExpertBatch, Limits, PartPlan, Routing

Experts = Callable[[ExpertBatch], Tensor]


def nothing() -> None:
    """What is done meanwhile when there is nothing to do."""


class Dispatcher:
    """Rows to the experts, and their results back. The plan is a value, not a state; kinds differ in how they make it.

    Args:
        exchange: How rows get from rank to rank; None = all experts are here.
        weigh_rows: Every row carries its combine weight to the experts, which apply it; otherwise the weights are
            applied where the rows are summed. The same function; the former need not keep the experts' results for the
            backward pass (``moe.save: hidden``).
        spread: Over how many ranks, and in how many parts.
    """

    static = False
    """Whether blocks have a size that depends on nothing but shapes, with zeros in unfilled rows."""

    def __init__(
        self, exchange: Exchange | None, *, weigh_rows: bool = False, spread: Spread = ALONE
    ) -> None:
        self.exchange, self.weigh_rows, self.spread = exchange, weigh_rows, spread

    def plan(self, routing: Routing, limits: Limits) -> DispatchPlan:
        """Which assignments are kept, and how their rows travel."""
        raise NotImplementedError

    def apply(
        self,
        x_TD: Tensor,
        routing: Routing,
        limits: Limits,
        experts: Experts,
        plan: DispatchPlan | None = None,
        meanwhile: Callable[[], None] = nothing,
    ) -> tuple[Tensor, DispatchPlan]:
        """Sends every kept assignment's row to its expert, and sums what comes back per token -> ``[T, D]``.

        Args:
            experts: What the rows are sent for.
            plan: That of the same routing from before: nothing is planned, and no counts are exchanged.
            meanwhile: Called once, while rows travel if they do.
        """
        plan = plan or self.plan(routing, limits)
        rows_ND = self.carry(*self._leaving(x_TD, routing, plan), plan.parts, experts, meanwhile)
        return self._sum(rows_ND, routing, plan), plan

    def carry(
        self,
        rows_ND: Tensor,
        weight_N1: Tensor | None,
        parts: tuple[PartPlan, ...],
        experts: Experts,
        meanwhile: Callable[[], None] = nothing,
    ) -> Tensor:
        """Rows in the order of sending through their experts -> their results in the same order."""
        batch = to_experts(self.exchange, rows_ND, weight_N1, parts)
        meanwhile()
        return bring_home(self.exchange, experts(batch), parts)

    def dispatch(
        self, x_TD: Tensor, routing: Routing, limits: Limits, plan: DispatchPlan | None = None
    ) -> tuple[ExpertBatch, DispatchPlan]:
        """The first half of ``apply``: rows with their experts, in ascending local expert order."""
        plan = plan or self.plan(routing, limits)
        return to_experts(self.exchange, *self._leaving(x_TD, routing, plan), plan.parts), plan

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """The second half: the same way back, then the weighted sum per token."""
        return self._sum(bring_home(self.exchange, rows_RD, plan.parts), routing, plan)

    def _leaving(self, x_TD: Tensor, routing: Routing, plan: DispatchPlan) -> tuple[Tensor, Tensor | None]:
        rows_ND = permute(x_TD, plan.token_N)
        return rows_ND, _weights(routing, plan).unsqueeze(1) if self.weigh_rows else None

    def _sum(self, rows_ND: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        weight_N = None if self.weigh_rows else _weights(routing, plan)
        return combine(rows_ND, weight_N, plan.token_N, routing.valid_T.shape[0])


def _weights(routing: Routing, plan: DispatchPlan) -> Tensor:
    """Combine weight of each row that is sent, 0 for unfilled ones -> ``[N]``."""
    if all(part.rows_per_expert is None for part in plan.parts):
        # No unfilled rows, and no assignment twice.
        return routing.weight_A.index_select(0, plan.assignment_N)
    return permute(routing.weight_A.unsqueeze(1), plan.assignment_N).squeeze(1)


class LocalDispatcher(Dispatcher):
    """All experts on this rank: rows are only reordered. A plan copies one number to the host."""

    def __init__(self, *, weigh_rows: bool = False) -> None:
        super().__init__(None, weigh_rows=weigh_rows)

    def plan(self, routing: Routing, limits: Limits) -> DispatchPlan:
        """Rows in ascending expert order."""
        return plan_local(routing, plan_slots(routing, limits))  # the one device-to-host copy


class AllToAllDispatcher(Dispatcher):
    """Experts spread over ranks in ascending order; exactly the kept rows travel (ragged).

    Costs per layer, with ``s`` steps of the exchange (flat 1, hierarchical 2): forward ``s`` exchanges of counts, one
    device-to-host copy (how many rows go where) and 2s exchanges of rows; backward 2s exchanges of rows; with
    ``weigh_rows`` s more, small, in each pass. In n parts: n times as many exchanges of rows and weights, each of an
    n-th, still one of counts and one copy. What the experts cost is theirs.

    Args:
        exchange: How rows get from rank to rank.
        num_parts: Rows travel in this many parts.
    """

    exchange: Exchange

    def __init__(self, exchange: Exchange, *, weigh_rows: bool = False, num_parts: int = 1) -> None:
        spread = Spread(num_ranks=exchange.num_ranks, num_parts=num_parts)
        super().__init__(exchange, weigh_rows=weigh_rows, spread=spread)

    def plan(self, routing: Routing, limits: Limits) -> DispatchPlan:
        """Rows to the ranks that hold their experts."""
        slots = plan_slots(routing, limits, self.spread)
        counts_SWL = exchange_counts(self.exchange, slots.tokens_per_expert_E)
        return plan_exchange(routing, slots, counts_SWL, self.spread)  # the one device-to-host copy


class PaddedDispatcher(Dispatcher):
    """A block of G*C rows for every expert, zeros in unfilled slots: static shapes, and nothing waits for the device.

    So a layer can be compiled in one piece and captured in a CUDA graph; what travels and what the experts multiply is
    the capacity and not the kept rows. Without a capacity there is no such block: those passes (evaluation, as a rule)
    go the ragged way.

    Costs per layer: as ragged, without the exchange of counts and the copy to the host; on a CPU the ranks gather how
    many rows each feeds. Experts that are modules also see the zero rows; what they make of them is thrown away.

    Args:
        exchange: How rows get to the ranks that share the experts, which feed the same number of tokens (ValueError
            when they begin with different ones); None = this rank holds all experts, and no process group is needed.
        num_parts: Rows travel in this many parts.
    """

    static = True

    def __init__(self, exchange: Exchange | None, *, weigh_rows: bool = False, num_parts: int = 1) -> None:
        self.ragged: Dispatcher
        if exchange is None:
            self.ragged = LocalDispatcher(weigh_rows=weigh_rows)
        else:
            self.ragged = AllToAllDispatcher(exchange, weigh_rows=weigh_rows, num_parts=num_parts)
        super().__init__(exchange, weigh_rows=weigh_rows, spread=self.ragged.spread)
        self.agreed: set[int] = set()
        """Numbers of rows that the ranks have compared."""

    def plan(self, routing: Routing, limits: Limits) -> DispatchPlan:
        """The blocks of every expert, one expert after the other, in each the ranks in ascending order."""
        if limits.capacity == DROPLESS:
            return self.ragged.plan(routing, limits)
        plan = plan_padded(routing, limits, self.spread)
        return replace(plan, parts=self.parts(limits.num_experts, plan.token_N))

    def parts(self, num_experts: int, rows_ND: Tensor) -> tuple[PartPlan, ...]:
        """How equal blocks of these rows, one for every expert in the order of sending, travel.

        Raises:
            ValueError: Another rank that shares the experts feeds another number of rows.
        """
        self._agree(rows_ND)
        num_steps = 0 if self.exchange is None else len(self.exchange.sizes)
        return equal_parts(
            num_experts, rows_ND.shape[0] // num_experts, self.spread, num_steps, rows_ND.device
        )

    def _agree(self, token_N: Tensor) -> None:
        """The ranks compare their sizes: blocks of different ones would end in the depths of the library. On a GPU only
        those that are new to this rank, because the host would wait: there a size that is new to others alone is lost.
        """
        num_rows, exchange = token_N.shape[0], self.exchange
        if exchange is None or exchange.num_ranks == 1 or torch.compiler.is_compiling():
            return
        if token_N.is_cuda and num_rows in self.agreed:
            return
        require_equal_rows(exchange, num_rows, token_N.device)  # a copy to the host
        self.agreed.add(num_rows)


# ------------------------------------------------------------------------------------------- rows on their way
def to_experts(
    exchange: Exchange | None, rows_ND: Tensor, weight_N1: Tensor | None, parts: tuple[PartPlan, ...]
) -> ExpertBatch:
    """Rows, and where there are some their weights, on the ranks of their experts, there expert by expert."""
    if exchange is None:
        [part] = parts
        return expert_batch(part, rows_ND, weight_N1)
    batches = []
    for part, rows_nD, weight_n1 in in_parts(parts, rows_ND, weight_N1):
        there, exact = (Trip(exchange=exchange, splits=part.splits, exact=exact) for exact in (False, True))
        arrived_RD = expert_major(part, exchange_rows(there, rows_nD))
        weight_R1 = None if weight_n1 is None else expert_major(part, exchange_rows(exact, weight_n1))
        batches.append(expert_batch(part, arrived_RD, weight_R1))
    return batches[0] if len(batches) == 1 else _joined(batches)


def bring_home(exchange: Exchange | None, rows_RD: Tensor, parts: tuple[PartPlan, ...]) -> Tensor:
    """Results back on the ranks their rows came from, in the order of sending."""
    if exchange is None:
        return rows_RD
    if len(parts) == 1:
        return exchange_rows(homeward(exchange, parts[0]), rank_major(parts[0], rows_RD))
    blocks = zip(parts, rows_RD.split([sum(part.splits[-1]) for part in parts]), strict=True)
    return torch.cat(
        [exchange_rows(homeward(exchange, part), rank_major(part, rows_rD)) for part, rows_rD in blocks]
    )


def homeward(exchange: Exchange, part: PartPlan) -> Trip:
    """The way back of a part's rows."""
    return Trip(exchange=exchange, splits=part.splits, home=True)


def in_parts(
    parts: tuple[PartPlan, ...], rows_ND: Tensor, weight_N1: Tensor | None
) -> list[tuple[PartPlan, Tensor, Tensor | None]]:
    """Each part with its rows and weights."""
    if len(parts) == 1:
        return [(parts[0], rows_ND, weight_N1)]
    sizes = [sum(part.splits[0]) for part in parts]
    weights = [None] * len(parts) if weight_N1 is None else weight_N1.split(sizes)
    return list(zip(parts, rows_ND.split(sizes), weights, strict=True))


def expert_batch(part: PartPlan, rows_RD: Tensor, weight_R1: Tensor | None) -> ExpertBatch:
    """What the experts of a part see."""
    return ExpertBatch(
        rows_RD=rows_RD,
        tokens_per_expert_L=part.tokens_per_expert_L,
        rows_per_expert=part.rows_per_expert,
        weight_R=None if weight_R1 is None else weight_R1[:, 0],
    )


def _joined(batches: list[ExpertBatch]) -> ExpertBatch:
    """Parts have consecutive experts."""
    weights = [batch.weight_R for batch in batches if batch.weight_R is not None]
    return ExpertBatch(
        rows_RD=torch.cat([batch.rows_RD for batch in batches]),
        tokens_per_expert_L=torch.cat([batch.tokens_per_expert_L for batch in batches]),
        rows_per_expert=batches[0].rows_per_expert,
        weight_R=torch.cat(weights) if weights else None,
    )


def expert_major(part: PartPlan, rows_RX: Tensor) -> Tensor:
    """Received rows, those of each expert together."""
    if part.expert_order_R is not None:
        return permute(rows_RX, part.expert_order_R)
    return _swap_blocks(rows_RX, len(part.splits[-1]), part.tokens_per_expert_L.shape[0])


def rank_major(part: PartPlan, rows_RX: Tensor) -> Tensor:
    """The inverse."""
    if part.rank_order_R is not None:
        return permute(rows_RX, part.rank_order_R)
    return _swap_blocks(rows_RX, part.tokens_per_expert_L.shape[0], len(part.splits[-1]))


def _swap_blocks(rows_RX: Tensor, outer: int, inner: int) -> Tensor:
    """Rows in ``outer`` x ``inner`` equal blocks, the inner ones outside: rank-major to expert-major and back."""
    blocks = rows_RX.view(outer, inner, rows_RX.shape[0] // (outer * inner), rows_RX.shape[1])
    return blocks.transpose(0, 1).reshape(rows_RX.shape)
