"""Six tokens and three experts, worked out by hand: GShard's top-2 router, package and oracle alike."""

from __future__ import annotations

import pytest
import torch

from epmoe.moe.losses import balance_loss, choice_counts
from tests.oracle import losses, routing
from tests.oracle.capacity import assign_slots
from tests.unit.moe.helpers import Extras, config, local_plan
from tests.unit.moe.test_routers import route

PROBS = torch.tensor(
    [[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.55, 0.15, 0.3], [0.1, 0.2, 0.7]],
    dtype=torch.float64,
)
LOGITS = PROBS.log()
VALID = [True] * 6
FIRST = [0, 0, 0, 1, 0, 2]
SECOND = [1, 2, 1, 0, 2, 1]
UNIFORM = [0.7, 0.1, 0.3, 0.9, 0.5, 0.2]


def both(name, capacity, uniform=None, *, literal=False):
    """Kept (token, choice) pairs of the package and of the oracle."""
    moe = config(name, num_experts=3)
    if name == "gshard_random":
        options = moe.router.model_copy(update={"tau": 0.5, "literal_alg1": literal})
        moe = moe.model_copy(update={"router": options})
    routed = route(moe, LOGITS, VALID, Extras(uniform=uniform))
    plan = local_plan(routed, num_experts=3, group_size=6, capacity=capacity)
    mine = {
        (int(routed.token_A[a]), int(routed.choice_A[a])): round(float(routed.weight_A[a]), 12)
        for a in plan.assignment_N
    }
    policy = name.removeprefix("gshard_")
    decision = routing.gshard_top2(LOGITS, VALID, policy=policy, uniform=uniform, literal=literal)
    kept = assign_slots(decision.assignments, [0] * 6, capacity)
    weights = {(a.token, a.choice): a.weight.item() for a in decision.assignments}
    assert mine == {pair: round(weights[pair], 12) for pair in kept}
    return mine


def test_choices_and_weights():
    kept = both("gshard_all", 6)
    assert len(kept) == 12
    assert kept[0, 0] == pytest.approx(0.6 / 0.9)
    assert kept[0, 1] == pytest.approx(0.3 / 0.9)
    routed = route(config("gshard_all", num_experts=3), LOGITS, VALID)
    assert routed.expert_A.tolist() == FIRST + SECOND


def test_balance():
    routed = route(config("gshard_all", num_experts=3), LOGITS, VALID)
    counts_GE = choice_counts(routed, 1, 3, first_only=True)
    assert counts_GE.tolist() == [[4, 1, 1]]
    loss = balance_loss(routed.probs_TE, counts_GE, routed.valid_T, count_per_token=1)
    assert loss.item() / 6 == pytest.approx(1.1625, abs=1e-12)
    decision = routing.gshard_top2(LOGITS, VALID, policy="all")
    assert losses.balance_loss(decision, [0] * 6, 1, 3, count="top1", k=2).item() / 6 == pytest.approx(1.1625)


def test_capacity_four_drops_one_second_choice():
    assert {(t, c) for t in range(6) for c in range(2)} - set(both("gshard_all", 4)) == {(3, 1)}


def test_capacity_two_overflows_two_tokens():
    assert set(range(6)) - {token for token, _ in both("gshard_all", 2)} == {2, 4}


def test_skipped_second_choices_take_no_slot():
    """Active second choices with these draws: tokens 1, 2, 4 and 5; token 2 gets the slot 0 did not take."""
    kept = both("gshard_random", 2, UNIFORM)
    assert (0, 1) not in kept
    assert (2, 1) in kept
    assert (2, 0) not in kept
    assert kept[2, 1] == pytest.approx(0.2 / 0.9)
    assert kept[0, 0] == pytest.approx(0.6 / 0.9), "no new normalisation after the second choice was skipped"


def test_the_pseudo_code_to_the_letter_wastes_that_slot():
    kept = both("gshard_random", 2, UNIFORM, literal=True)
    assert kept[0, 1] == 0.0, "skipped, but in a slot"
    assert (2, 1) not in kept
