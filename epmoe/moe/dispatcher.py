"""The trip of the rows to their experts and back: within one rank, or over the ranks that share the experts."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from epmoe.comm.exchange import Group, exchange_counts, exchange_rows
from epmoe.moe.plan import plan_exchange, plan_local, plan_slots
from epmoe.ops import combine, permute
from epmoe.types import DispatchPlan, ExpertBatch, Routing


class Dispatcher(Protocol):
    """What a layer needs: rows to the experts, and their results back. The plan is a value, not a state."""

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, num_experts: int, group_size: int, capacity: int
    ) -> tuple[ExpertBatch, DispatchPlan]:
        """Sends every kept assignment's row to its expert."""

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """Brings the experts' rows back and sums them per token with the routing weights -> ``[T, D]``."""


def _weighted_sum(rows_ND: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    # index_select, not indexing: the latter's backward is not repeatable with several threads.
    weight_N = routing.weight_A.index_select(0, plan.assignment_N)
    return combine(rows_ND, weight_N, plan.token_N, routing.valid_T.shape[0])


class LocalDispatcher:
    """All experts on this rank: rows are only reordered. Dispatch copies one number to the host."""

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, num_experts: int, group_size: int, capacity: int
    ) -> tuple[ExpertBatch, DispatchPlan]:
        """Rows in ascending expert order."""
        slots = plan_slots(routing, num_experts=num_experts, group_size=group_size, capacity=capacity)
        plan = plan_local(routing, slots)  # the one device-to-host copy
        rows_ND = permute(x_TD, plan.token_N)
        return ExpertBatch(rows_RD=rows_ND, tokens_per_expert_L=plan.tokens_per_expert_E), plan

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """Weighted sum per token."""
        return _weighted_sum(rows_RD, routing, plan)


class AllToAllDispatcher:
    """Experts spread over the ranks of a group in ascending order; exactly the kept rows travel (ragged).

    Costs per layer: forward one exchange of counts, one device-to-host copy (how many rows go where) and two
    exchanges of rows; backward two exchanges of rows. What the experts cost is theirs.

    Args:
        group: The ranks; None = all of the job.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, num_experts: int, group_size: int, capacity: int
    ) -> tuple[ExpertBatch, DispatchPlan]:
        """Rows to the ranks that hold their experts, there in ascending local expert order."""
        slots = plan_slots(routing, num_experts=num_experts, group_size=group_size, capacity=capacity)
        counts_WL = exchange_counts(slots.tokens_per_expert_E, self.group)
        plan = plan_exchange(routing, slots, counts_WL)  # the one device-to-host copy
        rows_ND = permute(x_TD, plan.token_N)
        rows_RD = exchange_rows(rows_ND, plan.send_splits, plan.recv_splits, self.group)
        assert plan.expert_order_R is not None
        batch = ExpertBatch(
            rows_RD=permute(rows_RD, plan.expert_order_R), tokens_per_expert_L=counts_WL.sum(0)
        )
        return batch, plan

    def combine(self, rows_RD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """The same way back, then the weighted sum per token."""
        assert plan.rank_order_R is not None
        rows_RD = permute(rows_RD, plan.rank_order_R)
        rows_ND = exchange_rows(rows_RD, plan.recv_splits, plan.send_splits, self.group)
        return _weighted_sum(rows_ND, routing, plan)
