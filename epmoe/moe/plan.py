"""Planning in integers: capacity, slots, send and receive order. No process group, no gradient.

Order of the rows on their way, for two ranks with two experts each (a: rank 0's rows, b: rank 1's):

    sent by rank 0      e0 e0 e1 | e2 e3 e3            ascending expert, so rank-major
    received by rank 0  (a: e0 e0 e1) (b: e0 e1 e1)    rank-major
    seen by experts     (e0: a a b) (e1: a b b)        expert-major
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.ops import DROPLESS, UNFILLED, assign_slots
from epmoe.types import DispatchPlan, Routing


def expert_capacity(moe: MoEConfig, group_size: int, *, training: bool) -> int:
    """Slots per expert and group, C; ``DROPLESS`` (-1) where there is no limit.

    C = round_up(min(S, max(min_capacity, ceil(cf * (K if per_assignment else 1) * S / E))), multiple), with S the
    static group size, padding included, so that C is equal on all ranks. The factor is taken as the decimal number
    the user wrote: 1.1 * 10 slots are 11, not 12.
    """
    share: tuple[int, int] | None = _slots_per_token(moe, training)
    if share is None:
        return DROPLESS
    numerator, denominator = share
    slots = min(group_size, max(moe.min_capacity, -(-numerator * group_size // denominator)))
    return -(-slots // moe.capacity_multiple) * moe.capacity_multiple


@torch.compiler.assume_constant_result  # the same for every batch, and nothing for a compiler to look into
def _slots_per_token(moe: MoEConfig, training: bool) -> tuple[int, int] | None:
    """Numerator and denominator of cf * (K if per_assignment else 1) / E; None = no limit."""
    factor = moe.capacity_factor if training else moe.capacity_factor_eval
    if factor is None:
        return None
    per_token = moe.top_k if moe.capacity_unit == "per_assignment" else 1
    return (Fraction(str(factor)) * per_token / moe.num_experts).as_integer_ratio()


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Which assignments are kept, still without a shape that depends on how many: nothing here waits for a device."""

    slot_A: Tensor
    """int64 slot inside (group, expert), -1 = dropped or inactive."""
    demand_GE: Tensor
    """int64 active assignments before capacity."""
    order_A: Tensor
    """int64: all entries of the routing list, the kept ones first, ascending by expert, then by priority."""
    tokens_per_expert_E: Tensor
    """int64: kept assignments of each expert."""


def _assign(
    routing: Routing, num_experts: int, group_size: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each assignment's slot and group, and the demand before capacity."""
    num_tokens = routing.valid_T.shape[0]
    num_groups = num_tokens // group_size if group_size else 0
    group_A = routing.token_A // max(group_size, 1)
    slot_A, demand_GE = assign_slots(
        routing.expert_A, group_A, routing.active_A, num_groups, num_experts, capacity
    )
    return slot_A, group_A, demand_GE


def _kept_per_expert(routing: Routing, slot_A: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Expert of each kept assignment (E where dropped), and how many each expert has."""
    bin_A = torch.where(slot_A >= 0, routing.expert_A, num_experts)
    tokens_per_expert_X = torch.zeros(num_experts + 1, dtype=torch.int64, device=bin_A.device)
    tokens_per_expert_X.scatter_add_(0, bin_A, torch.ones_like(bin_A))
    return bin_A, tokens_per_expert_X[:num_experts]


def plan_slots(routing: Routing, *, num_experts: int, group_size: int, capacity: int) -> Slots:
    """Slots for every assignment, and the order in which the kept ones are sent.

    Args:
        group_size: Tokens per group; consecutive tokens form a group.
        capacity: Slots per expert and group, or ``DROPLESS``.
    """
    slot_A, _, demand_GE = _assign(routing, num_experts, group_size, capacity)
    bin_A, tokens_per_expert_E = _kept_per_expert(routing, slot_A, num_experts)
    return Slots(
        slot_A=slot_A,
        demand_GE=demand_GE,
        order_A=bin_A.argsort(stable=True),
        tokens_per_expert_E=tokens_per_expert_E,
    )


def plan_padded(routing: Routing, *, num_experts: int, group_size: int, capacity: int) -> DispatchPlan:
    """The plan of padded dispatch: E blocks of G*C rows, slot c of group g at row g*C + c of its expert's block.

    Nothing here depends on a number that only the device knows. ``capacity`` must not be ``DROPLESS``.
    """
    slot_A, group_A, demand_GE = _assign(routing, num_experts, group_size, capacity)
    _, tokens_per_expert_E = _kept_per_expert(routing, slot_A, num_experts)
    num_groups = demand_GE.shape[0]
    num_rows = num_experts * num_groups * capacity
    row_A = (routing.expert_A * num_groups + group_A) * capacity + slot_A
    # Dropped assignments meet in one more row, which is cut off.
    row_A = torch.where(slot_A >= 0, row_A, num_rows)
    assignment_X = torch.full((num_rows + 1,), UNFILLED, dtype=torch.int64, device=row_A.device)
    assignment_X.scatter_(0, row_A, torch.arange(row_A.numel(), device=row_A.device))
    assignment_N = assignment_X[:num_rows]
    if row_A.numel():
        token_N = routing.token_A[assignment_N.clamp_min(0)].where(assignment_N >= 0, UNFILLED)
    else:
        token_N = assignment_N
    return DispatchPlan(
        slot_A=slot_A,
        demand_GE=demand_GE,
        assignment_N=assignment_N,
        token_N=token_N,
        tokens_per_expert_E=tokens_per_expert_E,
        padded=True,
    )


def plan_local(routing: Routing, slots: Slots) -> DispatchPlan:
    """The plan of a rank that holds all experts."""
    # The one device-to-host copy: the number of rows is a shape.
    num_kept = int(slots.tokens_per_expert_E.sum())
    return _plan(routing, slots, (num_kept,), (num_kept,), None)


def plan_exchange(routing: Routing, slots: Slots, counts_WL: Tensor) -> DispatchPlan:
    """The plan of a rank that shares the experts with others.

    Args:
        counts_WL: Rows that each of the W ranks sends to each local expert.
    """
    sent_WL = slots.tokens_per_expert_E.view_as(counts_WL)
    splits = torch.stack((sent_WL.sum(1), counts_WL.sum(1)))
    send_splits, recv_splits = splits.tolist()  # the one device-to-host copy
    expert_order_R = expert_major_order(counts_WL, sum(recv_splits))
    plan = _plan(routing, slots, tuple(send_splits), tuple(recv_splits), expert_order_R)
    return replace(plan, tokens_per_expert_L=counts_WL.sum(0))


def _plan(
    routing: Routing,
    slots: Slots,
    send_splits: tuple[int, ...],
    recv_splits: tuple[int, ...],
    expert_order_R: Tensor | None,
) -> DispatchPlan:
    rank_order_R = None
    if expert_order_R is not None:
        rank_order_R = torch.empty_like(expert_order_R)
        rank_order_R[expert_order_R] = torch.arange(expert_order_R.numel(), device=expert_order_R.device)
    assignment_N = slots.order_A[: sum(send_splits)]
    return DispatchPlan(
        slot_A=slots.slot_A,
        demand_GE=slots.demand_GE,
        assignment_N=assignment_N,
        token_N=routing.token_A[assignment_N],
        tokens_per_expert_E=slots.tokens_per_expert_E,
        send_splits=send_splits,
        recv_splits=recv_splits,
        expert_order_R=expert_order_R,
        rank_order_R=rank_order_R,
    )


def expert_major_order(counts_WL: Tensor, num_rows: int) -> Tensor:
    """Indices that bring the ``num_rows`` rank-major rows into expert-major order -> int64 ``[R]``."""
    num_ranks, num_local = counts_WL.shape
    expert_WL = torch.arange(num_local, device=counts_WL.device).expand(num_ranks, num_local)
    # Without output_size the device would have to tell the host how many rows there are.
    expert_R = expert_WL.reshape(-1).repeat_interleave(counts_WL.reshape(-1), output_size=num_rows)
    return expert_R.argsort(stable=True)
