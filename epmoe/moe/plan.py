"""Planning in integers: capacity, slots, send and receive order. No process group, no gradient.

Order of the rows on their way, for two ranks with two experts each (a: rank 0's rows, b: rank 1's):

    sent by rank 0      e0 e0 e1 | e2 e3 e3            ascending expert, so rank-major
    received by rank 0  (a: e0 e0 e1) (b: e0 e1 e1)    rank-major
    seen by experts     (e0: a a b) (e1: a b b)        expert-major
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.ops import DROPLESS, assign_slots
from epmoe.types import DispatchPlan, Routing


def expert_capacity(moe: MoEConfig, group_size: int, *, training: bool) -> int:
    """Slots per expert and group, C; ``DROPLESS`` (-1) where there is no limit.

    C = round_up(min(S, max(min_capacity, ceil(cf * (K if per_assignment else 1) * S / E))), multiple), with S the
    static group size, padding included, so that C is equal on all ranks. The factor is taken as the decimal number
    the user wrote: 1.1 * 10 slots are 11, not 12.
    """
    factor = moe.capacity_factor if training else moe.capacity_factor_eval
    if factor is None:
        return DROPLESS
    per_token = moe.top_k if moe.capacity_unit == "per_assignment" else 1
    even = Fraction(str(factor)) * per_token * group_size / moe.num_experts
    slots = min(group_size, max(moe.min_capacity, ceil(even)))
    return -(-slots // moe.capacity_multiple) * moe.capacity_multiple


def plan_send(routing: Routing, *, num_experts: int, group_size: int, capacity: int) -> DispatchPlan:
    """Slots for every assignment, and the kept ones in the order in which they are sent.

    Args:
        group_size: Tokens per group; consecutive tokens form a group.
        capacity: Slots per expert and group, or ``DROPLESS``.

    Returns:
        The plan of a rank that holds all experts; ``plan_exchange`` completes it for several ranks.
    """
    num_tokens = routing.valid_T.shape[0]
    num_groups = num_tokens // group_size if group_size else 0
    group_A = routing.token_A // max(group_size, 1)
    slot_A, demand_GE = assign_slots(
        routing.expert_A, group_A, routing.active_A, num_groups, num_experts, capacity
    )
    kept_A = slot_A >= 0
    bin_A = torch.where(kept_A, routing.expert_A, num_experts)
    tokens_per_expert_X = torch.zeros(num_experts + 1, dtype=torch.int64, device=bin_A.device)
    tokens_per_expert_X.scatter_add_(0, bin_A, torch.ones_like(bin_A))
    num_kept = int(kept_A.sum())  # a host sync: the number of rows is a shape
    assignment_N = bin_A.argsort(stable=True)[:num_kept]
    return DispatchPlan(
        slot_A=slot_A,
        demand_GE=demand_GE,
        assignment_N=assignment_N,
        token_N=routing.token_A[assignment_N],
        tokens_per_expert_E=tokens_per_expert_X[:num_experts],
        send_splits=(num_kept,),
        recv_splits=(num_kept,),
        expert_order_R=None,
        rank_order_R=None,
    )


def plan_exchange(plan: DispatchPlan, counts_WL: Tensor) -> DispatchPlan:
    """Completes a plan with what the other ranks send here.

    Args:
        counts_WL: Rows that each of the W ranks sends to each local expert.
    """
    num_ranks, num_local = counts_WL.shape
    sent_WL = plan.tokens_per_expert_E.view(num_ranks, num_local)
    splits = torch.stack((sent_WL.sum(1), counts_WL.sum(1))).tolist()  # the exchange's host sync
    expert_order_R = expert_major_order(counts_WL)
    rank_order_R = torch.empty_like(expert_order_R)
    rank_order_R[expert_order_R] = torch.arange(expert_order_R.numel(), device=expert_order_R.device)
    return DispatchPlan(
        slot_A=plan.slot_A,
        demand_GE=plan.demand_GE,
        assignment_N=plan.assignment_N,
        token_N=plan.token_N,
        tokens_per_expert_E=plan.tokens_per_expert_E,
        send_splits=tuple(splits[0]),
        recv_splits=tuple(splits[1]),
        expert_order_R=expert_order_R,
        rank_order_R=rank_order_R,
    )


def expert_major_order(counts_WL: Tensor) -> Tensor:
    """Indices that bring rank-major rows into expert-major order -> int64 ``[R]``."""
    num_ranks, num_local = counts_WL.shape
    expert_WL = torch.arange(num_local, device=counts_WL.device).expand(num_ranks, num_local)
    expert_R = expert_WL.reshape(-1).repeat_interleave(counts_WL.reshape(-1))
    return expert_R.argsort(stable=True)
