"""The real flash-attn and NVIDIA apex against PyTorch, each where it is installed and the GPU runs it.

Tolerances: bfloat16 results differ by at most two roundings, 2^-6 of the largest value; float32 by 1e-5.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from epmoe.config import ModelConfig, OptimizerConfig
from epmoe.engines.optimizer import Optimizer, load_fused_adam
from epmoe.errors import ConfigError
from epmoe.models import accelerators
from epmoe.models.accelerators import FLASH_LIBRARIES, Accelerators, FlashLibrary, choose_accelerators
from epmoe.models.attention import Attention, attention_inputs
from epmoe.models.layers import RMSNorm
from epmoe.parallel.gradients import Gradients
from epmoe.parallel.mesh import ExpertMesh
from tests.distributed.tiny import Tiny, draw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
BF16 = torch.bfloat16
HALF_TOLERANCE, FULL_TOLERANCE = 2.0**-6, 1e-5


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    largest = float(wanted.detach().abs().max())
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=tolerance * largest, check_dtype=True)


def attention_results(config: ModelConfig, found: Accelerators) -> list[Tensor]:
    """Output and gradients of a layer whose weights and input are always the same."""
    attention = Attention(config, layer=0, accelerators=found)
    generator = torch.Generator().manual_seed(3)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=config.d_model**-0.5, generator=generator)
    attention.to(GPU, BF16)
    x_BSD = torch.randn(2, 129, config.d_model, generator=generator).to(GPU, BF16).requires_grad_()
    out_BSD = attention(x_BSD, attention_inputs(config, x_BSD))
    direction_BSD = torch.randn(out_BSD.shape, generator=generator).to(GPU, BF16)
    out_BSD.backward(direction_BSD)
    return [
        tensor
        for tensor in (out_BSD, x_BSD.grad, *(p.grad for p in attention.parameters()))
        if tensor is not None
    ]


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("library", FLASH_LIBRARIES, ids=lambda library: library.name)
def test_flash_attention_is_sdpa(
    library: FlashLibrary, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerators, "FLASH_LIBRARIES", (library,))
    config = ModelConfig(d_model=512, num_heads=8, num_kv_heads=kv_heads)
    found = choose_accelerators(config, device=GPU, dtype=BF16)
    if found.attend is None:
        pytest.skip(found.note)
    for got, wanted in zip(
        attention_results(config, found), attention_results(config, Accelerators()), strict=True
    ):
        assert_near(got, wanted, HALF_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_norm_of_apex_is_that_of_torch(dtype: torch.dtype) -> None:
    try:
        found = choose_accelerators(ModelConfig(norm="apex", attention="sdpa"), device=GPU, dtype=dtype)
    except ConfigError as error:
        pytest.skip(str(error.why))
    results = []
    for function in (None, found.rms_norm):
        generator = torch.Generator().manual_seed(2)
        norm = RMSNorm(768, 1e-5, function)
        norm.load_state_dict({"weight": 1 + 0.1 * torch.randn(768, generator=generator)})
        norm.to(GPU, dtype)
        x_TD = (3 * torch.randn(300, 768, generator=generator)).to(GPU, dtype).requires_grad_()
        y_TD = norm(x_TD)
        y_TD.backward(torch.randn(y_TD.shape, generator=generator).to(GPU, dtype))
        results.append((y_TD, x_TD.grad, norm.weight.grad))
    for wanted, got in zip(*results, strict=True):
        assert_near(got, wanted, FULL_TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE)


def train_steps(optimizer: Optimizer, gradients: Gradients, steps: range) -> None:
    for step in steps:
        for name, view in gradients.views.items():
            view.copy_(draw(f"{step} {name}", *view.shape))
        optimizer.step(0.01)


def test_fused_adam_is_adamw_and_reads_its_state() -> None:
    try:
        load_fused_adam(GPU, torch.float32)
    except ConfigError as error:
        pytest.skip(str(error.why))
    no_groups = cast(ExpertMesh, SimpleNamespace(world_group=None, edp_group=None))

    def make(name: Any) -> tuple[Optimizer, Gradients]:
        model = Tiny(0, 4).to(GPU)
        gradients = Gradients(model, no_groups)
        return Optimizer(OptimizerConfig(name=name, weight_decay=0.3), model, gradients.views), gradients

    plain, plain_gradients = make("adamw")
    train_steps(plain, plain_gradients, range(10))
    fused, fused_gradients = make("apex_fused_adam")
    for target, source in ((fused.state(), plain.state()), (fused.weights(), plain.weights())):
        for key, tensor in target.items():
            tensor.detach().copy_(source[key])
    for optimizer, gradients in ((plain, plain_gradients), (fused, fused_gradients)):
        train_steps(optimizer, gradients, range(10, 30))
    for target, source in ((fused.state(), plain.state()), (fused.weights(), plain.weights())):
        for key, tensor in target.items():
            if tensor.numel():
                assert_near(tensor.detach(), source[key].detach(), FULL_TOLERANCE)
