"""The trip of the rows to their experts and back: within one rank, or over the ranks that share the experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from epmoe.comm.exchange import Exchange, exchange_counts, require_equal_rows
from epmoe.moe.plan import ALONE, Spread, equal_parts, plan_exchange, plan_local, plan_padded, plan_slots
from epmoe.moe.trip import Pipeline, bring_home, to_experts
from epmoe.ops import DROPLESS, combine, permute
from epmoe.types import DispatchPlan, ExpertBatch, PartPlan, Routing


class Dispatcher(Protocol):
    """What a layer needs: rows to the experts, and their results back. The plan is a value, not a state.

    Where work and travel overlap, ``dispatch`` returns while the first rows travel, and the experts get a ``Pipeline``
    of batches.

    With ``weigh_rows`` every row carries its combine weight to the experts, which apply it; otherwise the weights
    are applied where the rows are summed. The same function; the former need not keep the experts' results for the
    backward pass (``moe.save: hidden``).
    """

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        *,
        num_experts: int,
        group_size: int,
        capacity: int,
        plan: DispatchPlan | None = None,
    ) -> tuple[ExpertBatch | Pipeline, DispatchPlan]:
        """Sends every kept assignment's row to its expert.

        Args:
            plan: That of the same routing from before: nothing is planned, and no counts are exchanged.
        """

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """Brings the experts' rows back and sums them per token with the routing weights -> ``[T, D]``."""


def _weights(routing: Routing, plan: DispatchPlan) -> Tensor:
    """Combine weight of each row that is sent, 0 for unfilled ones -> ``[N]``."""
    if all(part.rows_per_expert is None for part in plan.parts):
        # No unfilled rows, and no assignment twice.
        return routing.weight_A.index_select(0, plan.assignment_N)
    return permute(routing.weight_A.unsqueeze(1), plan.assignment_N).squeeze(1)


def _sum(rows_ND: Tensor, routing: Routing, plan: DispatchPlan, weigh_rows: bool) -> Tensor:
    weight_N = None if weigh_rows else _weights(routing, plan)
    return combine(rows_ND, weight_N, plan.token_N, routing.valid_T.shape[0])


class LocalDispatcher:
    """All experts on this rank: rows are only reordered. Dispatch copies one number to the host."""

    def __init__(self, *, weigh_rows: bool = False) -> None:
        self.weigh_rows = weigh_rows

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        *,
        num_experts: int,
        group_size: int,
        capacity: int,
        plan: DispatchPlan | None = None,
    ) -> tuple[ExpertBatch | Pipeline, DispatchPlan]:
        """Rows in ascending expert order."""
        if plan is None:
            slots = plan_slots(routing, num_experts=num_experts, group_size=group_size, capacity=capacity)
            plan = plan_local(routing, slots)  # the one device-to-host copy
        batch = ExpertBatch(
            rows_RD=permute(x_TD, plan.token_N),
            tokens_per_expert_L=plan.tokens_per_expert_E,
            weight_R=_weights(routing, plan) if self.weigh_rows else None,
        )
        return batch, plan

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """Weighted sum per token."""
        return _sum(rows_RD, routing, plan, self.weigh_rows)


class AllToAllDispatcher:
    """Experts spread over ranks in ascending order; exactly the kept rows travel (ragged).

    Costs per layer, with ``s`` steps of the exchange (flat 1, hierarchical 2): forward ``s`` exchanges of counts, one
    device-to-host copy (how many rows go where) and 2s exchanges of rows; backward 2s exchanges of rows; with
    ``weigh_rows`` s more, small, in each pass. In n parts: n times as many exchanges of rows and weights, each of an
    n-th, still one of counts and one copy. What the experts cost is theirs.

    Args:
        exchange: How rows get from rank to rank.
        num_parts: Rows travel in this many parts, one while another is computed; 0 = nothing overlaps.
    """

    def __init__(self, exchange: Exchange, *, weigh_rows: bool = False, num_parts: int = 0) -> None:
        self.exchange, self.weigh_rows, self.overlap = exchange, weigh_rows, num_parts > 0
        self.spread = Spread(num_ranks=exchange.num_ranks, num_parts=max(num_parts, 1))

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        *,
        num_experts: int,
        group_size: int,
        capacity: int,
        plan: DispatchPlan | None = None,
    ) -> tuple[ExpertBatch | Pipeline, DispatchPlan]:
        """Rows to the ranks that hold their experts, there in ascending local expert order."""
        if plan is None:
            slots = plan_slots(
                routing, num_experts=num_experts, group_size=group_size, capacity=capacity, spread=self.spread
            )
            counts_SWL = exchange_counts(self.exchange, slots.tokens_per_expert_E)
            plan = plan_exchange(routing, slots, counts_SWL, self.spread)  # the one device-to-host copy
        rows_ND = permute(x_TD, plan.token_N)
        weight_N1 = _weights(routing, plan).unsqueeze(1) if self.weigh_rows else None
        return to_experts(self.exchange, rows_ND, weight_N1, plan.parts, overlap=self.overlap), plan

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """The same way back, then the weighted sum per token."""
        rows_ND = bring_home(self.exchange, rows_RD, plan.parts, overlap=self.overlap)
        return _sum(rows_ND, routing, plan, self.weigh_rows)


class PaddedDispatcher:
    """A block of G*C rows for every expert, zeros in unfilled slots: static shapes, and nothing waits for the device.

    So a layer can be compiled in one piece and captured in a CUDA graph; what travels and what the experts multiply is
    the capacity and not the kept rows. Without a capacity there is no such block: those passes (evaluation, as a rule)
    go the ragged way.

    Costs per layer: as ragged, without the exchange of counts and the copy to the host; on a CPU the ranks gather how
    many rows each feeds. Experts that are modules also
    see the zero rows; what they make of them is thrown away.

    Args:
        exchange: How rows get to the ranks that share the experts, which feed the same number of tokens (ValueError
            when they begin with different ones); None = this rank holds all experts, and no process group is needed.
        num_parts: Rows travel in this many parts, one while another is computed; 0 = nothing overlaps.
    """

    def __init__(self, exchange: Exchange | None, *, weigh_rows: bool = False, num_parts: int = 0) -> None:
        self.exchange, self.weigh_rows = exchange, weigh_rows
        self.agreed: set[int] = set()
        """Numbers of rows that the ranks have compared."""
        self.ragged: Dispatcher
        if exchange is None:
            self.ragged, self.overlap, self.spread = LocalDispatcher(weigh_rows=weigh_rows), False, ALONE
            return
        ragged = AllToAllDispatcher(exchange, weigh_rows=weigh_rows, num_parts=num_parts)
        self.ragged, self.overlap, self.spread = ragged, ragged.overlap, ragged.spread

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        *,
        num_experts: int,
        group_size: int,
        capacity: int,
        plan: DispatchPlan | None = None,
    ) -> tuple[ExpertBatch | Pipeline, DispatchPlan]:
        """The blocks of this rank's experts, one expert after the other, in each the ranks in ascending order."""
        if capacity == DROPLESS:
            return self.ragged.dispatch(
                x_TD, routing, num_experts=num_experts, group_size=group_size, capacity=capacity, plan=plan
            )
        if plan is None:
            plan = plan_padded(
                routing, num_experts=num_experts, group_size=group_size, capacity=capacity, spread=self.spread
            )
            plan = replace(plan, parts=self.parts(num_experts, plan.token_N))
        weight_N1 = _weights(routing, plan).unsqueeze(1) if self.weigh_rows else None
        return self.send_blocks(permute(x_TD, plan.token_N), plan.parts, weight_N1), plan

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """The same way back, then the weighted sum per token."""
        if not plan.parts:  # the experts are here, and no block has a fixed size
            return self.ragged.combine(rows_RD, routing, plan)
        return _sum(self.blocks_home(rows_RD, plan.parts), routing, plan, self.weigh_rows)

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

    def send_blocks(
        self, rows_ND: Tensor, parts: tuple[PartPlan, ...], weight_N1: Tensor | None = None
    ) -> ExpertBatch | Pipeline:
        """The blocks to the ranks that hold the experts, there expert by expert."""
        return to_experts(self.exchange, rows_ND, weight_N1, parts, overlap=self.overlap)

    def blocks_home(self, rows_RD: Tensor, parts: tuple[PartPlan, ...]) -> Tensor:
        """The same blocks, computed, back to where they came from."""
        return bring_home(self.exchange, rows_RD, parts, overlap=self.overlap)
