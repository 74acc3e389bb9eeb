"""Every router family, policy and slot order against the oracle: lists, slots, probabilities, counts."""

from __future__ import annotations

import pytest
import torch

from epmoe.moe.build import ROUTERS as FAMILIES
from epmoe.moe.router import Router
from epmoe.ops import DROPLESS
from epmoe.types import Draws, RouterInputs
from tests.oracle import cases, philox, routing
from tests.oracle.capacity import assign_slots, demand
from tests.unit.moe.helpers import ROUTERS, config, local_plan, oracle_decision

SHAPES = [(tokens, experts) for tokens in (0, 1, 7, 64) for experts in (1, 2, 5, 8)]
ORDERS = ["choice_major", "token_major"]


def route(moe, logits, valid, uniform=None, draws=None, training=True):
    random = moe.router.name == "gshard_top2" and moe.router.second_policy == "random" and uniform is not None
    inputs = RouterInputs(
        logits_TE=logits,
        valid_T=torch.tensor(valid, dtype=torch.bool),
        training=training,
        draws=draws,
        uniform_T=torch.tensor(uniform, dtype=torch.float32) if random else None,
    )
    return FAMILIES[moe.router.name](inputs, moe.router, moe.top_k)


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
    sent = sorted(sent, key=lambda row: row[0])  # stable: ascending expert, then priority
    entries = plan.assignment_N
    assert [*zip(routed.expert_A[entries].tolist(), plan.token_N.tolist(), strict=True)] == sent
    assert plan.tokens_per_expert_E.tolist() == [sum(e == x for e, _ in sent) for x in range(experts)]
    assert plan.send_splits == plan.recv_splits == (len(sent),)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_decisions_and_slots(kind, name, order):
    for tokens, experts in SHAPES:
        k = ROUTERS[name].get("top_k", 2 if name.startswith("gshard") else 1)
        if k > experts:
            continue
        moe = config(name, slot_order=order, num_experts=experts)
        logits, valid = cases.logits_and_valid(kind, tokens, experts, seed=3)
        uniform = cases.uniforms(tokens)
        routed = route(moe, logits, valid, uniform)
        decision = oracle_decision(logits, valid, moe, uniform)
        check_routing(routed, decision, experts)
        for slots in (0, 1, tokens // experts, None):
            check_slots(routed, decision, tokens, experts, max(tokens, 1), slots)
        if tokens == 64:
            check_slots(routed, decision, tokens, experts, 16, 3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("normalize", [True, False])
def test_every_expert_chosen(normalize, order):
    """k = E is legal, with and without unavailable experts."""
    for kind in ("random", "ties", "broken"):
        logits, valid = cases.logits_and_valid(kind, 7, 5)
        moe = config("top2", slot_order=order, num_experts=5, top_k=5)
        moe = moe.model_copy(update={"router": moe.router.model_copy(update={"normalize": normalize})})
        check_routing(route(moe, logits, valid), oracle_decision(logits, valid, moe, []), 5)


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
    listed, _ = active_list(route(moe, logits, valid, draws=draws))
    assert listed == cases.decision_list(oracle_decision(logits, valid, moe, uniform))
    assert len(listed) < 48, "some second experts are skipped"


def test_random_policy_without_numbers_says_what_is_missing():
    logits, valid = cases.logits_and_valid("random", 4, 3)
    with pytest.raises(ValueError, match="sample_B"):
        route(config("gshard_random", num_experts=3), logits, valid)


def test_random_policy_takes_counters_or_numbers_never_both():
    moe = config("gshard_random", num_experts=3)
    logits, valid = cases.logits_and_valid("random", 4, 3)
    draws = Draws(seed=0, layer=0, sample_T=torch.zeros(4).long(), position_T=torch.arange(4))
    with pytest.raises(ValueError, match="not both"):
        route(moe, logits, valid, [0.5] * 4, draws)
    with pytest.raises(ValueError, match="shape"):
        route(moe, logits, valid, [0.5] * 3)


@pytest.mark.parametrize(("k", "experts"), [(3, 2), (2, 1), (0, 2)])
def test_impossible_numbers_of_experts_per_token_are_refused(k, experts):
    with pytest.raises(ValueError, match="top_k"):
        config("top2", top_k=k, num_experts=experts)
    options = config("top2").router
    with pytest.raises(ValueError, match=f"top_k={k}"):
        Router(4, experts, top_k=k, route=FAMILIES["topk"], options=options)


def test_top2_of_one_expert_is_refused():
    with pytest.raises(ValueError, match="top_k=2"):
        config("gshard_all", num_experts=1)


@pytest.mark.parametrize("name", ["gshard_all", "gshard_threshold", "top2", "top3_raw", "switch"])
def test_renaming_experts_renames_the_decision(name):
    logits, valid = cases.logits_and_valid("random", 32, 8)
    permutation = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])  # new expert j is old expert permutation[j]
    moe = config(name, num_experts=8)
    before, weights = active_list(route(moe, logits, valid))
    after, weights2 = active_list(route(moe, logits[:, permutation], valid))
    assert [(t, c, int(permutation[e])) for t, c, e in after] == before
    assert torch.allclose(weights, weights2, rtol=0, atol=1e-15)


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
                routed = route(moe, h, valid, cases.uniforms(32, seed))
                plan = local_plan(routed, num_experts=4, group_size=32, capacity=12)
                past = routed.token_A < 16
                results.append((plan.slot_A[past].tolist(), routed.weight_A[past].tolist()))
            count += results[0] != results[1]
        return count

    assert changes("token_major") == 0
    assert changes("choice_major") > 0
