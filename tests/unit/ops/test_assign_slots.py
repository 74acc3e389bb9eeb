"""``assign_slots``: first come, first served, per group and expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe import ops


def run(expert, group, active, num_groups, num_experts, capacity):
    slot_A, demand_GE = ops.assign_slots(
        torch.tensor(expert, dtype=torch.int64),
        torch.tensor(group, dtype=torch.int64),
        torch.tensor(active, dtype=torch.bool),
        num_groups,
        num_experts,
        capacity,
    )
    return slot_A.tolist(), demand_GE.tolist()


@st.composite
def lists(draw):
    groups, experts = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    size = draw(st.integers(0, 40))
    fixed = {"min_size": size, "max_size": size}
    return (
        draw(st.lists(st.integers(0, experts - 1), **fixed)),
        draw(st.lists(st.integers(0, groups - 1), **fixed)),
        draw(st.lists(st.booleans(), **fixed)),
        groups,
        experts,
        draw(st.integers(-1, 6)),
    )


@settings(max_examples=100, deadline=None)
@given(lists())
def test_properties(arguments):
    expert, group, active, groups, experts, capacity = arguments
    slot_A, demand_GE = run(*arguments)
    kept = [(g, e, s) for g, e, s in zip(group, expert, slot_A, strict=True) if s >= 0]
    assert len(set(kept)) == len(kept), "a slot is given once"
    for g in range(groups):
        for e in range(experts):
            mine = sorted(s for g2, e2, s in kept if (g2, e2) == (g, e))
            limit = demand_GE[g][e] if capacity == ops.DROPLESS else min(capacity, demand_GE[g][e])
            assert mine == list(range(limit)), "slots are filled from 0, as far as demand and capacity go"
    assert all(s == -1 for s, a in zip(slot_A, active, strict=True) if not a)


def test_groups_share_nothing():
    expert, active = [0, 1, 0, 0, 1], [True, True, False, True, True]
    alone = run(expert, [0] * 5, active, 1, 2, 1)
    both = run(expert * 2, [0] * 5 + [1] * 5, active * 2, 2, 2, 1)
    assert both == (alone[0] * 2, alone[1] * 2)


def test_full_expert_keeps_counting_demand():
    assert run([0] * 5, [0] * 5, [True] * 5, 1, 2, 2) == ([0, 1, -1, -1, -1], [[5, 0]])


@pytest.mark.parametrize("capacity", [-1, 0, 3])
def test_empty_list(capacity):
    assert run([], [], [], 2, 3, capacity) == ([], [[0, 0, 0], [0, 0, 0]])


def test_zero_groups():
    assert run([], [], [], 0, 3, 0) == ([], [])
