"""Balance and z-loss: values, gradients, invariances."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from epmoe.config import MoEConfig
from epmoe.moe.build import LOSSES
from epmoe.moe.losses import LossInputs, balance_loss, choice_counts, squared_variation, z_loss
from epmoe.ops import DROPLESS
from tests.oracle import cases
from tests.oracle import losses as oracle
from tests.unit.moe.helpers import (
    Extras,
    close,
    config,
    context,
    extras,
    local_plan,
    make_layer,
    oracle_decision,
    oracle_layer,
    tokens,
)
from tests.unit.moe.test_routers import check_routing, route


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
    for num_tokens, experts, group_size in ((0, 5, 7), (1, 5, 1), (21, 5, 7), (24, 3, 24)):
        moe = config(name, num_experts=experts)
        logits, valid = cases.logits_and_valid(kind, num_tokens, experts, seed=4)
        given = extras(moe, num_tokens)
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


@pytest.mark.parametrize("count", ["top1", "all"])
def test_retries_change_no_loss(count):
    """Capacity decides which experts a token tries, and losses want what the router asked for first."""
    found = []
    for attempts, factor in ((1, None), (3, None), (3, 0.4), (3, 0.1)):
        moe = config(
            "switch_retry",
            num_experts=4,
            capacity_factor=factor,
            min_capacity=0,
            balance_count=count,
            losses={"balance": 1.0, "importance": 1.0, "z": 1.0, "sequence_balance": 1.0},
        )
        moe = moe.model_copy(update={"router": moe.router.model_copy(update={"attempts": attempts})})
        report, _ = layer_losses(moe, tokens(2, 12))
        found.append([loss.item() for loss in report.losses.values()])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-13)


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


# ------------------------------------------------------------------------------------------- scopes, other losses
def layer_losses(moe, x_BSD, ctx=None, sum_over_ranks=None, earlier=None):
    """Losses of a layer in training, and its router's weights."""
    layer = make_layer(moe)
    layer.earlier = earlier
    layer.sum_over_ranks = sum_over_ranks
    _, report = layer(x_BSD, ctx or context(x_BSD))
    return report, layer.router.weight


@pytest.mark.parametrize("count", ["top1", "all"])
@pytest.mark.parametrize("scope", ["group", "sequence", "micro_batch", "global"])
def test_scopes_of_balance(scope, count):
    """Against the oracle; with groups of the whole micro-batch, so that ``group`` is not ``sequence``."""
    moe = config("gshard_random", num_experts=4, group="rank", balance_scope=scope, balance_count=count)
    x_BSD = tokens(3, 5)
    ctx = context(x_BSD, "some")
    report, weight = layer_losses(moe, x_BSD, ctx)
    result = oracle_layer(x_BSD, dict(make_layer(moe).named_parameters()), moe, ctx)
    by_sequence = scope == "sequence"
    group_of = [t // 5 if by_sequence else 0 for t in range(15)]
    wanted = oracle.balance_loss(result.decision, group_of, 3 if by_sequence else 1, 4, count=count, k=2)
    assert report.losses["balance"].item() == pytest.approx(wanted.item(), rel=1e-12)
    assert (report.metrics.counted_E is not None) == (scope == "global")
    report.losses["balance"].backward()
    assert weight.grad.abs().max() > 0


def test_global_balance_of_two_ranks_is_that_of_the_whole_batch():
    """The other rank's counts are added; the sum of both ranks' losses and gradients is the whole batch's."""
    moe = config("top2", num_experts=4, balance_scope="global", losses={"balance": 1.0})
    x_BSD = tokens(4, 6)
    report, weight = layer_losses(moe, x_BSD)
    report.losses["balance"].backward()
    total = torch.cat((report.metrics.counted_E, report.metrics.valid_tokens.view(1)))
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        part, part_weight = layer_losses(moe, x_BSD[half], sum_over_ranks=lambda _: total)
        part.losses["balance"].backward()
        parts.append((part.losses["balance"].item(), part_weight.grad))
    assert sum(part[0] for part in parts) == pytest.approx(report.losses["balance"].item(), rel=1e-13)
    close(parts[0][1] + parts[1][1], weight.grad, 1e-13)


def test_global_balance_knows_the_micro_batches_so_far():
    moe = config("top2", num_experts=4, balance_scope="global", losses={"balance": 1.0})
    x_BSD = tokens(4, 6)
    first, _ = layer_losses(moe, x_BSD[:2])
    ctx = context(x_BSD[2:])
    second, _ = layer_losses(moe, x_BSD[2:], ctx, earlier=first.metrics)
    whole, _ = layer_losses(moe, x_BSD)
    probs_TE = make_layer(moe).router(x_BSD[2:], ctx).probs_TE
    wanted = 4 * (whole.metrics.counted_E.double() / (24 * 2) * probs_TE.sum(0)).sum()
    assert second.losses["balance"].item() == pytest.approx(wanted.item(), rel=1e-13)


def skewed_and_even(experts, tokens_):
    """Everybody wants expert 0 most and its neighbours next, or everybody somebody else."""
    even = torch.zeros(tokens_, experts, dtype=torch.float64)
    for token in range(tokens_):
        for place in range(experts):
            even[token, (token + place) % experts] = 3.0 - place
    return even[:1].expand(tokens_, experts).clone(), even


@pytest.mark.parametrize(
    ("router", "loss"),
    [
        *((router, "balance") for router in ("gshard_all", "switch", "top2", "v2", "v3", "two_levels")),
        *((router, "importance") for router in ("noisy2", "vmoe2", "two_levels", "top2")),
        *((router, "load") for router in ("noisy1", "noisy2", "vmoe2", "two_levels")),
        *((router, "sequence_balance") for router in ("v3", "top2", "sigmoid1")),
        *((router, loss) for router in ("v2", "v3") for loss in ("device_balance", "communication_balance")),
    ],
)
def test_skewed_routing_costs_more_than_even_routing(router, loss):
    assert_skew_costs(config(router, num_experts=8, losses={loss: 1.0}), loss)


@pytest.mark.parametrize("scope", ["group", "sequence", "micro_batch", "global"])
def test_skew_costs_more_in_every_scope(scope):
    assert_skew_costs(config("top2", num_experts=8, losses={"balance": 1.0}, balance_scope=scope), "balance")


def assert_skew_costs(moe, loss):
    given = extras(moe, 16)
    calm = replace(
        given,
        bias_E=None if given.bias_E is None else torch.zeros(8).double(),
        noise_logits_TE=None if given.noise_logits_TE is None else torch.full((16, 8), -2.0).double(),
    )
    values = []
    for logits in skewed_and_even(8, 16):
        if calm.group_logits_TP is not None:
            groups = logits.view(16, 2, 4).amax(-1)
            calm = replace(calm, group_logits_TP=groups, group_noise_logits_TP=groups * 0 - 2.0)
        logits.requires_grad_()
        routed = route(moe, logits, [True] * 16, calm)
        plan = local_plan(routed, num_experts=8, group_size=16, capacity=DROPLESS)
        counts = {"global_count_E": plan.demand_GE.sum(0), "global_tokens": torch.tensor(16)}
        value = LOSSES[loss](moe, LossInputs(routing=routed, plan=plan, seq_len=16, **counts))
        values.append(value.item() / 16)
        value.backward()
        assert logits.grad.isfinite().all()
    skewed, even = values
    assert skewed > even + 0.1
    if "balance" in loss:
        assert even == pytest.approx(1.0, abs=0.35 if moe.router.name == "hierarchical" else 1e-9)


@pytest.mark.parametrize(("experts", "spread"), [(1, 0.0), (4, 0.0), (4, 1.0)])
def test_squared_variation(experts, spread):
    total_E = 3.0 + spread * torch.arange(experts, dtype=torch.float64)
    wanted = (total_E.var(unbiased=False) / total_E.mean() ** 2).item() if experts > 1 else 0.0
    assert squared_variation(total_E).item() == pytest.approx(wanted, abs=1e-9)


# ------------------------------------------------------------------------------------------- edge cases
def check_against_loops(moe, kind, num_tokens, group_size, names):
    """Values to 1e-12 and gradients against the oracle's loops, groups and sequences alike."""
    experts = moe.num_experts
    logits, valid = cases.logits_and_valid(kind, num_tokens, experts, seed=6)
    group_of = [t // group_size for t in range(num_tokens)]
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    given = extras(moe, num_tokens)
    routed = route(moe, mine, valid, given, group_size=group_size)
    plan = local_plan(routed, num_experts=experts, group_size=group_size, capacity=DROPLESS)
    inputs = LossInputs(routing=routed, plan=plan, seq_len=group_size)
    decision = oracle_decision(theirs, valid, moe, given, group_of=group_of)
    devices, limit = moe.router.expert_groups, min(moe.router.group_limit, moe.top_k)
    loops = {
        "sequence_balance": lambda: oracle.sequence_balance_loss(
            decision, group_of, num_tokens // group_size, experts, moe.top_k
        ),
        "device_balance": lambda: oracle.device_balance_loss(decision, experts, devices, moe.top_k),
        "communication_balance": lambda: oracle.communication_balance_loss(decision, experts, devices, limit),
        "batchwise_threshold": lambda: oracle.batchwise_threshold_loss(decision, experts),
    }
    for name in names:
        got, wanted = LOSSES[name](moe, inputs), loops[name]()
        assert got.dtype == torch.float64
        assert got.item() == pytest.approx(wanted.item(), rel=1e-12, abs=1e-12), name
        if not decision.probs:
            assert got.item() == 0.0
        (grad_TE,) = torch.autograd.grad(got, mine, retain_graph=True)
        expected_TE = torch.zeros_like(grad_TE)
        if wanted.requires_grad:
            (expected_TE,) = torch.autograd.grad(wanted, theirs, retain_graph=True)
        use_T = routed.valid_T
        assert ((grad_TE - expected_TE)[use_T].abs() <= 1e-11).all(), name
        assert (grad_TE[~use_T] == 0).all(), name


@pytest.mark.parametrize("kind", cases.KINDS)
def test_balance_of_groups_and_sequences_at_the_edges(kind):
    """Ties, padding, no token, one expert, every expert, and rows with NaN and infinities, of all of DeepSeek."""
    names = ("sequence_balance", "device_balance", "communication_balance")
    for num_tokens, experts, top_k, groups, kept in (
        (0, 4, 2, 2, 1),
        (1, 4, 2, 2, 1),
        (24, 4, 2, 2, 1),
        (24, 4, 4, 2, 2),  # k = E
        (24, 6, 3, 3, 2),
        (9, 1, 1, 1, 1),
    ):
        for score in ("softmax", "sigmoid"):
            router = {"name": "deepseek", "score": score, "num_groups": groups, "groups_kept": kept}
            moe = MoEConfig(num_experts=experts, top_k=top_k, router=router, losses={})
            check_against_loops(moe, kind, num_tokens, 8 if num_tokens == 24 else max(num_tokens, 1), names)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_thresholds_at_the_edges(kind):
    for num_tokens, experts, top_k in ((0, 4, 2), (1, 4, 2), (24, 4, 2), (24, 4, 4), (9, 1, 1)):
        moe = MoEConfig(num_experts=experts, top_k=top_k, router="strictly_balanced")
        group_size = 8 if num_tokens == 24 else max(num_tokens, 1)
        check_against_loops(moe, kind, num_tokens, group_size, ("batchwise_threshold",))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_every_expert_of_deepseeks(kind, score):
    """k = E: everybody goes everywhere that is open, weighted like the oracle's loop says."""
    for experts, groups in ((1, 1), (4, 2), (5, 1)):
        router = {"name": "deepseek", "score": score, "num_groups": groups}
        moe = MoEConfig(num_experts=experts, top_k=experts, router=router)
        logits, valid = cases.logits_and_valid(kind, 9, experts)
        given = extras(moe, 9)
        check_routing(route(moe, logits, valid, given), oracle_decision(logits, valid, moe, given), experts)
