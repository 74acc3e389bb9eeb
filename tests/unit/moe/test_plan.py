"""Capacity, and the order of the rows on their way, with all ranks simulated in one process."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe.moe.plan import Spread, expert_capacity, expert_major_order, plan_exchange, plan_local, plan_slots
from epmoe.ops import DROPLESS
from epmoe.types import Limits
from tests.oracle import cases
from tests.oracle.capacity import capacity
from tests.unit.moe.helpers import config, local_plan
from tests.unit.moe.test_routers import route

# factor, S, E, k, unit, minimum, multiple, slots: worked out by hand.
BY_HAND = [
    (1.25, 256, 8, 2, "per_assignment", 4, 1, 80),
    (1.25, 256, 8, 2, "per_token", 4, 1, 40),
    (1.0, 2048, 2048, 2, "per_assignment", 0, 1, 2),  # GShard's 2 S / E
    (1.1, 20, 2, 1, "per_token", 0, 1, 11),  # 11.000000000000002 in floating point
    (1.1, 10, 1, 1, "per_token", 0, 1, 10),  # never more than S
    (1.0, 7, 2, 1, "per_token", 0, 1, 4),  # 3.5
    (1.0, 7, 2, 1, "per_token", 0, 8, 8),  # the multiple comes after min(S, .)
    (0.01, 100, 8, 2, "per_assignment", 4, 1, 4),
    (0.01, 3, 8, 2, "per_assignment", 4, 1, 3),
    (0.01, 100, 8, 2, "per_assignment", 0, 1, 1),
    (1.25, 256, 8, 2, "per_assignment", 4, 32, 96),
    (1.25, 0, 8, 2, "per_assignment", 4, 4, 0),
]


def package_capacity(factor, size, experts, k, unit, minimum, multiple, training=True):
    moe = config(
        "top2",
        num_experts=experts,
        top_k=k,
        capacity_factor=factor,
        capacity_factor_eval=3.0,
        capacity_unit=unit,
        min_capacity=minimum,
        capacity_multiple=multiple,
    )
    return expert_capacity(moe, size, training=training)


@pytest.mark.parametrize("case", BY_HAND)
def test_capacity_by_hand(case):
    factor, size, experts, k, unit, minimum, multiple, slots = case
    assert package_capacity(*case[:-1]) == slots
    assert slots == capacity(
        factor, group_size=size, num_experts=experts, k=k, unit=unit, minimum=minimum, multiple=multiple
    )


@settings(max_examples=200, deadline=None)
@given(
    factor=st.integers(1, 400).map(lambda n: n / 100),
    size=st.integers(0, 300),
    experts=st.integers(2, 16),
    k=st.integers(1, 2),
    unit=st.sampled_from(["per_assignment", "per_token"]),
    minimum=st.integers(0, 8),
    multiple=st.integers(1, 8),
)
def test_capacity_equals_the_oracle(factor, size, experts, k, unit, minimum, multiple):
    wanted = capacity(
        factor, group_size=size, num_experts=experts, k=k, unit=unit, minimum=minimum, multiple=multiple
    )
    assert package_capacity(factor, size, experts, k, unit, minimum, multiple) == wanted


def test_evaluation_has_its_own_capacity_and_none_is_dropless():
    assert package_capacity(1.0, 8, 4, 1, "per_token", 0, 1, training=False) == 6
    moe = config("top2", capacity_factor=None, capacity_factor_eval=None)
    assert expert_capacity(moe, 64, training=True) == expert_capacity(moe, 64, training=False) == DROPLESS


@pytest.mark.parametrize(("num_ranks", "num_local"), [(1, 4), (2, 3), (4, 1), (4, 2)])
def test_every_row_arrives_at_its_expert_and_comes_back(num_ranks, num_local):
    """Simulated ranks: each makes its plan from what the others would tell it; the rows carry names."""
    experts = num_ranks * num_local
    moe = config("top2", num_experts=experts)
    routings, all_slots, names, sent = [], [], [], []
    for rank in range(num_ranks):
        logits, valid = cases.logits_and_valid("broken", 8 * rank, experts, seed=rank)  # rank 0 has none
        routed = route(moe, logits, valid)
        slots = plan_slots(routed, Limits(num_experts=experts, group_size=8, capacity=3))
        routings.append(routed)
        all_slots.append(slots)
        entries = plan_local(routed, slots).assignment_N.tolist()
        names.append(
            [
                (int(e), rank, int(t) // 8, a)
                for a, (e, t) in enumerate(zip(routed.expert_A, routed.token_A, strict=True))
            ]
        )
        sent.append([names[rank][a] for a in entries])
    received_back = [[] for _ in range(num_ranks)]
    for rank in range(num_ranks):
        mine = range(rank * num_local, (rank + 1) * num_local)
        counts_WL = torch.stack([slots.tokens_per_expert_E[mine.start : mine.stop] for slots in all_slots])
        sent_WL = all_slots[rank].tokens_per_expert_E.view_as(counts_WL)
        plan = plan_exchange(routings[rank], all_slots[rank], torch.stack((sent_WL, counts_WL)))
        [part] = plan.parts
        assert [names[rank][a] for a in plan.assignment_N.tolist()] == sent[rank]
        rows = [row for other in sent for row in other if row[0] in mine]
        assert part.splits[1] == tuple(len([r for r in other if r[0] in mine]) for other in sent)
        assert part.splits[0] == tuple(
            len([r for r in sent[rank] if r[0] // num_local == to]) for to in range(num_ranks)
        )
        ordered = [rows[i] for i in part.expert_order_R.tolist()]
        assert ordered == sorted(rows), "ascending expert, rank, group, priority"
        back = [ordered[i] for i in part.rank_order_R.tolist()]
        assert back == rows
        for row in back:
            received_back[row[1]].append(row)
    assert received_back == sent


@pytest.mark.parametrize(
    ("num_ranks", "num_parts"), [(1, 1), (2, 1), (2, 2), (2, 3), (5, 2), (1, 4), (10, 3)]
)
@pytest.mark.parametrize("capacity", [DROPLESS, 0, 2])
def test_rows_leave_part_by_part_rank_by_rank(num_ranks, num_parts, capacity):
    experts, num_local, group_size = 10, 10 // num_ranks, 12
    logits, valid = cases.logits_and_valid("broken", 36, experts)
    routed = route(config("top2", num_experts=experts), logits, valid)
    slots = plan_slots(
        routed,
        Limits(num_experts=experts, group_size=group_size, capacity=capacity),
        Spread(num_ranks=num_ranks, num_parts=num_parts),
    )
    edges = [part * num_local // num_parts for part in range(num_parts + 1)]
    order = [
        rank * num_local + local
        for first, end in pairwise(edges)
        for rank in range(num_ranks)
        for local in range(first, end)
    ]
    kept = [a for a, slot in enumerate(slots.slot_A.tolist()) if slot >= 0]
    expert, token = routed.expert_A.tolist(), routed.token_A.tolist()
    kept.sort(key=lambda a: (order.index(expert[a]), token[a] // group_size, a))
    assert slots.order_A.tolist() == kept + [-1] * (len(expert) - len(kept))
    assert slots.tokens_per_expert_E.tolist() == [sum(expert[a] == e for a in kept) for e in range(experts)]


def test_order_of_no_rows():
    assert expert_major_order(torch.zeros(3, 2).long(), 0).tolist() == []


def test_plan_is_a_frozen_value():
    logits, valid = cases.logits_and_valid("random", 4, 2)
    plan = local_plan(
        route(config("top1", num_experts=2), logits, valid), num_experts=2, group_size=4, capacity=1
    )
    with pytest.raises(AttributeError):
        plan.slot_A = None
