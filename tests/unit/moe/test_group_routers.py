"""Expert choice, strict balance, BASE and Sinkhorn: what they promise about a whole group of tokens."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from epmoe.config import Config, MoEConfig
from epmoe.models.decoder import Decoder
from epmoe.moe.dispatch import LocalDispatcher, PaddedDispatcher
from epmoe.moe.losses import batchwise_threshold_loss
from epmoe.moe.routers.base import balanced_assignment
from epmoe.moe.routers.sinkhorn import log_plan
from epmoe.ops import DROPLESS
from epmoe.types import Limits
from tests.oracle import cases
from tests.oracle.groups import assignment, plan
from tests.unit.moe.helpers import (
    by_name,
    close,
    config,
    context,
    extras,
    make_layer,
    oracle_decision,
    tokens,
)
from tests.unit.moe.test_families import MODEL
from tests.unit.moe.test_routers import check_routing, route

GROUP_ROUTERS = ["expert_choice", "base", "sinkhorn1", "sinkhorn2", "strict2"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", GROUP_ROUTERS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_groups_are_decided_one_by_one(kind, name, training):
    """Several groups at once, in training and in evaluation, against the oracle."""
    for num_tokens, experts, group_size in ((0, 4, 3), (12, 4, 3), (16, 5, 8)):
        moe = config(name, num_experts=experts)
        logits, valid = cases.logits_and_valid(kind, num_tokens, experts, seed=5)
        routed = route(moe, logits, valid, training=training, group_size=group_size)
        group_of = [t // group_size for t in range(num_tokens)]
        given = extras(moe, num_tokens)
        check_routing(
            routed, oracle_decision(logits, valid, moe, given, group_of=group_of, training=training), experts
        )


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("name", ["expert_choice", "sinkhorn1", "strict2"])
def test_one_expert_and_all_experts(name, experts, top_k):
    moe = config(name, num_experts=experts, top_k=top_k)
    for kind in ("random", "ties", "broken"):
        logits, valid = cases.logits_and_valid(kind, 9, experts)
        routed = route(moe, logits, valid)
        check_routing(routed, oracle_decision(logits, valid, moe, extras(moe, 9)), experts)
        if top_k == experts:
            available = (routed.logits_TE != -math.inf) & routed.valid_T.unsqueeze(1)
            assert routed.active_A.sum() == available.sum(), "everybody takes everybody"


# ------------------------------------------------------------------------------------------- expert choice
def test_every_expert_takes_the_same_number_and_the_list_is_as_long():
    moe = config("expert_choice", num_experts=4)
    logits, valid = cases.logits_and_valid("one_expert", 20, 4)
    valid[7] = False
    routed = route(moe, logits, valid, group_size=10)
    assert routed.expert_A.shape == (2 * 4 * 5,), "E*C per group, C = 10 * 2 / 4"
    counts = torch.zeros(2, 4).long()
    for t, e, active in zip(routed.token_A.tolist(), routed.expert_A.tolist(), routed.active_A, strict=True):
        counts[t // 10, e] += int(active)
    assert counts.tolist() == [[4] * 4, [5] * 4], "floor(9 * 2 / 4) of a group with a padding token"
    per_token = torch.bincount(routed.token_A[routed.active_A], minlength=20)
    assert per_token.max() > 2
    assert per_token[7] == 0
    first_choices = torch.bincount(routed.token_A[routed.active_A & (routed.choice_A == 0)], minlength=20)
    assert torch.equal(first_choices, per_token.clamp(max=1)), "a token that was chosen has one first choice"


@pytest.mark.parametrize("factor", [0.6, None])
@pytest.mark.parametrize("name", ["expert_choice", "strict2"])
def test_lists_of_another_length_than_tokens_times_k(name, factor):
    """Local and padded dispatch, weights applied by the experts or afterwards: the same numbers and metrics."""
    results = []
    for make in (
        lambda: LocalDispatcher(),
        lambda: LocalDispatcher(weigh_rows=True),
        lambda: PaddedDispatcher(None),
    ):
        layer = make_layer(config(name, num_experts=4, capacity_factor=factor, min_capacity=0))
        layer.dispatcher = make()
        x_BSD = tokens(3, 8).requires_grad_()
        y_BSD, report = layer(x_BSD, context(x_BSD, "some"))
        (y_BSD.square().sum() + sum(report.losses.values())).backward()
        results.append((y_BSD, x_BSD.grad, *by_name(report.metrics).values(), *report.losses.values()))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            close(two, one.double(), 1e-13)


# ------------------------------------------------------------------------------------------- strict balance
def strict(thresholds, logits, training=True):
    moe = MoEConfig(num_experts=4, top_k=2, router="strictly_balanced")
    given = extras(moe, len(logits))
    object.__setattr__(given, "threshold_E", thresholds)
    return route(moe, logits, [True] * len(logits), given, training=training)


def test_thresholds_learn_to_say_what_the_batch_kept():
    """Gradient of a threshold: tokens it should let through less those it does; trained, evaluation is as balanced."""
    logits, _ = cases.logits_and_valid("random", 200, 4)
    logits = logits + torch.tensor([1.0, 0.0, 0.0, -1.0], dtype=torch.float64)
    thresholds = torch.full((4,), 0.25, dtype=torch.float64, requires_grad=True)
    for step in range(200):
        routed = strict(thresholds, logits)
        loss = batchwise_threshold_loss(routed)
        assert loss.item() >= 0
        (grad_E,) = torch.autograd.grad(loss, thresholds)
        above_E = (routed.probs_TE > thresholds).sum(0)
        assert grad_E.tolist() == (100 - above_E).tolist()
        with torch.no_grad():
            thresholds -= 0.2 / (50 + step) * grad_E.sign() * min(1.0, float(grad_E.abs().max()) / 10)
    trained = torch.bincount(strict(thresholds, logits).expert_A[strict(thresholds, logits).active_A])
    assert trained.tolist() == [100] * 4
    routed = strict(thresholds, logits, training=False)
    assert torch.bincount(routed.expert_A[routed.active_A]).tolist() == pytest.approx([100] * 4, abs=4)
    untrained = strict(torch.full((4,), 0.25).double(), logits, training=False)
    counts = torch.bincount(untrained.expert_A[untrained.active_A]).tolist()
    assert max(counts) > 130


def test_a_token_nobody_keeps_is_valid_and_overflows():
    layer = make_layer(config("strict2", num_experts=4, top_k=1, capacity_factor=None))
    report = layer(tokens(1, 32), context(tokens(1, 32)))[1]
    assert report.metrics.demand_E.tolist() == [8] * 4
    assert report.metrics.overflow_tokens > 0
    assert report.metrics.valid_tokens == 32
    assert report.metrics.nonfinite_tokens == 0


# ------------------------------------------------------------------------------------------- BASE
def best_by_trying(affinity):
    """The largest sum over all assignments with at most ceil(n / E) tokens each, and the first that has it."""
    tokens_, experts = affinity.shape
    room = -(-tokens_ // experts)
    tried = [
        (sum(affinity[t, e] for t, e in enumerate(way)), way)
        for way in itertools.product(range(experts), repeat=tokens_)
        if max(way.count(e) for e in range(experts)) <= room
    ]
    best = max(value for value, _ in tried)
    return best, min(way for value, way in tried if value == best)


@pytest.mark.parametrize(("num_tokens", "experts"), [(1, 4), (5, 2), (6, 3), (5, 3), (4, 4), (7, 2), (3, 5)])
def test_the_assignment_is_the_best_of_all(num_tokens, experts):
    rng = np.random.default_rng(num_tokens * 10 + experts)
    for trial in range(12):
        affinity = np.round(rng.standard_normal((num_tokens, experts)) * (1.0 if trial % 2 else 1024.0))
        value, way = best_by_trying(affinity)
        got = balanced_assignment(affinity)
        assert affinity[np.arange(num_tokens), got].sum() == value
        assert tuple(got) == way, "of equally good ones the lowest"


@pytest.mark.parametrize(
    ("num_tokens", "experts", "kind"),
    [(64, 8, "random"), (61, 8, "ties"), (40, 3, "equal"), (48, 16, "skewed"), (30, 5, "forbidden")],
)
def test_the_assignment_equals_another_algorithms(num_tokens, experts, kind):
    rng = np.random.default_rng(experts)
    affinity = rng.standard_normal((num_tokens, experts))
    if kind == "ties":
        affinity = affinity.round()
    if kind == "equal":
        affinity = np.zeros((num_tokens, experts))
    if kind == "skewed":
        affinity += 5.0 * np.arange(experts)
    if kind == "forbidden":
        affinity[rng.random((num_tokens, experts)) < 0.6] = -math.inf
        affinity[:, 0] = 1.0
    got = balanced_assignment(affinity)
    assert got.tolist() == assignment(affinity.tolist())
    assert np.bincount(got).max() <= -(-num_tokens // experts)


def test_base_is_balanced_in_training_and_greedy_in_evaluation():
    logits, valid = cases.logits_and_valid("one_expert", 24, 4)
    moe = config("base", num_experts=4)
    assert torch.bincount(route(moe, logits, valid).expert_A).tolist() == [6] * 4
    assert torch.bincount(route(moe, logits, valid, training=False).expert_A).tolist() == [24]


# ------------------------------------------------------------------------------------------- Sinkhorn
def test_the_plan_is_balanced_and_survives_large_logits():
    logits, _ = cases.logits_and_valid("one_expert", 24, 4)
    got = log_plan(logits.view(2, 12, 4), torch.ones(2, 12).bool(), tolerance=1e-12, iterations=500)
    close(got.exp().sum(2), torch.full((2, 12), 1 / 12).double(), 1e-7)
    close(got.exp().sum(1), torch.full((2, 4), 1 / 4).double(), 1e-9)
    got = log_plan(logits.view(2, 12, 4), torch.ones(2, 12).bool(), tolerance=1e-3, iterations=500)
    wanted = [plan(rows, 1e-3, 500) for rows in logits.view(2, 12, 4).tolist()]
    close(got, torch.tensor(wanted, dtype=torch.float64), 1e-12)
    far = log_plan(
        1e4 * logits.float().view(2, 12, 4), torch.ones(2, 12).bool(), tolerance=1e-4, iterations=50
    )
    assert far.isfinite().all()


def test_sinkhorn_is_nearly_balanced_where_the_best_logits_are_not():
    logits, valid = cases.logits_and_valid("random", 240, 4)
    logits = logits + torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    moe = config("sinkhorn1", num_experts=4)
    counts = torch.bincount(route(moe, logits, valid).expert_A, minlength=4)
    greedy = torch.bincount(route(moe, logits, valid, training=False).expert_A, minlength=4)
    assert counts.max() < 1.5 * 60
    assert greedy.max() > 3 * 60


# ------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (
            {"router": {"name": "expert_choice", "slot_order": "token_major"}},
            "slot_order=token_major does not apply",
        ),
        ({"router": {"name": "expert_choice", "priority": "random"}}, "priority=random does not apply"),
        ({"router": {"name": "hash", "jitter": 0.1}}, "jitter=0.1 does not apply to router hash"),
        (
            {"router": "hash", "losses": {"balance": 0.1}},
            r"no weights that a loss could train; set losses: \{\}",
        ),
        ({"router": {"name": "hash", "table": "balanced"}}, "made from the counts"),
        ({"router": {"name": "hash", "counts": "x.txt"}}, "made from the counts"),
        ({"router": "hash", "top_k": 2}, "top_k=2"),
        ({"router": "base", "top_k": 2}, "top_k=2"),
        ({"router": "topk", "losses": {"batchwise_threshold": 1.0}}, "routers that do: strictly_balanced"),
        ({"router": "soft", "capacity_factor": 1.25}, "capacity_factor does not apply.*router.slots"),
        (
            {"router": "soft", "capacity_factor_eval": 1.25},
            "set capacity_factor and capacity_factor_eval to null",
        ),
        ({"router": "soft", "dispatcher": "all_to_all"}, "dispatcher auto or padded"),
        ({"router": "soft", "losses": {"z": 0.1}}, "nothing to balance"),
        ({"router": {"name": "task", "default_task": 1}}, "default_task=1 must be below num_tasks=1"),
        ({"router": {"name": "sentence", "second_policy": "threshold"}}, "set tau below 0.5"),
        ({"router": "expert_choice", "top_k": 9}, "top_k=9"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(moe, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"moe": moe})


@pytest.mark.parametrize(
    "name", ["expert_choice", "base", "sinkhorn", "strictly_balanced", "sentence", "soft"]
)
def test_a_decoder_refuses_what_looks_at_the_group_unless_told(name):
    moe = MoEConfig(num_experts=4, router=name)
    with pytest.raises(ValueError, match=rf"router {name} is not causal.*use.*gshard_top2.*hash, task"):
        Decoder(MODEL, moe, vocab_size=19, seed=0)
    model = Decoder(MODEL, moe.model_copy(update={"allow_non_causal": True}), vocab_size=19, seed=0)
    token_BS = torch.arange(14).view(2, 7)
    logits_BSV, _ = model.eval()(token_BS)
    assert logits_BSV.isfinite().all()


def test_capacity_cuts_the_end_of_an_experts_list():
    moe = config("expert_choice", num_experts=4)
    logits, valid = cases.logits_and_valid("random", 16, 4)
    layer = make_layer(moe)
    routed = route(moe, logits, valid, capacity=DROPLESS)
    _, plan_ = layer.dispatcher.dispatch(
        tokens(1, 16)[0], routed, Limits(num_experts=4, group_size=16, capacity=3)
    )
    kept = routed.token_A[plan_.assignment_N].view(4, 3)
    for e in range(4):
        assert kept[e].tolist() == routed.token_A[routed.expert_A == e][:3].tolist()
