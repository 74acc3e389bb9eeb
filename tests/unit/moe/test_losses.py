"""Balance and z-loss: values, gradients, invariances."""

from __future__ import annotations

import math

import pytest
import torch

from epmoe.moe.losses import balance_loss, choice_counts, z_loss
from epmoe.ops import DROPLESS
from tests.oracle import cases
from tests.oracle import losses as oracle
from tests.unit.moe.helpers import Extras, config, extras, local_plan, oracle_decision
from tests.unit.moe.test_routers import route


def package_losses(moe, logits, valid, given, group_size, capacity=DROPLESS):
    """balance over first choices, balance over all wishes, z."""
    routed = route(moe, logits, valid, given)
    plan = local_plan(routed, num_experts=moe.num_experts, group_size=group_size, capacity=capacity)
    first_GE = choice_counts(routed, *plan.demand_GE.shape, first_only=True)
    return (
        balance_loss(routed.probs_TE, first_GE, routed.valid_T, count_per_token=1),
        balance_loss(routed.probs_TE, plan.demand_GE, routed.valid_T, count_per_token=moe.top_k),
        z_loss(routed.logits_TE, routed.valid_T),
    )


def oracle_losses(moe, logits, valid, given, group_size):
    decision = oracle_decision(logits, valid, moe, given)
    group_of = [t // group_size for t in range(len(valid))]
    groups = len(valid) // group_size
    counts = (
        oracle.balance_loss(decision, group_of, groups, moe.num_experts, count=count, k=moe.top_k)
        for count in ("top1", "all")
    )
    return (*counts, oracle.z_loss(decision))


@pytest.mark.parametrize("name", ["gshard_random", "switch", "top3_raw"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_values_and_gradients(kind, name):
    for tokens, experts, group_size in ((0, 5, 7), (1, 5, 1), (21, 5, 7), (24, 3, 24)):
        moe = config(name, num_experts=experts)
        logits, valid = cases.logits_and_valid(kind, tokens, experts, seed=4)
        given = extras(moe, tokens)
        mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        got = package_losses(moe, mine, valid, given, group_size)
        wanted = oracle_losses(moe, theirs, valid, given, group_size)
        for one, other in zip(got, wanted, strict=True):
            assert one.dtype == torch.float64
            assert one.item() == pytest.approx(other.item(), rel=1e-12, abs=1e-12)
        total = got[0] + 0.5 * got[1] + 0.1 * got[2]
        total.backward()
        assert mine.grad is not None
        expected = torch.zeros_like(logits)
        reference = wanted[0] + 0.5 * wanted[1] + 0.1 * wanted[2]
        if reference.requires_grad:
            reference.backward()
            expected = theirs.grad
        routed_T = route(moe, logits, valid, given).valid_T
        scale = max(expected[routed_T].abs().max().item() if routed_T.any() else 0.0, 1.0)
        assert ((mine.grad - expected)[routed_T].abs() <= 1e-10 * scale).all()
        assert (mine.grad[~routed_T] == 0).all()


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_values_at_zero_logits(experts):
    """Uniform probabilities: balance is 1 per token, z is (ln E)^2 per token, whatever was chosen."""
    moe = config("top1", num_experts=experts)
    top1, wishes, z = package_losses(moe, torch.zeros(10, experts).double(), [True] * 10, Extras(), 5)
    assert top1.item() == pytest.approx(10.0, abs=1e-12)
    assert wishes.item() == pytest.approx(10.0, abs=1e-12)
    assert z.item() == pytest.approx(10 * math.log(experts) ** 2, abs=1e-12)


@pytest.mark.parametrize("capacity", [0, 1, 3, DROPLESS])
def test_capacity_does_not_change_any_loss(capacity):
    moe = config("gshard_random", num_experts=4)
    logits, valid = cases.logits_and_valid("broken", 24, 4)
    given = extras(moe, 24)
    wanted = [loss.item() for loss in package_losses(moe, logits, valid, given, 8)]
    assert [loss.item() for loss in package_losses(moe, logits, valid, given, 8, capacity)] == wanted


@pytest.mark.parametrize("name", ["gshard_random", "top2"])
def test_groups_and_micro_batches_add_up(name):
    moe = config(name, num_experts=4)
    logits, valid = cases.logits_and_valid("broken", 24, 4)
    given = extras(moe, 24)
    together = package_losses(moe, logits, valid, given, 8)
    parts = [
        package_losses(moe, logits[i : i + 8], valid[i : i + 8], given.rows(i, i + 8), 8) for i in (0, 8, 16)
    ]
    for whole, pieces in zip(together, zip(*parts, strict=True), strict=True):
        assert whole.item() == pytest.approx(sum(piece.item() for piece in pieces), rel=1e-13)


def test_a_group_is_not_the_whole_batch():
    """Two sequences that use different experts: each is unbalanced, together they are balanced."""
    logits = torch.tensor([[9.0, 0.0]] * 4 + [[0.0, 9.0]] * 4, dtype=torch.float64)
    moe = config("top1", num_experts=2)
    apart = package_losses(moe, logits, [True] * 8, Extras(), 4)[0].item()
    mixed = package_losses(moe, logits, [True] * 8, Extras(), 8)[0].item()
    assert mixed == pytest.approx(8.0)
    assert apart > 15.9


@pytest.mark.parametrize("name", ["gshard_random", "top2", "switch"])
def test_padding_appended_to_a_group_changes_nothing(name):
    moe = config(name, num_experts=4)
    logits, valid = cases.logits_and_valid("random", 9, 4)
    given = extras(moe, 9)
    before = package_losses(moe, logits, valid, given, 9)
    longer = torch.cat([logits, 50.0 * torch.ones(5, 4).double()])
    after = package_losses(moe, longer, valid + [False] * 5, extras(moe, 14), 14)
    assert [b.item() for b in before] == pytest.approx([a.item() for a in after], rel=1e-13)


def test_large_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, -math.inf]], dtype=torch.float64, requires_grad=True)
    total = sum(package_losses(config("top2", num_experts=3), logits, [True], Extras(), 1))
    total.backward()
    assert math.isfinite(total.item())
    assert logits.grad.isfinite().all()
