"""Planning in integers: capacity, slots, send and receive order. No process group, no gradient.

Order of the rows on their way, for two ranks with two experts each (a: rank 0's rows, b: rank 1's):

    sent by rank 0      e0 e0 e1 | e2 e3 e3            ascending expert, so rank-major
    received by rank 0  (a: e0 e0 e1) (b: e0 e1 e1)    rank-major
    seen by experts     (e0: a a b) (e1: a b b)        expert-major

In two parts, so that one can travel while the other is computed, the even experts would come first:

    sent by rank 0      e0 e0 | e2   then   e1 | e3 e3
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.ops import DROPLESS, UNFILLED, assign_slots
from epmoe.types import DispatchPlan, Limits, PartPlan, Routing


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
class Spread:
    """Over what the experts are spread."""

    num_ranks: int = 1
    """W."""
    num_parts: int = 1
    """Parts in which rows travel; part c has the local experts from c*L // num_parts on."""

    def bounds(self, num_local: int) -> list[tuple[int, int]]:
        """First and last + 1 local expert of each part."""
        edges = [part * num_local // self.num_parts for part in range(self.num_parts + 1)]
        return list(pairwise(edges))

    def send_position(self, expert_X: Tensor, num_experts: int) -> Tensor:
        """Where the block of each expert is in the order of sending: by part, by rank, by expert."""
        if self.num_parts == 1:
            return expert_X
        num_local = num_experts // self.num_ranks
        rank_X, local_X = expert_X // num_local, expert_X % num_local
        part_X = ((local_X + 1) * self.num_parts - 1) // num_local
        first_X = part_X * num_local // self.num_parts
        size_X = (part_X + 1) * num_local // self.num_parts - first_X
        return first_X * self.num_ranks + rank_X * size_X + local_X - first_X


ALONE = Spread()


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Which assignments are kept, still without a shape that depends on how many: nothing here waits for a device."""

    slot_A: Tensor
    """int64 slot inside (group, expert), -1 = dropped or inactive."""
    demand_GE: Tensor
    """int64 active assignments before capacity."""
    order_A: Tensor
    """int64: the kept entries of the routing list in the order of sending, then as many -1 as were dropped."""
    tokens_per_expert_E: Tensor
    """int64: kept assignments of each expert."""


def _assign(routing: Routing, limits: Limits) -> tuple[Tensor, Tensor, Tensor]:
    """Each assignment's slot and group, and the demand before capacity."""
    num_tokens, group_size = routing.valid_T.shape[0], limits.group_size
    num_groups = num_tokens // group_size if group_size else 0
    group_A = routing.token_A // max(group_size, 1)
    slot_A, demand_GE = assign_slots(
        routing.expert_A, group_A, routing.active_A, num_groups, limits.num_experts, limits.capacity
    )
    return slot_A, group_A, demand_GE


def _kept(demand_GE: Tensor, capacity: int) -> Tensor:
    """Kept assignments of each group and expert: slots are given away in order until there are none."""
    return demand_GE if capacity == DROPLESS else demand_GE.clamp_max(capacity)


def plan_slots(routing: Routing, limits: Limits, spread: Spread = ALONE) -> Slots:
    """Slots for every assignment, and the order in which the kept ones are sent."""
    slot_A, group_A, demand_GE = _assign(routing, limits)
    kept_GE = _kept(demand_GE, limits.capacity)
    expert_E = torch.arange(limits.num_experts, device=slot_A.device)
    position_E = spread.send_position(expert_E, limits.num_experts)
    sent_EG = kept_GE.new_empty(limits.num_experts, kept_GE.shape[0]).index_copy_(0, position_E, kept_GE.t())
    first_EG = (sent_EG.view(-1).cumsum(0).view_as(sent_EG) - sent_EG).index_select(0, position_E)
    # A slot is a place among the kept of its group and expert, so nothing has to be sorted.
    row_A = first_EG.view(-1).index_select(0, routing.expert_A * demand_GE.shape[0] + group_A) + slot_A
    return Slots(
        slot_A=slot_A,
        demand_GE=demand_GE,
        order_A=_at_rows(row_A, slot_A, slot_A.numel())[:-1],
        tokens_per_expert_E=kept_GE.sum(0),
    )


def _at_rows(row_A: Tensor, slot_A: Tensor, num_rows: int) -> Tensor:
    """The kept assignment of every row, ``UNFILLED`` where there is none -> ``[num_rows + 1]``; in the last the dropped
    ones meet."""
    assignment_X = torch.full((num_rows + 1,), UNFILLED, dtype=torch.int64, device=row_A.device)
    row_A = torch.where(slot_A >= 0, row_A, num_rows)
    return assignment_X.scatter_(0, row_A, torch.arange(row_A.numel(), device=row_A.device))


def plan_padded(routing: Routing, limits: Limits, spread: Spread = ALONE) -> DispatchPlan:
    """The plan of padded dispatch: E blocks of G*C rows, slot c of group g at row g*C + c of its expert's block.

    Nothing here depends on a number that only the device knows. ``capacity`` must not be ``DROPLESS``. How the blocks
    travel is for ``equal_parts`` to say.
    """
    num_experts, capacity = limits.num_experts, limits.capacity
    slot_A, group_A, demand_GE = _assign(routing, limits)
    num_groups = demand_GE.shape[0]
    num_rows = num_experts * num_groups * capacity
    position_A = spread.send_position(routing.expert_A, num_experts)
    row_A = (position_A * num_groups + group_A) * capacity + slot_A
    assignment_N = _at_rows(row_A, slot_A, num_rows)[:-1]
    if row_A.numel():
        token_N = routing.token_A[assignment_N.clamp_min(0)].where(assignment_N >= 0, UNFILLED)
    else:
        token_N = assignment_N
    return DispatchPlan(
        slot_A=slot_A,
        demand_GE=demand_GE,
        assignment_N=assignment_N,
        token_N=token_N,
        tokens_per_expert_E=_kept(demand_GE, capacity).sum(0),
    )


def equal_parts(
    num_experts: int, block_size: int, spread: Spread, num_steps: int, device: torch.device
) -> tuple[PartPlan, ...]:
    """How blocks of ``block_size`` rows, one for every expert, travel in an exchange of ``num_steps`` steps."""
    parts = []
    for first, end in spread.bounds(num_experts // spread.num_ranks):
        rows_per_rank, rows_per_expert = (end - first) * block_size, spread.num_ranks * block_size
        parts.append(
            PartPlan(
                splits=((rows_per_rank,) * spread.num_ranks,) * (num_steps + 1),
                tokens_per_expert_L=torch.full((end - first,), rows_per_expert, device=device),
                rows_per_expert=rows_per_expert,
            )
        )
    return tuple(parts)


def plan_local(routing: Routing, slots: Slots) -> DispatchPlan:
    """The plan of a rank that holds all experts."""
    # The one device-to-host copy: the number of rows is a shape. ``torch.export`` is told what it can be.
    num_kept = cast(int, slots.tokens_per_expert_E.sum().item())
    torch._check(num_kept >= 0)
    torch._check(num_kept <= slots.order_A.shape[0])
    return _plan(
        routing, slots, num_kept, (PartPlan(splits=(), tokens_per_expert_L=slots.tokens_per_expert_E),)
    )


def plan_exchange(
    routing: Routing, slots: Slots, counts_SWL: Tensor, spread: Spread | None = None
) -> DispatchPlan:
    """The plan of a rank that shares the experts with others.

    Args:
        counts_SWL: Rows in the W blocks for each local expert: as they leave, after each step, as they arrive.
        spread: The one that ``slots`` were planned for; None = one part.
    """
    spread = spread or Spread(num_ranks=counts_SWL.shape[1])
    bounds = spread.bounds(counts_SWL.shape[2])
    splits_PSW = torch.stack([counts_SWL[:, :, first:end].sum(2) for first, end in bounds])
    all_splits = splits_PSW.tolist()  # the one device-to-host copy
    parts = []
    for (first, end), splits in zip(bounds, all_splits, strict=True):
        counts_WL = counts_SWL[-1, :, first:end]
        expert_order_R = expert_major_order(counts_WL, sum(splits[-1]))
        rank_order_R = torch.empty_like(expert_order_R)
        rank_order_R[expert_order_R] = torch.arange(expert_order_R.numel(), device=expert_order_R.device)
        parts.append(
            PartPlan(
                splits=tuple(tuple(blocks) for blocks in splits),
                tokens_per_expert_L=counts_WL.sum(0),
                expert_order_R=expert_order_R,
                rank_order_R=rank_order_R,
            )
        )
    return _plan(routing, slots, sum(sum(part.splits[0]) for part in parts), tuple(parts))


def _plan(routing: Routing, slots: Slots, num_kept: int, parts: tuple[PartPlan, ...]) -> DispatchPlan:
    assignment_N = slots.order_A[:num_kept]
    return DispatchPlan(
        slot_A=slots.slot_A,
        demand_GE=slots.demand_GE,
        assignment_N=assignment_N,
        token_N=routing.token_A.index_select(0, assignment_N),
        tokens_per_expert_E=slots.tokens_per_expert_E,
        parts=parts,
    )


def expert_major_order(counts_WL: Tensor, num_rows: int) -> Tensor:
    """Indices that bring the ``num_rows`` rank-major rows into expert-major order -> int64 ``[R]``."""
    num_ranks, num_local = counts_WL.shape
    expert_WL = torch.arange(num_local, device=counts_WL.device).expand(num_ranks, num_local)
    # Without output_size the device would have to tell the host how many rows there are.
    expert_R = expert_WL.reshape(-1).repeat_interleave(counts_WL.reshape(-1), output_size=num_rows)
    return expert_R.argsort(stable=True)
