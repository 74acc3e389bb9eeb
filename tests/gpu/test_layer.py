"""A layer with padded dispatch on a GPU: the function of the CPU, nothing for the host to wait for, one CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch

from epmoe import ops

pytest.importorskip("pydantic", reason="configurations need pydantic")

from epmoe.config import MoEConfig
from epmoe.moe.build import build_moe_layer
from epmoe.types import TokenContext
from tests.unit.ops.twins import SEED, randn

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU", allow_module_level=True)
if "CUDA" not in ops.kernel_status()[1]:
    pytest.skip(f"no CUDA kernels: {ops.kernel_status()[1]}", allow_module_level=True)

both_saves = pytest.mark.parametrize("save", ["output", "hidden"])


def make_layer(save, dtype=torch.float32):
    torch.manual_seed(SEED)
    moe = MoEConfig(
        num_experts=8,
        router="gshard_top2",
        dispatcher="padded",
        capacity_factor=1.0,
        save=save,
        min_capacity=1,
    )
    return build_moe_layer(moe, d_model=64, d_ff=128).to(dtype)


def make_tokens(number, device, dtype=torch.float32):
    x_BSD = randn(number, 4, 32, 64, dtype=dtype)
    return x_BSD.to(device), TokenContext(sample_B=torch.arange(4, device=device))


def both_passes(layer, x_BSD, ctx):
    """Output and every gradient; those of before are forgotten."""
    mine_BSD = x_BSD.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y_BSD, report = layer(mine_BSD, ctx)
    (y_BSD.square().sum() + sum(report.losses.values())).backward()
    return [y_BSD.detach(), mine_BSD.grad, *(p.grad for p in layer.parameters())]


def assert_close(some, others, tolerance):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=tolerance, atol=tolerance)


@both_saves
def test_the_function_of_the_cpu(save):
    layer = make_layer(save, torch.float64)
    on_cpu = both_passes(layer, *make_tokens(1, "cpu", torch.float64))
    on_gpu = both_passes(copy.deepcopy(layer).cuda(), *make_tokens(1, "cuda", torch.float64))
    assert_close(on_gpu, on_cpu, 1e-10)


@both_saves
def test_the_host_reads_nothing_in_either_pass(save):
    layer, (x_BSD, ctx) = make_layer(save).cuda(), make_tokens(1, "cuda")
    both_passes(layer, x_BSD, ctx)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_passes(layer, x_BSD, ctx)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both_saves
def test_both_passes_in_one_graph(save):
    layer, (x_BSD, ctx) = make_layer(save).cuda(), make_tokens(1, "cuda")
    other = copy.deepcopy(layer)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            both_passes(layer, x_BSD, ctx)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes(layer, x_BSD, ctx)
    for number in (2, 3):
        x_BSD.copy_(make_tokens(number, "cuda")[0])
        graph.replay()
        torch.cuda.synchronize()
        assert_close(captured, both_passes(other, x_BSD, ctx), 1e-5)
