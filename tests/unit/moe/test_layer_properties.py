"""What must hold for every router: invariances, precision, gradients to the router, repeatable draws."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from epmoe.comm.exchange import flat
from epmoe.moe.build import build_moe_layer
from epmoe.moe.dispatch import AllToAllDispatcher
from epmoe.moe.routers import common
from epmoe.types import Limits, TokenContext
from tests.unit.moe.helpers import (
    EVERY,
    NEW_NAMES,
    ROUTERS,
    by_name,
    close,
    config,
    context,
    draws_by_expert,
    make_layer,
    needs,
    oracle_layer,
    renamed,
    tokens,
)

SOME = ["gshard_random", "switch", "top2"]


def decisions(layer, x_BSD, ctx):
    """Per sequence: (position, choice, expert, slot) of every kept assignment; none where nothing is chosen."""
    seq_len = x_BSD.shape[1]
    if layer.moe.router.no_capacity:
        return [[] for _ in x_BSD]
    routing = layer.router(
        x_BSD, ctx, Limits(num_experts=layer.moe.num_experts, group_size=seq_len, capacity=-1)
    )
    _, plan = layer.dispatcher.dispatch(
        x_BSD.flatten(0, 1),
        routing,
        Limits(num_experts=layer.moe.num_experts, group_size=seq_len, capacity=3),
    )
    found = [[] for _ in range(x_BSD.shape[0])]
    for a in plan.assignment_N.tolist():
        token = int(routing.token_A[a])
        found[token // seq_len].append(
            (token % seq_len, int(routing.choice_A[a]), int(routing.expert_A[a]), int(plan.slot_A[a]))
        )
    return found


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(ROUTERS)),
    order=st.sampled_from(["choice_major", "token_major"]),
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 9)),
    factor=st.sampled_from([None, 0.3, 1.0, 2.0]),
)
def test_bookkeeping(name, order, seed, shape, factor):
    moe = config(name, slot_order=order, num_experts=4, capacity_factor=factor, min_capacity=0)
    layer = make_layer(moe)
    x_BSD = tokens(*shape, seed=seed)
    routing = layer.router(
        x_BSD,
        context(x_BSD, "some"),
        Limits(num_experts=layer.moe.num_experts, group_size=shape[1], capacity=-1),
    )
    slots = shape[1] if factor is None else max(1, round(shape[1] * factor / 4 + 0.499))
    _, plan = layer.dispatcher.dispatch(
        x_BSD.flatten(0, 1), routing, Limits(num_experts=4, group_size=shape[1], capacity=slots)
    )
    entries = plan.assignment_N
    group = routing.token_A[entries] // shape[1]
    places = list(
        zip(group.tolist(), routing.expert_A[entries].tolist(), plan.slot_A[entries].tolist(), strict=True)
    )
    assert len(set(places)) == len(places), "no slot is given twice"
    assert all(0 <= slot < slots for _, _, slot in places)
    kept_GE = torch.zeros_like(plan.demand_GE)
    for g, e, _ in places:
        kept_GE[g, e] += 1
    assert torch.equal(kept_GE, plan.demand_GE.clamp(max=slots))
    assert torch.equal(kept_GE.sum(0), plan.tokens_per_expert_E)
    sums = torch.zeros(x_BSD.shape[0] * shape[1], dtype=torch.float64)
    sums.index_add_(0, routing.token_A[entries], routing.weight_A[entries].detach())
    assert (sums <= getattr(moe.router, "scale", 1.0) + 1e-12).all()
    if name in ("gshard_all", "top2", "top1_normalized"):
        count = torch.bincount(plan.token_N, minlength=sums.numel())
        full = count == layer.moe.top_k
        assert torch.allclose(sums[full], torch.ones_like(sums[full]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_sequences_are_independent_of_the_batch_around_them(name):
    """Order, micro-batches and neighbours change neither draws nor drops nor values."""
    moe = config(name, num_experts=4, capacity_factor=0.8, min_capacity=0)
    layer = make_layer(moe)
    x_BSD = tokens(4, 6)
    known = replace(context(x_BSD), sample_B=torch.tensor([5, 2**34 + 1, 7, 0]))
    y_BSD, report = layer(x_BSD, known)
    whole = decisions(layer, x_BSD, known)
    order = torch.tensor([2, 0, 3, 1])
    ctx = tree_map(lambda known_BX: known_BX[order], known)
    assert decisions(layer, x_BSD[order], ctx) == [whole[i] for i in order.tolist()]
    close(layer(x_BSD[order], ctx)[0], y_BSD[order].detach(), 1e-14)
    parts = [
        layer(x_BSD[i : i + 2], tree_map(lambda known_BX, i=i: known_BX[i : i + 2], known)) for i in (0, 2)
    ]
    close(torch.cat([part[0] for part in parts]), y_BSD.detach(), 1e-14)
    for key, total in by_name(report.metrics).items():
        assert torch.allclose(
            sum(getattr(part[1].metrics, key) for part in parts).double(), total.double(), rtol=1e-14
        )
    # The others want balance inside each micro-batch.
    for key in {"balance", "z", "sequence_balance", "batchwise_threshold"} & report.losses.keys():
        total = report.losses[key].item()
        assert sum(part[1].losses[key] for part in parts).item() == pytest.approx(total, rel=1e-13)


@pytest.mark.parametrize("name", ["gshard_random", "switch"])
def test_other_samples_other_draws(name):
    layer = make_layer(config(name, num_experts=4, capacity_factor=None))
    x_BSD = tokens(1, 64).expand(2, 64, 4)
    y_BSD, _ = layer(x_BSD, TokenContext(sample_B=torch.tensor([1, 2])))
    assert not torch.equal(y_BSD[0], y_BSD[1])
    same, _ = layer(x_BSD, TokenContext(sample_B=torch.tensor([1, 1])))
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("name", ROUTERS)
def test_dropless_equals_ample_capacity(name):
    x_BSD = tokens(2, 9)
    results = []
    for factor in (None, 8.0):
        y_BSD, report = make_layer(config(name, num_experts=4, capacity_factor=factor))(x_BSD, context(x_BSD))
        results.append((y_BSD, *report.losses.values(), *by_name(report.metrics).values()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", EVERY)
def test_padding_appended_changes_nothing(name):
    """Padding after the tokens of a sequence (no capacity), and whole sequences of padding (with)."""
    x_BSD = tokens(2, 6)
    rubbish = 100.0 * tokens(2, 3, seed=9)
    for factor, longer, valid in (
        (None, torch.cat([x_BSD, rubbish], 1), torch.arange(9).expand(2, 9) < 6),
        (0.8, torch.cat([x_BSD, x_BSD]), torch.arange(4).unsqueeze(1).expand(4, 6) < 2),
    ):
        layer = make_layer(config(name, num_experts=4, capacity_factor=factor, min_capacity=0))
        wanted, before = layer(x_BSD, context(x_BSD))
        got, after = layer(longer, replace(context(longer), valid_BS=valid))
        close(got[:2, :6], wanted.detach(), 1e-14)
        assert (got[~valid] == 0).all()
        for one, other in ((before.losses, after.losses), (by_name(before.metrics), by_name(after.metrics))):
            for key in one:
                assert torch.allclose(one[key].double(), other[key].double(), rtol=1e-13)


# Not hash without a table, where the name of the expert is the id modulo E.
@pytest.mark.parametrize("name", sorted(set(EVERY) - {"hash"}))
def test_renaming_experts_changes_only_names(name):
    moe = config(name, num_experts=8, capacity_factor=0.7, capacity_factor_eval=0.7, min_capacity=0)
    layer, other = make_layer(moe), make_layer(moe)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.copy_(renamed(tensor))
    x_BSD = tokens(2, 8)
    # Random numbers of an expert stay with its place, so that routers that draw them are compared without.
    (y_BSD, report), (y2_BSD, report2) = (
        each.train(not draws_by_expert(moe))(x_BSD, context(x_BSD)) for each in (layer, other)
    )
    close(y2_BSD, y_BSD.detach(), 1e-13)
    for key in ("demand_E", "kept_E"):
        assert torch.equal(getattr(report2.metrics, key), getattr(report.metrics, key)[NEW_NAMES])
    for key in report.losses:
        assert report2.losses[key].item() == pytest.approx(report.losses[key].item(), rel=1e-12)


# Not where every weight is 1.
CONSTANT = {"top1_normalized", "noisy1_normalized", "hash", "hash_table", "dense_pick"}


@pytest.mark.parametrize("name", sorted(set(EVERY) - CONSTANT))
def test_the_task_alone_trains_the_router(name):
    layer = make_layer(config(name, num_experts=4, losses={}))
    x_BSD = tokens(2, 8)
    y_BSD, report = layer(x_BSD, context(x_BSD))
    assert report.losses == {}
    y_BSD.square().sum().backward()
    (first, *_) = layer.router.parameters()
    assert first.grad.abs().max() > 1e-3


def test_jitter_reaches_the_router_only():
    """The experts must see the clean input, and evaluation must not jitter at all."""
    layer = make_layer(config("switch", num_experts=1, capacity_factor=None))
    x_BSD = tokens(1, 5)
    trained, _ = layer(x_BSD, context(x_BSD))
    evaluated, _ = layer.eval()(x_BSD, context(x_BSD))
    assert torch.equal(trained, evaluated), "one expert: the weight is 1 whatever the router saw"
    layer = make_layer(config("switch", num_experts=4, capacity_factor=None))
    plain = make_layer(config("top1", num_experts=4, capacity_factor=None))
    close(layer.eval()(x_BSD)[0], plain(x_BSD)[0].detach(), 1e-15)


class NoFloat32(TorchDispatchMode):
    """Fails on every operation that makes a floating tensor other than float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
                raise AssertionError(f"{func} made {leaf.dtype}")
        return result


@pytest.mark.parametrize("name", EVERY)
def test_float64_stays_float64(name):
    """In evaluation for routers that draw random numbers, which are float32."""
    moe = config(name, num_experts=4, capacity_factor=0.7, min_capacity=0)
    drawn = {"uniform", "order"} & needs(moe) or moe.router.jitter or draws_by_expert(moe)
    layer = make_layer(moe).train(not drawn)
    x_BSD = tokens(2, 6).requires_grad_()
    with NoFloat32():
        y_BSD, report = layer(x_BSD, context(x_BSD, "some"))
        (y_BSD.square().sum() + sum(report.losses.values())).backward()
    assert report.metrics.entropy.dtype == torch.float64


def test_the_watchdog_bites():
    with NoFloat32(), pytest.raises(AssertionError, match="float32"):
        torch.ones(2, dtype=torch.float64).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SOME)
def test_low_precision(name, dtype):
    """Decisions and losses at float32 accuracy whatever the input, output at the input's."""
    moe = config(name, num_experts=4, capacity_factor=1.0)
    layer = make_layer(moe, scale=0.7).to(dtype)
    x_BSD = tokens(2, 8).to(dtype).requires_grad_()
    ctx = context(x_BSD, "some")
    y_BSD, report = layer(x_BSD, ctx)
    weights = {key: p.detach().double().requires_grad_() for key, p in layer.named_parameters()}
    x2_BSD = x_BSD.detach().double().requires_grad_()
    result = oracle_layer(x2_BSD, weights, moe, ctx)
    assert y_BSD.dtype == dtype
    assert report.metrics.demand_E.tolist() == result.metrics["demand_E"]
    assert report.metrics.kept_E.tolist() == result.metrics["kept_E"]
    assert all(loss.dtype == torch.float32 for loss in report.losses.values())
    for key, loss in report.losses.items():
        assert loss.item() == pytest.approx(result.losses[key].item(), rel=2e-5, abs=2e-6)
    tolerance = 12 * torch.finfo(dtype).eps
    close(y_BSD.flatten(0, 1), result.y_TD, tolerance)
    y_BSD.double().square().sum().backward()
    result.y_TD.square().sum().backward()
    close(x_BSD.grad, x2_BSD.grad, 4 * tolerance)
    for key, parameter in layer.named_parameters():
        assert parameter.grad.dtype == dtype
        wanted = weights[key].grad
        close(parameter.grad, wanted, 4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SOME)
def test_autocast_leaves_the_router_alone(name, dtype):
    layer = make_layer(config(name, num_experts=4, capacity_factor=1.0)).float()
    x_BSD = tokens(2, 8).float()
    results = []
    for mode in (nullcontext(), torch.autocast("cpu", dtype)):
        layer.zero_grad()
        with mode:
            routing = layer.router(x_BSD, context(x_BSD))
            y_BSD, report = layer(x_BSD, context(x_BSD))
        assert routing.weight_A.dtype == routing.probs_TE.dtype == routing.logits_TE.dtype == torch.float32
        assert y_BSD.dtype == torch.float32
        y_BSD.square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
        results.append((routing, y_BSD, report, layer.router.weight.grad.double()))
    (plain, y1, report1, grad1), (auto, y2, report2, grad2) = results
    for field in ("logits_TE", "probs_TE", "weight_A", "expert_A", "active_A"):
        assert torch.equal(getattr(plain, field), getattr(auto, field))
    for key, loss in report1.losses.items():
        assert torch.equal(loss, report2.losses[key])
        assert report2.losses[key].dtype == torch.float32
    assert not torch.equal(y1, y2), "the experts did run in low precision"
    close(y2, y1.double(), 16 * torch.finfo(dtype).eps)
    close(grad2, grad1, 32 * torch.finfo(dtype).eps)


def test_large_float32_logits_do_not_overflow():
    layer = make_layer(config("top2", num_experts=4, capacity_factor=None)).float()
    x_BSD = (tokens(1, 8) * 1e4).float().requires_grad_()
    y_BSD, report = layer(x_BSD, context(x_BSD))
    assert y_BSD.isfinite().all()
    assert all(loss.isfinite() for loss in report.losses.values())
    y_BSD.sum().backward()
    assert layer.router.weight.grad.isfinite().all()


def test_all_to_all_over_one_rank_equals_local(one_rank_group):
    for name in SOME:
        for shape in ((2, 6), (0, 6)):
            moe = config(name, num_experts=4, capacity_factor=0.8, min_capacity=0)
            x_BSD = tokens(*shape)
            results = []
            for dispatcher in (None, AllToAllDispatcher(flat(one_rank_group))):
                layer = make_layer(moe)
                layer.dispatcher = dispatcher or layer.dispatcher
                mine = x_BSD.clone().requires_grad_()
                y_BSD, report = layer(mine, context(x_BSD))
                (y_BSD.square().sum() + sum(report.losses.values())).backward()
                grads = [parameter.grad for parameter in layer.parameters()]
                results.append(
                    [y_BSD, mine.grad, *grads, *report.losses.values(), *by_name(report.metrics).values()]
                )
            for one, other in zip(*results, strict=True):
                assert torch.equal(one, other)


def test_parameter_names_and_the_same_answer_twice():
    moe = config("gshard_random", num_experts=4)
    layer = make_layer(moe)
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {"router.weight": (4, 4), "experts.w_in": (4, 4, 6), "experts.w_out": (4, 3, 4)}
    x_BSD = tokens(2, 6)
    before = x_BSD.clone()
    first, second = (layer(x_BSD, context(x_BSD)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(x_BSD, before), "the input is not written to"
    other = build_moe_layer(moe, d_model=4, d_ff=3, layer=1, seed=1).double()
    other.load_state_dict(layer.state_dict())
    assert not torch.equal(other(x_BSD, context(x_BSD))[0], first[0]), "seed and layer are part of every draw"


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_entropy_of_an_undecided_router(experts):
    layer = make_layer(config("top1", num_experts=experts))
    with torch.no_grad():
        layer.router.weight.zero_()
    x_BSD = tokens(1, 5)
    assert layer(x_BSD)[1].metrics.entropy.item() == pytest.approx(5 * math.log(experts), abs=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_recomputed_activations_give_the_same_gradients(name):
    layer = make_layer(config(name, num_experts=4, capacity_factor=0.8, min_capacity=0))
    grads = []
    for run in (layer, lambda x, ctx: checkpoint(layer, x, ctx, use_reentrant=False)):
        layer.zero_grad()
        x_BSD = tokens(2, 8).requires_grad_()
        y_BSD, report = run(x_BSD, context(x_BSD))
        (y_BSD.square().sum() + sum(report.losses.values())).backward()
        grads.append([x_BSD.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_strided_input():
    """A transposed batch, as some models keep it."""
    layer = make_layer(config("top2", num_experts=4))
    x_BSD = tokens(5, 3)
    flipped = x_BSD.transpose(0, 1).contiguous().transpose(0, 1)
    assert not flipped.is_contiguous()
    assert torch.equal(layer(flipped)[0], layer(x_BSD)[0])


@pytest.mark.parametrize("padding", ["none", "some"])
@pytest.mark.parametrize("name", SOME)
def test_masking_where_nothing_is_broken_changes_no_bit(name, padding, monkeypatch):
    def results():
        layer, x_BSD = make_layer(config(name, num_experts=4)), tokens(2, 6).requires_grad_()
        y_BSD, report = layer(x_BSD, context(x_BSD, padding))
        (y_BSD.square().sum() + sum(report.losses.values())).backward()
        gradients = [parameter.grad for parameter in layer.parameters()]
        return [y_BSD, x_BSD.grad, *gradients, *report.losses.values(), *by_name(report.metrics).values()]

    looked = results()
    monkeypatch.setattr(common, "at_hand", lambda values: False)  # as on a device
    for ours, theirs in zip(looked, results(), strict=True):
        assert torch.equal(ours, theirs)
