"""The whole layer against the oracle: output, losses, metrics and every gradient, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epmoe.types import Limits, TokenContext
from tests.unit.moe.helpers import ROUTERS, by_name, close, config, context, make_layer, oracle_layer, tokens

BREAKABLE = ("gshard_random", "switch", "top2", "noisy2", "two_levels", "v3", "expert_choice", "base", "sinkhorn1",
             "strict2", "hash_table", "sentence", "task", "dense_groups")  # fmt: skip
COUNTS = ("demand_E", "kept_E", "assignments", "overflow_tokens", "valid_tokens", "nonfinite_tokens")


def compare(moe, x_BSD, ctx):
    """Runs both sides and compares everything."""
    layer = make_layer(moe)
    mine = x_BSD.clone().requires_grad_()
    theirs = x_BSD.clone().requires_grad_()
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    weights = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for name, tensor in tensors
    }
    y_BSD, report = layer(mine, ctx)
    result = oracle_layer(theirs, weights, moe, ctx)
    close(y_BSD.flatten(0, 1), result.y_TD.nan_to_num(), 1e-12)
    assert set(by_name(report.metrics)) == set(result.metrics)
    for name in COUNTS:
        assert getattr(report.metrics, name).tolist() == result.metrics[name], name
        assert getattr(report.metrics, name).dtype == torch.int64
    assert report.metrics.entropy.item() == pytest.approx(result.metrics["entropy"], rel=1e-12, abs=1e-12)
    assert not any(metric.requires_grad for metric in by_name(report.metrics).values())
    assert set(report.losses) == set(moe.losses)
    for name, loss in report.losses.items():
        assert loss.item() == pytest.approx(result.losses[name].item(), rel=1e-12, abs=1e-12), name
    upstream = torch.randn(y_BSD.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weighted = {"balance": 0.7, "z": 0.3, "importance": 0.5, "load": 0.2, "sequence_balance": 0.4,
                "device_balance": 0.6, "communication_balance": 0.8, "batchwise_threshold": 0.9}  # fmt: skip
    total = (y_BSD * upstream).sum()
    (total + sum(weighted[name] * loss for name, loss in report.losses.items())).backward()
    total = (result.y_TD * upstream.flatten(0, 1)).sum() + theirs.sum() * 0
    (total + sum(weighted[name] * result.losses[name] for name in report.losses)).backward()
    close(mine.grad, theirs.grad, 1e-10)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        wanted = weights[name].grad
        close(parameter.grad, torch.zeros_like(parameter) if wanted is None else wanted, 1e-10)
    return result


@pytest.mark.parametrize("slot_order", ["choice_major", "token_major"])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name, slot_order):
    experts = {"two_levels_wide": 8, "v3": 8, "two_levels": 4, "v2": 4, "dense_groups": 4}.get(name, 5)
    factor = 0.3 if name in ("expert_choice", "choice_smooth", "strict2") else 0.5  # these spread evenly
    moe = config(name, slot_order=slot_order, num_experts=experts, capacity_factor=factor, min_capacity=0)
    x_BSD = tokens(3, 7)
    result = compare(moe, x_BSD, context(x_BSD, "some"))
    assert result.metrics["kept_E"] != result.metrics["demand_E"], "the case drops something"


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("capacity_factor", [None, 0.3, 1.25])
def test_activations_and_capacities(activation, capacity_factor):
    moe = config(
        "gshard_random", num_experts=4, capacity_factor=capacity_factor, activation=activation, min_capacity=0
    )
    x_BSD = tokens(2, 8, seed=1)
    compare(moe, x_BSD, context(x_BSD))


@pytest.mark.parametrize("name", ["gshard_random", "switch", "top1", "top2"])
@pytest.mark.parametrize(
    ("shape", "padding"),
    [((1, 1), "none"), ((1, 7), "all"), ((2, 32), "some")],
)
def test_batches(name, shape, padding):
    moe = config(name, num_experts=8, capacity_factor=1.0, min_capacity=1)
    x_BSD = tokens(*shape, seed=2)
    result = compare(moe, x_BSD, context(x_BSD, padding))
    if padding == "all":
        assert result.metrics["valid_tokens"] == 0


@pytest.mark.parametrize(
    ("name", "experts", "top_k"),
    [
        ("switch", 1, 1),
        ("top2", 1, 1),
        ("gshard_all", 2, 2),
        ("top2", 5, 5),
        ("dense", 1, 1),
        ("dense", 5, 5),
    ],
)
def test_few_experts(name, experts, top_k):
    moe = config(name, num_experts=experts, top_k=top_k, capacity_factor=1.0)
    x_BSD = tokens(2, 5, seed=3)
    compare(moe, x_BSD, context(x_BSD))


@pytest.mark.parametrize("fields", [{"group": "rank"}, {"balance_count": "all"}, {"balance_count": "top1"}])
@pytest.mark.parametrize("name", ["gshard_threshold", "top2"])
def test_groups_and_counts(name, fields):
    moe = config(name, num_experts=4, capacity_factor=0.7, min_capacity=0, **fields)
    x_BSD = tokens(3, 6, seed=4)
    compare(moe, x_BSD, context(x_BSD, "some"))


@pytest.mark.parametrize("name", ["gshard_all", "switch"])
def test_everybody_wants_the_same_expert(name):
    moe = config(name, num_experts=4, capacity_factor=1.0, min_capacity=0)
    x_BSD = tokens(1, 16, seed=5)[:, :1].expand(1, 16, 4).clone()
    x_BSD += 1e-3 * tokens(1, 16, seed=6)
    result = compare(moe, x_BSD, context(x_BSD))
    if name == "gshard_all":
        assert max(result.metrics["demand_E"]) == 16


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("group", ["sequence", "rank"])
@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens(name, group, shape):
    moe = config(name, num_experts=4, group=group)
    layer = make_layer(moe)
    x_BSD = torch.zeros(*shape, 4, dtype=torch.float64, requires_grad=True)
    y_BSD, report = layer(x_BSD, context(x_BSD))
    assert y_BSD.shape == x_BSD.shape
    assert report.losses.keys() == moe.losses.keys()
    assert all(loss.item() == 0.0 for loss in report.losses.values())
    (y_BSD.sum() + sum(report.losses.values())).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all()
    assert report.metrics.demand_E.tolist() == [0] * 4
    assert report.metrics.valid_tokens.item() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BREAKABLE)
def test_a_broken_token_hurts_nobody_else(name, value):
    """It counts as padding: the others' output, losses and counts are those of a batch where it is padding."""
    moe = config(name, num_experts=4, capacity_factor=1.0, min_capacity=0)
    layer = make_layer(moe)
    x_BSD = tokens(2, 6, seed=7)
    ctx = context(x_BSD)
    valid_BS = torch.ones(2, 6, dtype=torch.bool)
    valid_BS[0, 2] = False
    padded = replace(ctx, valid_BS=valid_BS)
    wanted, wanted_report = layer(x_BSD, padded)
    broken = x_BSD.clone()
    broken[0, 2] = value
    broken.requires_grad_()
    y_BSD, report = layer(broken, ctx)
    assert torch.equal(y_BSD, wanted)
    assert (y_BSD[0, 2] == 0).all()
    assert report.metrics.nonfinite_tokens.item() == 1
    assert wanted_report.metrics.nonfinite_tokens.item() == 0
    for name in ("demand_E", "kept_E", "valid_tokens", "overflow_tokens", "entropy"):
        assert torch.equal(getattr(report.metrics, name), getattr(wanted_report.metrics, name))
    for name, loss in report.losses.items():
        assert loss.item() == wanted_report.losses[name].item()
    wanted.square().sum().add(sum(wanted_report.losses.values())).backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    y_BSD.square().sum().add(sum(report.losses.values())).backward()
    assert (broken.grad[0, 2] == 0).all()
    assert broken.grad.isfinite().all()
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert layer(broken, padded)[1].metrics.nonfinite_tokens.item() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_broken_number_breaks_its_token_only(value):
    """Whatever the router's weights make of it: here -inf alone would only say that no expert is available."""
    layer = make_layer(config("top2", num_experts=4))
    with torch.no_grad():
        layer.router.weight.abs_()
    x_BSD = tokens(1, 4)
    x_BSD[0, 1, 3] = value
    y_BSD, report = layer(x_BSD)
    assert report.metrics.nonfinite_tokens.item() == 1
    assert report.metrics.valid_tokens.item() == 3
    (y_BSD.sum() + sum(report.losses.values())).backward()
    assert layer.router.weight.grad.isfinite().all()
    assert layer.router.weight.grad.abs().max() > 0


def test_capacity_zero_drops_everything():
    moe = config("gshard_all", num_experts=4)
    layer = make_layer(moe)
    x_TD = tokens(1, 6)[0].requires_grad_()
    routing = layer.router(x_TD.unflatten(0, (-1, 6)), TokenContext())
    batch, plan = layer.dispatcher.dispatch(x_TD, routing, Limits(num_experts=4, group_size=6, capacity=0))
    y_TD = layer.dispatcher.combine(layer.experts(batch), routing, plan)
    assert (y_TD == 0).all()
    metrics = layer.report(routing, plan, 6).metrics
    assert metrics.overflow_tokens.item() == 6
    assert metrics.assignments.item() == 12
    y_TD.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())


def test_random_policy_without_sample_numbers_names_the_argument():
    x_BSD = tokens(1, 4)
    for name in ("gshard_random", "switch"):
        layer = make_layer(config(name, num_experts=4))
        with pytest.raises(ValueError, match="sample_B"):
            layer(x_BSD)
        with pytest.raises(ValueError, match="sample_B"):
            layer(x_BSD, TokenContext(valid_BS=torch.ones(1, 4, dtype=torch.bool)))
        layer.eval()(x_BSD)  # evaluation draws nothing


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"(?s)importanse.*balance"):
        make_layer(config("top2", losses={"importanse": 1.0}))
