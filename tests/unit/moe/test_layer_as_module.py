"""A layer as any other module: copied, saved, moved, made without memory, printed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from epmoe import ModuleExperts, MoEConfig, build_moe_layer
from epmoe.moe.experts import FFNExperts
from tests.unit.moe.helpers import ROUTERS, config, context, make_layer, tokens

BY_PICKLE = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),  # noqa: S301
    "torch.save": lambda layer: _through_a_file(layer),
}


def _through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("way", BY_PICKLE)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_copy_computes_the_same_and_is_trained_apart(router, way):
    layer = make_layer(config(router))
    again = BY_PICKLE[way](layer)
    x_BSD = tokens(2, 5)
    ctx = context(x_BSD)
    wanted, report = layer(x_BSD, ctx)
    y_BSD, told = again(x_BSD, ctx)
    assert torch.equal(y_BSD, wanted)
    assert {name: float(loss) for name, loss in told.losses.items()} == {
        name: float(loss) for name, loss in report.losses.items()
    }
    with torch.no_grad():
        next(again.parameters()).zero_()
    assert torch.equal(layer(x_BSD, ctx)[0], wanted)


class _Output(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x_BSD):
        return self.layer(x_BSD)[0]


EXPORTED = {
    "dropless": ("top2", {"capacity_factor_eval": None}, {}),
    "capacity": ("gshard_all", {"capacity_factor_eval": 0.7}, {}),
    "padded": ("top2", {"capacity_factor_eval": 0.7}, {"dispatcher": "padded"}),
    "bias": ("v3", {}, {}),
    "expert choice": ("expert_choice", {}, {}),
    "by thresholds": ("strict2", {}, {}),
    "soft": ("soft", {}, {}),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_it_can_be_exported_with_sizes_left_open(case):
    router, settings, more = EXPORTED[case]
    layer = build_moe_layer(config(router, **settings, **more), d_model=4, d_ff=3).double().eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        _Output(layer), (tokens(3, 6),), dynamic_shapes=({0: auto, 1: auto},), strict=False
    )
    for shape in ((3, 6), (5, 4)):
        x_BSD = tokens(*shape, seed=1)
        assert torch.equal(program.module()(x_BSD), layer(x_BSD)[0])


@pytest.mark.parametrize("router", ROUTERS)
def test_without_memory_at_first_a_layer_gets_its_weights_and_buffers(router):
    """``meta``, ``to_empty``, ``reset_parameters``: the way of large models."""
    moe = config(router)
    options = {"d_model": 4, "d_ff": 3, "vocab_size": 11, "seed": 7}
    with torch.device("meta"):
        layer = build_moe_layer(moe, **options)
    layer = layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(99)
    torch.manual_seed(3)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(3)
    wanted = build_moe_layer(moe, **options)
    torch.manual_seed(3)
    for module in wanted.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (name, tensor), (_, other) in zip(
        layer.state_dict().items(), wanted.state_dict().items(), strict=True
    ):
        assert torch.equal(tensor, other), name
        assert not (tensor == 99).any(), name


def test_ranks_with_the_same_seed_have_different_experts():
    whole = FFNExperts(4, 6, 5)
    torch.manual_seed(3)
    whole.reset_parameters()
    assert not torch.equal(whole.w_in[0], whole.w_in[1])
    for first in (0, 2):
        part = FFNExperts(4, 6, 5)
        part.keep(first, 2)
        torch.manual_seed(3)
        part.reset_parameters()
        assert torch.equal(part.w_in, whole.w_in[first : first + 2])
        assert torch.equal(part.w_out, whole.w_out[first : first + 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", ["to", "default"])
def test_what_an_optimizer_step_moves_a_little_stays_float32(dtype, by):
    moe = MoEConfig(num_experts=4, router="deepseek", top_k=2)
    if by == "default":
        torch.set_default_dtype(dtype)
    try:
        layer = build_moe_layer(moe, d_model=8, d_ff=12)
    finally:
        torch.set_default_dtype(torch.float32)
    layer.router.bias.fill_(0.3)
    layer.to(dtype)
    assert layer.router.weight.dtype == dtype
    assert layer.router.bias.dtype == torch.float32
    before = layer.router.bias.clone()
    assert torch.equal(before, torch.full((4,), 0.3)), "and not rounded on the way"
    layer.router.after_step(torch.tensor([9, 1, 1, 1]), 0)
    moved = (layer.router.bias - before).abs()
    assert torch.allclose(moved, torch.full((4,), layer.router.options.bias_rate), rtol=1e-3)
    assert layer.double().router.bias.dtype == torch.float64


def test_experts_come_from_anything_that_gives_modules_but_not_bare():
    moe = MoEConfig(num_experts=3, router="topk")
    made = ModuleExperts(nn.Linear(4, 4) for _ in range(3))
    assert made.num_local == 3
    for bare in ([nn.Linear(4, 4)] * 3, nn.ModuleList([nn.Linear(4, 4)] * 3)):
        with pytest.raises(ValueError, match=r"wrap the modules: ModuleExperts\(\[\.\.\.\]\)"):
            build_moe_layer(moe, d_model=4, experts=bare)


def test_a_printed_layer_says_its_sizes():
    text = str(
        build_moe_layer(MoEConfig(num_experts=4, router="switch", top_k=1), d_model=8, d_ff=12, layer=3)
    )
    assert "Router(switch, 4 experts, top_k=1, layer=3)" in text
    assert "FFNExperts(0 to 3 of 4 experts, D=8, F=12, swiglu)" in text


def test_which_experts_a_token_took():
    layer = make_layer(config("top2"))
    x_BSD = tokens(2, 5)
    routing = layer.route(x_BSD, context(x_BSD))
    logits_TE = x_BSD.flatten(0, 1) @ layer.router.weight.t()
    for t in range(10):
        taken = routing.expert_A[routing.active_A & (routing.token_A == t)]
        assert sorted(taken.tolist()) == sorted(logits_TE[t].topk(2).indices.tolist())
