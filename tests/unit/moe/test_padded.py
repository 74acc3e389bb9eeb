"""Padded dispatch and weights inside the experts: the same function as ragged dispatch, with static shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from epmoe.moe.build import build_moe_layer
from epmoe.moe.dispatch import PaddedDispatcher, _swap_blocks
from epmoe.moe.experts import ModuleExperts
from epmoe.ops import DROPLESS
from epmoe.ops.ffn import expert_ffn, expert_ffn_backward
from epmoe.types import Limits, TokenContext
from tests.unit.moe.helpers import ROUTERS, by_name, close, config, context, make_layer, tokens
from tests.unit.moe.test_host_copies import HostCopies

VARIANTS = [
    {"dispatcher": "padded", "save": "output"},
    {"dispatcher": "padded", "save": "hidden"},
    {"dispatcher": "local", "save": "hidden"},
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v['dispatcher']}-{v['save']}")


def module_experts(count: int) -> ModuleExperts:
    """Modules with biases, whose results for a row of zeros are not zero."""
    generator = torch.Generator().manual_seed(5)
    modules = [nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)) for _ in range(count)]
    for module in modules:
        for parameter in module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return ModuleExperts(modules)


def layer_of(moe, variant=None, *, modules=False):
    moe = moe.model_copy(update=variant or {"dispatcher": "local", "save": "output"})
    layer = make_layer(moe)
    if modules:
        router = layer.router
        layer = build_moe_layer(moe, d_model=4, experts=module_experts(moe.num_experts)).double()
        layer.router = router
    return layer


def outcome(layer, x_BSD, ctx):
    """Output, losses, metrics and every gradient, by name."""
    mine = x_BSD.clone().requires_grad_()
    layer.zero_grad()
    y_BSD, report = layer(mine, ctx)
    (y_BSD.square().sum() + sum(report.losses.values())).backward()
    gradients = {f"d_{name.removeprefix('_orig_mod.')}": p.grad for name, p in layer.named_parameters()}
    return {"y": y_BSD, "d_x": mine.grad, **gradients, **report.losses}, report.metrics


def assert_same_function(layer, other, x_BSD, ctx) -> dict[str, torch.Tensor]:
    """Equal to 1e-12 in all that both say; returns the metrics."""
    (got, metrics), (wanted, wanted_metrics) = outcome(layer, x_BSD, ctx), outcome(other, x_BSD, ctx)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            close(got[name], value.detach(), 1e-12)
    assert by_name(metrics).keys() == by_name(wanted_metrics).keys()
    for name, value in by_name(wanted_metrics).items():
        assert torch.equal(getattr(metrics, name), value), name
    return metrics


@every_variant
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router(name, variant):
    moe = config(name, num_experts=4, capacity_factor=0.7, min_capacity=0)
    x_BSD = tokens(2, 6)
    assert_same_function(layer_of(moe, variant), layer_of(moe), x_BSD, context(x_BSD, "some"))


CAPACITIES = {
    "overflow": {"capacity_factor": 0.3, "min_capacity": 1},
    "even": {"capacity_factor": 1.0, "min_capacity": 0},
    "more than anybody needs": {"capacity_factor": 8.0},
    "in blocks of 8, above the group": {"capacity_factor": 0.5, "capacity_multiple": 8},
    "per token": {"capacity_factor": 1.5, "capacity_unit": "per_token", "min_capacity": 0},
}


@every_variant
@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=CAPACITIES)
@pytest.mark.parametrize("group", ["sequence", "rank"])
@pytest.mark.parametrize("modules", [False, True])
def test_every_capacity_and_group(capacity, group, modules, variant):
    moe = config("gshard_random", num_experts=4, group=group, allow_non_causal=True, **capacity)
    layer, other = (layer_of(moe, v, modules=modules) for v in (variant, None))
    for shape, padding in (
        ((3, 5), "some"),
        ((1, 1), "none"),
        ((2, 4), "all"),
        ((0, 6), "none"),
        ((2, 0), "none"),
    ):
        x_BSD = tokens(*shape)
        metrics = assert_same_function(layer, other, x_BSD, context(x_BSD, padding))
        assert padding != "all" or metrics.kept_E.sum() == 0


@every_variant
@pytest.mark.parametrize("modules", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_everything_to_one_expert(activation, modules, variant):
    moe = config("top1", num_experts=3, capacity_factor=1.0, min_capacity=0, activation=activation)
    layer, other = (layer_of(moe, v, modules=modules) for v in (variant, None))
    x_BSD = tokens(2, 6)
    x_BSD[..., 0] = 1.0
    for each in (layer, other):
        with torch.no_grad():
            each.router.weight[1, 0] += 50.0
    metrics = assert_same_function(layer, other, x_BSD, context(x_BSD))
    assert metrics.demand_E.tolist() == [0, 12, 0]
    assert metrics.kept_E.tolist() == [0, 4, 0]


def test_one_expert():
    moe = config("top1", num_experts=1, capacity_factor=0.5, min_capacity=0)
    x_BSD = tokens(2, 6)
    for variant in VARIANTS:
        assert_same_function(layer_of(moe, variant), layer_of(moe), x_BSD, context(x_BSD))


@pytest.mark.parametrize("weigh_rows", [False, True])
def test_no_slots_at_all(weigh_rows):
    """A capacity of 0 drops everything; the router still learns from its losses, the experts get zeros."""
    layer = layer_of(config("top2", num_experts=4))
    dispatcher = PaddedDispatcher(None, weigh_rows=weigh_rows)
    x_TD = tokens(2, 6).flatten(0, 1).requires_grad_()
    routing = layer.router(x_TD.unflatten(0, (-1, 6)), TokenContext())
    batch, plan = dispatcher.dispatch(x_TD, routing, Limits(num_experts=4, group_size=6, capacity=0))
    assert batch.rows_RD.shape == (0, 4)
    y_TD = dispatcher.combine(layer.experts(batch), routing, plan)
    assert (y_TD == 0).all()
    assert plan.demand_GE.sum() == 24
    (y_TD.sum() + routing.logits_TE.sum()).backward()
    assert (layer.experts.w_in.grad == 0).all()
    assert layer.router.weight.grad.abs().max() > 0


def test_slots_are_where_the_plan_says():
    """Block of expert, then of group, then slots; unfilled ones are zero rows with weight 0."""
    moe = config("gshard_all", num_experts=3)
    layer = layer_of(moe)
    x_TD = tokens(2, 5).flatten(0, 1)
    routing = layer.router(x_TD.unflatten(0, (-1, 5)), TokenContext())
    dispatcher = PaddedDispatcher(None, weigh_rows=True)
    batch, plan = dispatcher.dispatch(x_TD, routing, Limits(num_experts=3, group_size=5, capacity=2))
    wanted_ND, weight_N = torch.zeros(3 * 2 * 2, 4).double(), torch.zeros(3 * 2 * 2).double()
    for a, slot in enumerate(plan.slot_A.tolist()):
        if slot >= 0:
            token, expert = int(routing.token_A[a]), int(routing.expert_A[a])
            row = (expert * 2 + token // 5) * 2 + slot
            wanted_ND[row], weight_N[row] = x_TD[token], routing.weight_A[a].detach()
    assert torch.equal(batch.rows_RD, wanted_ND)
    assert torch.equal(batch.weight_R, weight_N)
    assert batch.rows_per_expert == 4
    assert batch.tokens_per_expert_L.tolist() == [4, 4, 4]
    assert [part.rows_per_expert for part in plan.parts] == [4]


def test_blocks_change_places():
    """Two ranks, three experts, blocks of two rows: (a0 a1 a2) (b0 b1 b2) and (a0 b0) (a1 b1) (a2 b2)."""
    blocks = {
        name: [[10.0 * i], [10.0 * i + 1]] for i, name in enumerate(("a0", "a1", "a2", "b0", "b1", "b2"))
    }
    by_rank, by_expert = (
        torch.tensor([row for name in order.split() for row in blocks[name]])
        for order in ("a0 a1 a2 b0 b1 b2", "a0 b0 a1 b1 a2 b2")
    )
    assert torch.equal(_swap_blocks(by_rank, 2, 3), by_expert)
    assert torch.equal(_swap_blocks(by_expert, 3, 2), by_rank)
    assert _swap_blocks(torch.zeros(0, 4), 2, 3).shape == (0, 4)


@pytest.mark.parametrize("save", ["output", "hidden"])
def test_passes_without_capacity_are_ragged(save):
    moe = config("switch", num_experts=4, capacity_factor=0.5, min_capacity=0)
    layer, other = layer_of(moe, {"dispatcher": "padded", "save": save}).eval(), layer_of(moe).eval()
    x_BSD = tokens(2, 7)
    metrics = assert_same_function(layer, other, x_BSD, context(x_BSD, "some"))
    assert torch.equal(metrics.kept_E, metrics.demand_E)
    routing = layer.router(x_BSD, TokenContext())
    for capacity, padded in ((DROPLESS, False), (3, True)):
        batch, _ = layer.dispatcher.dispatch(
            x_BSD.flatten(0, 1), routing, Limits(num_experts=4, group_size=7, capacity=capacity)
        )
        assert (batch.rows_per_expert is not None) == padded
    limited = moe.model_copy(update={"capacity_factor_eval": 0.5})
    layer, other = layer_of(limited, {"dispatcher": "padded", "save": save}).eval(), layer_of(limited).eval()
    metrics = assert_same_function(layer, other, x_BSD, context(x_BSD))
    assert metrics.kept_E.sum() < metrics.demand_E.sum()


@every_variant
@pytest.mark.parametrize("modules", [False, True])
def test_low_precision(variant, modules):
    """Near the ragged layer in bfloat16, and under autocast; with ``hidden`` the weight is applied before rounding."""
    moe = config("gshard_all", num_experts=4, capacity_factor=0.8)
    layer, other = (layer_of(moe, v, modules=modules).to(torch.bfloat16) for v in (variant, None))
    x_BSD = tokens(2, 8).to(torch.bfloat16)
    (got, _), (wanted, _) = outcome(layer, x_BSD, context(x_BSD)), outcome(other, x_BSD, context(x_BSD))
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype
        close(got[name], wanted[name].detach().double(), 24 * torch.finfo(torch.bfloat16).eps)
    layer, other = layer.float(), other.float()
    with torch.autocast("cpu", torch.bfloat16):
        close(layer(x_BSD.float(), context(x_BSD))[0], other(x_BSD.float(), context(x_BSD))[0].double(), 0.1)


# ------------------------------------------------------------------------- nothing waits for the device
def fake_outcome(layer, x_BSD, ctx):
    """Forward and backward with tensors that have no content: whatever asks for one raises."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, mode.from_tensor(parameter))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, mode.from_tensor(buffer))
        fields = {field.name: getattr(ctx, field.name) for field in dataclasses.fields(ctx)}
        given = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        outcome(layer, mode.from_tensor(x_BSD), TokenContext(**given))


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "base"])
def test_no_content_decides_anything(name):
    """Routing, dispatch, experts, combine, losses, metrics and the whole backward pass. Only BASE's exact assignment is
    solved on the host."""
    moe = config(name, num_experts=4, capacity_factor=0.7)
    x_BSD = tokens(2, 6)
    fake_outcome(layer_of(moe, VARIANTS[0]), x_BSD, context(x_BSD, "some"))


@pytest.mark.parametrize("modules", [False, True])
def test_nor_with_weights_inside_the_experts(modules):
    x_BSD = tokens(2, 6)
    layer = layer_of(config("gshard_random", num_experts=4), VARIANTS[1], modules=modules)
    fake_outcome(layer, x_BSD, context(x_BSD, "some"))


def test_the_ragged_layer_does_ask():
    x_BSD = tokens(2, 6)
    with pytest.raises(DataDependentOutputException):
        fake_outcome(layer_of(config("top2", num_experts=4)), x_BSD, context(x_BSD))


@pytest.mark.parametrize("save", ["output", "hidden"])
def test_the_host_reads_nothing_in_either_pass(save):
    layer = layer_of(config("gshard_random", num_experts=4), {"dispatcher": "padded", "save": save})
    x_BSD = tokens(2, 6)
    with HostCopies() as copies:
        outcome(layer, x_BSD, context(x_BSD))
    assert copies.calls == []


def test_neither_do_the_experts_inside():
    rows_RD, weights = torch.randn(6, 4), (torch.randn(3, 4, 10), torch.randn(3, 5, 4))
    with HostCopies() as copies:
        given = (rows_RD, torch.randn(6), *weights, torch.tensor([2, 2, 2]), 2)
        y_RD, hidden_RX = expert_ffn(*given, "swiglu")
        expert_ffn_backward(y_RD, *given, hidden_RX, "swiglu", True, True, True)
    assert copies.calls == []


# ------------------------------------------------------------------------------------------- compiling
SAME, OTHER = ((2, 6), (2, 6)), ((2, 6), (2, 6), (3, 9), (5, 7))
"""Shapes of batches one after the other."""


def compiled_equals_eager(backend, shapes, ways=(("sequence", "output"), ("rank", "hidden"))):
    """One graph forward, one backward. Another batch of the same shape does not compile again; the first one of another
    shape does, with sizes left open, and then no other."""
    for group, save in ways:
        moe = config("gshard_random", num_experts=4, capacity_factor=0.7, group=group, allow_non_causal=True)
        layer = layer_of(moe, {"dispatcher": "padded", "save": save})
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for seed, shape in enumerate(shapes):
            x_BSD = tokens(*shape, seed=seed)
            with torch.compiler.set_stance("fail_on_recompile" if seed % 2 else "default"):
                assert_same_function(compiled, layer, x_BSD, context(x_BSD, "some"))


def test_compiles_in_one_piece():
    compiled_equals_eager("aot_eager", SAME)


def test_graphs_hold_for_other_shapes():
    compiled_equals_eager("eager", OTHER, [("rank", "hidden")])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "backend",
    [pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.long)],
)
def test_compiles_in_one_piece_with_open_sizes(backend):
    compiled_equals_eager(backend, OTHER)
