"""The trip of the rows to their experts and back: within one rank, or over the ranks that share the experts."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from epmoe.comm.exchange import Group, exchange_counts, exchange_rows, num_ranks
from epmoe.moe.plan import plan_exchange, plan_local, plan_padded, plan_slots
from epmoe.ops import DROPLESS, combine, permute
from epmoe.types import DispatchPlan, ExpertBatch, Routing


class Dispatcher(Protocol):
    """What a layer needs: rows to the experts, and their results back. The plan is a value, not a state.

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
    ) -> tuple[ExpertBatch, DispatchPlan]:
        """Sends every kept assignment's row to its expert.

        Args:
            plan: That of an earlier pass over the same tokens: nothing is planned, and no counts are exchanged.
        """

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """Brings the experts' rows back and sums them per token with the routing weights -> ``[T, D]``."""


def _weights(routing: Routing, plan: DispatchPlan) -> Tensor:
    """Combine weight of each row that is sent, 0 for unfilled ones -> ``[N, 1]``."""
    # permute, not indexing: the latter's backward is not repeatable with several threads.
    return permute(routing.weight_A.unsqueeze(1), plan.assignment_N)


def _sum(rows_ND: Tensor, routing: Routing, plan: DispatchPlan, weigh_rows: bool) -> Tensor:
    weight_N = None if weigh_rows else _weights(routing, plan)[:, 0]
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
    ) -> tuple[ExpertBatch, DispatchPlan]:
        """Rows in ascending expert order."""
        if plan is None:
            slots = plan_slots(routing, num_experts=num_experts, group_size=group_size, capacity=capacity)
            plan = plan_local(routing, slots)  # the one device-to-host copy
        batch = ExpertBatch(
            rows_RD=permute(x_TD, plan.token_N),
            tokens_per_expert_L=plan.tokens_per_expert_E,
            weight_R=_weights(routing, plan)[:, 0] if self.weigh_rows else None,
        )
        return batch, plan

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """Weighted sum per token."""
        return _sum(rows_RD, routing, plan, self.weigh_rows)


class AllToAllDispatcher:
    """Experts spread over the ranks of a group in ascending order; exactly the kept rows travel (ragged).

    Costs per layer: forward one exchange of counts, one device-to-host copy (how many rows go where) and two
    exchanges of rows; backward two exchanges of rows; with ``weigh_rows`` one more, small, in each pass.
    What the experts cost is theirs.

    Args:
        group: The ranks; None = all of the job.
    """

    def __init__(self, group: Group, *, weigh_rows: bool = False) -> None:
        self.group, self.weigh_rows = group, weigh_rows

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        *,
        num_experts: int,
        group_size: int,
        capacity: int,
        plan: DispatchPlan | None = None,
    ) -> tuple[ExpertBatch, DispatchPlan]:
        """Rows to the ranks that hold their experts, there in ascending local expert order."""
        if plan is None:
            slots = plan_slots(routing, num_experts=num_experts, group_size=group_size, capacity=capacity)
            counts_WL = exchange_counts(slots.tokens_per_expert_E, self.group)
            plan = plan_exchange(routing, slots, counts_WL)  # the one device-to-host copy
        assert plan.tokens_per_expert_L is not None
        batch = ExpertBatch(
            rows_RD=self._send(permute(x_TD, plan.token_N), plan),
            tokens_per_expert_L=plan.tokens_per_expert_L,
            weight_R=self._send(_weights(routing, plan), plan)[:, 0] if self.weigh_rows else None,
        )
        return batch, plan

    def _send(self, rows_NX: Tensor, plan: DispatchPlan) -> Tensor:
        rows_RX = exchange_rows(rows_NX, plan.send_splits, plan.recv_splits, self.group)
        assert plan.expert_order_R is not None
        return permute(rows_RX, plan.expert_order_R)

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """The same way back, then the weighted sum per token."""
        assert plan.rank_order_R is not None
        rows_RD = permute(rows_RD, plan.rank_order_R)
        rows_ND = exchange_rows(rows_RD, plan.recv_splits, plan.send_splits, self.group)
        return _sum(rows_ND, routing, plan, self.weigh_rows)


class PaddedDispatcher:
    """A block of G*C rows for every expert, zeros in unfilled slots: static shapes, and nothing waits for the device.

    So a layer can be compiled in one piece and captured in a CUDA graph; what travels and what the experts multiply is
    the capacity and not the kept rows. Without a capacity there is no such block: those passes (evaluation, as a rule)
    go the ragged way.

    Costs per layer: two exchanges of rows in each pass, no exchange of counts and no copy to the host; with
    ``weigh_rows`` one more exchange, small, in each pass. Experts that are modules also see the zero rows; what they
    make of them is thrown away.

    Args:
        group: The ranks that share the experts, which feed the same number of tokens; None = all of the job.
        local: This rank holds all experts and no process group is needed.
    """

    def __init__(self, group: Group, *, local: bool = False, weigh_rows: bool = False) -> None:
        self.group, self.weigh_rows = group, weigh_rows
        self.num_ranks = 1 if local else num_ranks(group)
        self.ragged: Dispatcher = (
            LocalDispatcher(weigh_rows=weigh_rows)
            if local
            else AllToAllDispatcher(group, weigh_rows=weigh_rows)
        )

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        *,
        num_experts: int,
        group_size: int,
        capacity: int,
        plan: DispatchPlan | None = None,
    ) -> tuple[ExpertBatch, DispatchPlan]:
        """The blocks of this rank's experts, one expert after the other, in each the ranks in ascending order."""
        if capacity == DROPLESS:
            return self.ragged.dispatch(
                x_TD, routing, num_experts=num_experts, group_size=group_size, capacity=capacity, plan=plan
            )
        if plan is None:
            plan = plan_padded(routing, num_experts=num_experts, group_size=group_size, capacity=capacity)
        num_local = num_experts // self.num_ranks
        rows_per_expert = plan.token_N.shape[0] // num_local
        batch = ExpertBatch(
            rows_RD=self.to_experts(permute(x_TD, plan.token_N), num_experts),
            tokens_per_expert_L=torch.full((num_local,), rows_per_expert, device=x_TD.device),
            rows_per_expert=rows_per_expert,
            weight_R=self.to_experts(_weights(routing, plan), num_experts)[:, 0] if self.weigh_rows else None,
        )
        return batch, plan

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """The same way back, then the weighted sum per token."""
        if not plan.padded:
            return self.ragged.combine(rows_RD, routing, plan)
        rows_ND = self.from_experts(rows_RD, plan.tokens_per_expert_E.shape[0])
        return _sum(rows_ND, routing, plan, self.weigh_rows)

    def to_experts(self, rows_NX: Tensor, num_experts: int) -> Tensor:
        """Equal blocks of rows, one per expert, to the ranks that hold the experts, there expert by expert."""
        if self.num_ranks == 1:
            return rows_NX
        return _swap_blocks(self._exchange(rows_NX), self.num_ranks, num_experts // self.num_ranks)

    def from_experts(self, rows_RX: Tensor, num_experts: int) -> Tensor:
        """The same blocks, computed, back to where they came from."""
        if self.num_ranks == 1:
            return rows_RX
        return self._exchange(_swap_blocks(rows_RX, num_experts // self.num_ranks, self.num_ranks))

    def _exchange(self, rows_NX: Tensor) -> Tensor:
        splits = (rows_NX.shape[0] // self.num_ranks,) * self.num_ranks
        return exchange_rows(rows_NX, splits, splits, self.group)


def _swap_blocks(rows_RX: Tensor, outer: int, inner: int) -> Tensor:
    """Rows in ``outer`` x ``inner`` equal blocks, the inner ones outside: rank-major to expert-major and back."""
    blocks = rows_RX.view(outer, inner, rows_RX.shape[0] // (outer * inner), rows_RX.shape[1])
    return blocks.transpose(0, 1).reshape(rows_RX.shape)
