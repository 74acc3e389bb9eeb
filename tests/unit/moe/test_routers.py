"""Every router family, policy and slot order against the oracle: lists, slots, probabilities, counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epmoe.config import MoEConfig
from epmoe.moe.build import ROUTERS as FAMILIES
from epmoe.moe.router import Router
from epmoe.ops import DROPLESS
from epmoe.types import Draws, RouterInputs
from tests.oracle import cases, philox, routing
from tests.oracle.capacity import assign_slots, demand
from tests.unit.moe.helpers import (
    NEW_NAMES,
    ROUTERS,
    Extras,
    config,
    extras,
    local_plan,
    oracle_decision,
    renamed,
)

SHAPES = [(0, 8), (1, 1), (1, 8), (7, 2), (5, 4), (7, 5), (24, 8)]
ORDERS = ["choice_major", "token_major"]


def route(moe, logits, valid, given=None, draws=None, training=True, group_size=0, capacity=DROPLESS):
    """``given`` None: the extras of ``extras(moe, tokens)``."""
    given = extras(moe, len(valid)) if given is None else given
    inputs = RouterInputs(
        logits_TE=logits,
        valid_T=torch.tensor(valid, dtype=torch.bool),
        training=training,
        draws=draws,
        group_size=group_size,
        capacity=capacity,
        **given.fields(),
    )
    return FAMILIES[moe.router.name].route(inputs, moe.router, moe.top_k)


def active_list(routed):
    """(token, choice, expert) and weights of the active entries, in the package's order."""
    keep = routed.active_A
    columns = (routed.token_A[keep], routed.choice_A[keep], routed.expert_A[keep])
    return list(zip(*(c.tolist() for c in columns), strict=True)), routed.weight_A[keep]


def check_routing(routed, decision, experts):
    listed, weights = active_list(routed)
    assert listed == cases.decision_list(decision)
    wanted = torch.tensor([a.weight.item() for a in decision.assignments], dtype=torch.float64)
    assert torch.allclose(weights, wanted, rtol=0, atol=1e-12)
    assert (routed.weight_A[~routed.active_A] == 0).all()
    assert ((routed.expert_A >= 0) & (routed.expert_A < experts)).all()
    assert routed.valid_T.nonzero().flatten().tolist() == sorted(decision.probs)
    assert routed.nonfinite_tokens.item() == decision.nonfinite
    for ours, theirs in ((routed.probs_TE, decision.probs), (routed.logits_TE, decision.logits)):
        rows = torch.zeros_like(ours)
        for token, row in theirs.items():
            rows[token] = torch.tensor([value.item() for value in row], dtype=torch.float64)
        assert torch.allclose(ours, rows, rtol=0, atol=1e-12)
    for ours, theirs in ((routed.load_E, decision.load), (routed.importance_E, decision.importance)):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.tolist() == pytest.approx([value.item() for value in theirs], rel=1e-12, abs=1e-12)


def check_slots(routed, decision, tokens, experts, group_size, slots):
    groups = tokens // group_size if group_size else 0
    plan = local_plan(
        routed, num_experts=experts, group_size=group_size, capacity=DROPLESS if slots is None else slots
    )
    group_of = [t // group_size for t in range(tokens)]
    kept = assign_slots(decision.assignments, group_of, slots)
    got = zip(routed.token_A.tolist(), routed.choice_A.tolist(), plan.slot_A.tolist(), strict=True)
    assert {(t, c): s for t, c, s in got if s >= 0} == kept
    assert plan.demand_GE.tolist() == demand(decision.assignments, group_of, groups, experts)
    sent = [(a.expert, a.token) for a in decision.assignments if (a.token, a.choice) in kept]
    sent = sorted(sent, key=lambda row: (row[0], group_of[row[1]]))  # stable: expert, group, priority
    entries = plan.assignment_N
    assert [*zip(routed.expert_A[entries].tolist(), plan.token_N.tolist(), strict=True)] == sent
    assert plan.tokens_per_expert_E.tolist() == [sum(e == x for e, _ in sent) for x in range(experts)]
    [part] = plan.parts
    assert (part.splits, part.rows_per_expert) == ((), None)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_decisions_and_slots(kind, name, order):
    checked = 0
    for tokens, experts in SHAPES:
        try:
            moe = config(name, slot_order=order, num_experts=experts)
        except ValueError:
            continue  # too few experts for this router
        checked += 1
        logits, valid = cases.logits_and_valid(kind, tokens, experts, seed=3)
        routed = route(moe, logits, valid)
        decision = oracle_decision(logits, valid, moe, extras(moe, tokens))
        check_routing(routed, decision, experts)
        for slots in (0, 1, tokens // experts, None):
            check_slots(routed, decision, tokens, experts, max(tokens, 1), slots)
        if tokens == 24:
            check_slots(routed, decision, tokens, experts, 8, 2)
    assert checked >= 2


@pytest.mark.parametrize("priority", ["position", "batch_prioritized", "random"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_no_token_is_left_behind(kind, priority):
    """Attempts, given slots: a token goes on until an expert has room, in groups of their own."""
    for tokens, experts, attempts, group_size in ((0, 3, 2, 1), (7, 2, 2, 7), (24, 5, 3, 8), (24, 5, 5, 24)):
        options = {"name": "switch", "attempts": attempts, "priority": priority}
        moe = MoEConfig(num_experts=experts, router=options)
        logits, valid = cases.logits_and_valid(kind, tokens, experts, seed=8)
        group_of = [t // group_size for t in range(tokens)]
        for slots in (0, 1, -(-group_size // experts), None):
            capacity = DROPLESS if slots is None else slots
            routed = route(moe, logits, valid, group_size=group_size, capacity=capacity)
            given = extras(moe, tokens)
            decision = oracle_decision(logits, valid, moe, given, group_of=group_of, slots=slots)
            check_routing(routed, decision, experts)
            check_slots(routed, decision, tokens, experts, group_size, slots)
            room = slots is not None and slots * experts >= group_size and attempts == experts
            if room and kind in ("random", "ties", "one_expert"):
                plan = local_plan(routed, num_experts=experts, group_size=group_size, capacity=capacity)
                assert sorted(plan.token_N.tolist()) == list(range(tokens)), "everybody found a place"


@pytest.mark.parametrize(
    "name", ["noisy1", "noisy2", "vmoe2", "two_levels", "two_levels_wide", "top2_shuffled"]
)
def test_evaluation_has_no_noise(name):
    logits, valid = cases.logits_and_valid("broken", 24, 8)
    moe = config(name, num_experts=8)
    given = extras(moe, 24)
    routed = route(moe, logits, valid, given, training=False)
    quiet = replace(given, normal=None, group_normal=None, order=None)
    check_routing(routed, oracle_decision(logits, valid, moe, quiet), 8)


@pytest.mark.parametrize(
    "name", ["gshard_sampling", "gshard_random", "top2_shuffled", "noisy2", "two_levels"]
)
def test_random_numbers_are_needed_once_and_in_shape(name):
    logits, valid = cases.logits_and_valid("random", 6, 4)
    moe = config(name, num_experts=4)
    given = extras(moe, 6)
    draws = Draws(seed=0, layer=0, sample_T=torch.zeros(6).long(), position_T=torch.arange(6))
    learned = replace(given, uniform=None, gumbel=None, order=None, normal=None, group_normal=None)
    with pytest.raises(ValueError, match="sample_B"):
        route(moe, logits, valid, learned)
    with pytest.raises(ValueError, match="not both"):
        route(moe, logits, valid, given, draws)
    short = {
        key: getattr(given, key)[:5]
        for key in ("uniform", "gumbel", "order", "normal", "group_normal")
        if getattr(given, key) is not None
    }
    for key, numbers in short.items():
        with pytest.raises(ValueError, match=r"shape \(6"):
            route(moe, logits, valid, replace(given, **{key: numbers}))
    route(moe, logits, valid, learned, draws)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("normalize", [True, False])
def test_every_expert_chosen(normalize, order):
    """k = E is legal, with and without unavailable experts."""
    for kind in ("random", "ties", "broken"):
        logits, valid = cases.logits_and_valid(kind, 7, 5)
        moe = config("top2", slot_order=order, num_experts=5, top_k=5)
        moe = moe.model_copy(update={"router": moe.router.model_copy(update={"normalize": normalize})})
        check_routing(route(moe, logits, valid), oracle_decision(logits, valid, moe, Extras()), 5)


def test_evaluation_has_its_own_policy():
    logits, valid = cases.logits_and_valid("random", 32, 5)
    values = {"second_policy": "random", "second_policy_eval": "threshold", "tau": 0.3}
    moe = config("gshard_all", num_experts=5)
    moe = moe.model_copy(update={"router": moe.router.model_copy(update=values)})
    listed, _ = active_list(route(moe, logits, valid, training=False))
    assert listed == cases.decision_list(routing.gshard_top2(logits, valid, policy="threshold", tau=0.3))
    listed, _ = active_list(route(config("gshard_random", num_experts=5), logits, valid, training=False))
    assert listed == cases.decision_list(routing.gshard_top2(logits, valid, policy="all"))


def test_counters_draw_the_oracles_numbers():
    logits, valid = cases.logits_and_valid("random", 24, 5)
    sample, position = torch.arange(24) // 6 + 2**35, torch.arange(24) % 6
    draws = Draws(seed=9, layer=4, sample_T=sample, position_T=position)
    moe = config("gshard_random", num_experts=5)
    uniform = [philox.draw(9, 0, 4, int(s), int(p), 0) for s, p in zip(sample, position, strict=True)]
    listed, _ = active_list(route(moe, logits, valid, Extras(), draws=draws))
    assert listed == cases.decision_list(oracle_decision(logits, valid, moe, Extras(uniform=uniform)))
    assert len(listed) < 48, "some second experts are skipped"


@pytest.mark.parametrize(("k", "experts"), [(3, 2), (2, 1), (0, 2)])
def test_impossible_numbers_of_experts_per_token_are_refused(k, experts):
    with pytest.raises(ValueError, match="top_k"):
        config("top2", top_k=k, num_experts=experts)
    options = config("top2").router
    with pytest.raises(ValueError, match=f"top_k={k}"):
        Router(4, experts, top_k=k, family=FAMILIES["topk"], options=options)


def test_top2_of_one_expert_is_refused():
    with pytest.raises(ValueError, match="top_k=2"):
        config("gshard_all", num_experts=1)


# Not hash without a table, where the name of the expert is the id modulo E.
@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"hash"}))
def test_renaming_experts_renames_the_decision(name):
    """In training, random numbers of an expert renamed with it."""
    logits, valid = cases.logits_and_valid("random", 32, 8)
    moe = config(name, num_experts=8)
    given = extras(moe, 32)
    changed = {
        key: renamed(value.movedim(-1, 0)).movedim(0, -1)
        for key in ("gumbel", "normal", "group_normal", "noise_logits_TE", "group_logits_TP",
                    "group_noise_logits_TP", "bias_E", "threshold_E", "task_logits")
        if (value := getattr(given, key)) is not None
    }  # fmt: skip
    if given.table is not None:
        changed["table"] = renamed(torch.tensor(given.table)).tolist()
    before, weights = active_list(route(moe, logits, valid, given))
    after, weights2 = active_list(route(moe, logits[:, NEW_NAMES], valid, replace(given, **changed)))
    wanted = dict(zip(before, weights.tolist(), strict=True))
    got = {(t, c, int(NEW_NAMES[e])): w for (t, c, e), w in zip(after, weights2.tolist(), strict=True)}
    assert got == pytest.approx(wanted, rel=0, abs=1e-13)
    assert len(got) == len(after)
    assert moe.router.name == "expert_choice" or [*got] == [*wanted], "whose list goes by experts"


@pytest.mark.parametrize("name", ["gshard_random", "top2"])
def test_token_major_is_causal_and_choice_major_is_not(name):
    """Keeps, slots and weights of the first half, when only the second half of a full group changes."""

    def changes(order):
        moe = config(name, slot_order=order, num_experts=4)
        count = 0
        for seed in range(20):
            logits, valid = cases.logits_and_valid("random", 32, 4, seed=seed)
            other = logits.clone()
            other[16:] = cases.logits_and_valid("random", 32, 4, seed=100 + seed)[0][16:]
            results = []
            for h in (logits, other):
                routed = route(moe, h, valid, extras(moe, 32, seed))
                plan = local_plan(routed, num_experts=4, group_size=32, capacity=12)
                past = routed.token_A < 16
                results.append((plan.slot_A[past].tolist(), routed.weight_A[past].tolist()))
            count += results[0] != results[1]
        return count

    assert changes("token_major") == 0
    assert changes("choice_major") > 0
