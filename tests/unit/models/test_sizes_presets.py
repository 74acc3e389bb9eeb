"""Counts against real models, arithmetic against a counter, presets against what they promise."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from epmoe.config import ModelConfig, MoEConfig
from epmoe.config_file import load_config
from epmoe.config_routers import TopKOptions
from epmoe.models import presets
from epmoe.models.decoder import Decoder
from epmoe.models.sizes import count_parameters, flops_per_token
from tests.patience import HANGS_S

CONFIGS = Path(__file__).parents[3] / "configs"
Preset = Callable[[], tuple[ModelConfig, MoEConfig | None]]
PRESETS: list[Preset] = [
    presets.quickstart,
    presets.quickstart_dense,
    presets.mixtral_tiny,
    presets.qwen3_moe_tiny,
    presets.gshard_125m,
    presets.gshard_8x,
]


def odd_shape() -> tuple[ModelConfig, MoEConfig | None]:
    model = ModelConfig(d_model=48, num_layers=5, num_heads=6, num_kv_heads=3, head_dim=10, d_ff=56)
    return model, MoEConfig(
        every=2, first_dense=2, num_experts=3, router="switch", activation="gelu", d_ff=40, shared_experts=2
    )


@pytest.mark.parametrize("preset", [*PRESETS, odd_shape])
def test_counts_are_those_of_the_model(preset: Preset) -> None:
    config, moe = preset()
    with torch.device("meta"):
        model = Decoder(config, moe, vocab_size=97, seed=0)
    count = count_parameters(config, moe, 97)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    expert = sum(size for name, size in sizes.items() if ".experts." in name)
    assert (count.total, count.expert) == (sum(sizes.values()), expert)
    assert count.dense == count.total - expert
    share = expert * moe.top_k // moe.num_experts if moe else 0
    assert count.active == count.dense + share


def ffn_flops(
    rows: torch.Size, _: object, w_in: torch.Size, w_out: torch.Size, *__: object, **___: object
) -> int:
    return 2 * rows[0] * (w_in[1] * w_in[2] + w_out[1] * w_out[2])


def ffn_backward_flops(_: object, *given: torch.Size, **options: object) -> int:
    """Both gradients of each product: all of them are needed."""
    return 2 * ffn_flops(*given, **options)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_arithmetic_is_what_torch_counts(activation: str) -> None:
    config = ModelConfig(d_model=48, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=10, d_ff=56)
    moe = MoEConfig(
        num_experts=4,
        top_k=2,
        router=TopKOptions(),
        capacity_factor=None,
        d_ff=40,
        shared_experts=1,
        activation=activation,
    )
    model = Decoder(config, moe, vocab_size=97, seed=0)
    length = 16
    mapping = {
        torch.ops.epmoe.expert_ffn: ffn_flops,
        torch.ops.epmoe.expert_ffn_backward: ffn_backward_flops,
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        logits_BSV, _ = model(torch.arange(2 * length).view(2, length))
        logits_BSV.sum().backward()
    # The plain attention kernel multiplies the masked half of the scores too: S keys per query, not (S + 1) / 2.
    masked = 6 * 3 * 6 * 10 * (length - 1)
    assert counter.get_total_flops() == 2 * length * (flops_per_token(config, moe, 97, length) + masked)


def test_formula_of_a_dense_model() -> None:
    config = ModelConfig(d_model=8, num_layers=2, num_heads=2, d_ff=24)
    matmul = 2 * (4 * 8 * 8 + 3 * 8 * 24) + 50 * 8
    assert flops_per_token(config, None, 50, 11) == 6 * matmul + 12 * 2 * 8 * 6


def test_presets_keep_their_promises() -> None:
    sparse, dense = presets.quickstart(), presets.quickstart_dense()
    ratio = flops_per_token(*sparse, 4096, 256) / flops_per_token(*dense, 4096, 256)
    assert 1 <= ratio < 1.01
    assert 2e6 < count_parameters(*sparse, 4096).total < 1e7
    assert count_parameters(*presets.gshard_125m(), 1).active >= 100e6
    big, moe = presets.gshard_8x()
    assert moe is not None
    assert moe.num_experts % 8 == 0
    count = count_parameters(big, moe, 1)
    assert count.dense + count.expert // 8 < 0.9e9


def test_sizes_need_no_torch() -> None:
    code = "import sys, epmoe.models.presets, epmoe.models.sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=HANGS_S).returncode == 0


@pytest.mark.parametrize(
    ("name", "preset"), [("quickstart", presets.quickstart), ("1node-8gpu", presets.gshard_8x)]
)
def test_configuration_files_are_the_presets_they_name(name: str, preset: Preset) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert (config.model, config.moe) == preset()
