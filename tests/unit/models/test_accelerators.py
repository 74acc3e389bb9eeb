"""Which optional kernels are taken when, what is said when they are not, and that they compute what PyTorch does."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from epmoe.config import Config, ModelConfig
from epmoe.errors import ConfigError
from epmoe.models.accelerators import Accelerators, choose_accelerators
from epmoe.models.attention import Attention, KVCache, attention_inputs
from epmoe.models.decoder import Decoder
from epmoe.models.layers import RMSNorm
from tests.unit.packages import AMPERE, BLACKWELL, HOPPER, TURING, Packages, pretend

BF16 = torch.bfloat16
POISON = "raise SystemExit('it was imported')\n"


def model(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"d_model": 32, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, **changes})


# ------------------------------------------------------------------------------------------- which one
@pytest.mark.parametrize(
    ("capability", "installed", "head", "chosen"),
    [
        (HOPPER, (2, 3, 4), 8, "flash-attn 3"),
        (HOPPER, (2, 4), 8, "flash-attn 4"),
        (HOPPER, (2, 4), 256, "flash-attn 2"),
        (HOPPER, (3,), 256, "flash-attn 3"),
        (BLACKWELL, (2, 3, 4), 128, "flash-attn 4"),
        (BLACKWELL, (2, 3), 128, "flash-attn 2"),
        (AMPERE, (2, 3, 4), 64, "flash-attn 2"),
        ((12, 0), (2, 4), 64, "flash-attn 2"),
    ],
)
def test_the_best_generation_for_the_gpu_and_the_head_is_taken(
    capability: tuple[int, int],
    installed: tuple[int, ...],
    head: int,
    chosen: str,
    packages: Packages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packages.flash(*installed)
    device = pretend(monkeypatch, capability)
    found = choose_accelerators(model(head_dim=head), device=device, dtype=BF16)
    assert found.note == chosen
    asked = choose_accelerators(model(head_dim=head, attention="flash"), device=device, dtype=BF16)
    assert asked.attend is not None
    assert asked.note == "", "nothing was left to choose"


UNDEFINED = "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDevice"


@pytest.mark.parametrize(
    ("capability", "dtype", "apart", "head", "package", "why"),
    [
        (None, BF16, False, 8, POISON, "flash-attn needs a GPU, this is cpu"),
        (AMPERE, torch.float32, False, 8, POISON, "this is float32: see train.precision"),
        (AMPERE, torch.float64, False, 8, POISON, "this is float64"),
        (AMPERE, BF16, True, 8, POISON, "data.cross_document=false"),
        (TURING, BF16, False, 8, POISON, "flash-attn 2: runs on compute capability 8.0, not on 7.5"),
        (AMPERE, BF16, False, 20, POISON, "multiples of 8 up to 256 wide, not 20"),
        (AMPERE, BF16, False, 264, POISON, "multiples of 8 up to 256 wide, not 264"),
        (AMPERE, BF16, False, 8, None, "flash-attn is not installed"),
        (AMPERE, BF16, False, 8, f"raise ImportError('{UNDEFINED}')", f"ImportError: {UNDEFINED}"),
        (AMPERE, BF16, False, 8, "import cutlass_is_gone", "No module named 'cutlass_is_gone'"),
        (AMPERE, BF16, False, 8, "", "AttributeError: module 'flash_attn' has no attribute"),
        (
            AMPERE,
            BF16,
            False,
            8,
            "def flash_attn_func(*_, **__):\n    raise RuntimeError('no kernel image\\nis available')",
            "flash-attn 2: RuntimeError: no kernel image is available",
        ),
    ],
)
def test_auto_falls_back_with_the_reason_and_flash_is_refused_with_it(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    apart: bool,
    head: int,
    package: str | None,
    why: str,
    packages: Packages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if package is not None:
        packages.broken_flash(2, package)
    options: dict[str, Any] = {
        "device": pretend(monkeypatch, capability),
        "dtype": dtype,
        "cross_document": not apart,
    }
    found = choose_accelerators(model(head_dim=head), **options)
    assert found.attend is None
    assert found.note.startswith("sdpa (")
    assert why in found.note
    assert "\n" not in found.note
    with pytest.raises(ConfigError, match=r"model\.attention=flash is not available") as refused:
        choose_accelerators(model(head_dim=head, attention="flash"), **options)
    assert refused.value.exit_code == 2
    assert why in str(refused.value.why)
    assert "pip install flash-attn --no-build-isolation" in str(refused.value)


def test_sdpa_imports_and_says_nothing(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    packages.broken_flash(2, POISON)
    packages.broken_flash(3, POISON)
    device = pretend(monkeypatch, HOPPER)
    assert choose_accelerators(model(attention="sdpa"), device=device, dtype=BF16) == Accelerators()


def test_explaining_a_configuration_imports_nothing(packages: Packages) -> None:
    from epmoe.cli.explain import explain

    packages.broken_flash(2, POISON)
    packages.toolkit()
    asked = {"attention": "flash", "norm": "apex"}
    assert explain(Config.model_validate({"model": asked, "optimizer": {"name": "apex_fused_adam"}}), 1)
    assert not {"apex", "flash_attn"} & sys.modules.keys()


def test_a_decoder_does_not_forget_what_its_configuration_asks_for() -> None:
    for asked in ({"attention": "flash"}, {"norm": "apex"}):
        [(key, value)] = asked.items()
        with pytest.raises(ConfigError, match=f"{key}={value}"), torch.device("meta"):
            Decoder(model(**asked), None, vocab_size=7, seed=0)


# ------------------------------------------------------------------------------------------- attention
def attention_pair(config: ModelConfig, found: Accelerators) -> tuple[Attention, Attention]:
    """The same weights with SDPA and with what was found."""
    plain, fast = Attention(config, layer=0), Attention(config, layer=0, accelerators=found)
    generator = torch.Generator().manual_seed(3)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    fast.load_state_dict(plain.state_dict())
    return plain.to(BF16), fast.to(BF16)


def outputs(attention: Attention, x_BSD: Tensor, config: ModelConfig) -> list[Tensor]:
    """The output, and the gradients of x and of the weights for one fixed direction."""
    attention.zero_grad()
    x_BSD = x_BSD.clone().requires_grad_()
    out_BSD = attention(x_BSD, attention_inputs(config, x_BSD))
    (out_BSD.float() * torch.linspace(-1, 1, out_BSD.numel()).view_as(out_BSD)).sum().backward()
    return [out_BSD.detach(), x_BSD.grad, *(p.grad for p in attention.parameters())]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("generation", "capability"), [(2, AMPERE), (3, HOPPER), (4, BLACKWELL)])
def test_layout_heads_and_causality_are_those_of_sdpa(
    generation: int,
    capability: tuple[int, int],
    kv_heads: int,
    packages: Packages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packages.flash(generation)
    config = model(num_kv_heads=kv_heads, qk_norm=True, attention="flash")
    found = choose_accelerators(config, device=pretend(monkeypatch, capability), dtype=BF16)
    plain, fast = attention_pair(config, found)
    x_BSD = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)).to(BF16)
    module = sys.modules[{2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}[generation]]
    module.calls.clear()
    for got, wanted in zip(outputs(fast, x_BSD, config), outputs(plain, x_BSD, config), strict=True):
        # bfloat16 keeps 8 bits; two roundings may differ between the kernels
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
    assert module.calls == [(3, 7, 4, 8)], "batch, positions, heads, width; once"


def test_a_cache_a_mask_and_float32_keep_sdpa() -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("flash-attn was called")

    config = model()
    plain, fast = attention_pair(config, Accelerators(attend=refuse))
    x_BSD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(BF16)
    segment_BS = torch.tensor([[0, 0, 1, 1, 1]] * 2)
    masked = attention_inputs(config, x_BSD, segment_BS=segment_BS)
    assert torch.equal(fast(x_BSD, masked), plain(x_BSD, masked))
    inputs = attention_inputs(config, x_BSD)
    fast(x_BSD, inputs, KVCache(config, 5))
    fast.float()(x_BSD.float(), attention_inputs(config, x_BSD.float()))
    with pytest.raises(AssertionError, match="was called"):
        fast.to(BF16)(x_BSD, inputs)


# ------------------------------------------------------------------------------------------- norm
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (BF16, BF16, 1e-2),
        (BF16, torch.float32, 1e-2),
        (torch.float32, BF16, 1e-6),
    ],
)
def test_the_norm_is_the_same_in_value_gradient_and_dtype(
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    tolerance: float,
    autocast: bool,
    packages: Packages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packages.apex()
    found = choose_accelerators(model(norm="apex"), device=pretend(monkeypatch, AMPERE), dtype=BF16)
    generator = torch.Generator().manual_seed(2)
    weight_D = torch.randn(6, generator=generator)
    x_BSD = (3 * torch.randn(2, 3, 6, generator=generator)).to(x_dtype)
    results = []
    for function in (None, found.rms_norm):
        norm = RMSNorm(6, 1e-5, function)
        assert [name for name, _ in norm.named_parameters()] == ["weight"]
        norm.load_state_dict({"weight": weight_D})
        norm.to(weight_dtype)
        leaf_BSD = x_BSD.clone().requires_grad_()
        with torch.autocast("cpu", BF16, enabled=autocast):
            y_BSD = norm(leaf_BSD)
        y_BSD.float().pow(2).sum().backward()
        results.append((y_BSD.detach(), leaf_BSD.grad, norm.weight.grad))
    assert results[1][0].dtype == x_dtype
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    calls = sys.modules["apex.normalization.fused_layer_norm"].calls
    assert calls[-1] == (x_dtype if x_dtype == weight_dtype else torch.float32)


def test_a_decoder_has_the_same_parameters_and_logits_with_all_of_them(
    packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.apex()
    packages.flash(2)
    config = model(norm="apex", attention="flash", qk_norm=True)
    found = choose_accelerators(config, device=pretend(monkeypatch, AMPERE), dtype=BF16)
    fast = Decoder(config, None, vocab_size=11, seed=4, accelerators=found)
    plain = Decoder(model(qk_norm=True), None, vocab_size=11, seed=4)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    token_BS = torch.arange(12).view(2, 6) % 11
    with torch.no_grad(), torch.autocast("cpu", BF16):
        got, wanted = fast(token_BS)[0], plain(token_BS)[0]
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    norms = sys.modules["apex.normalization.fused_layer_norm"].calls
    assert len(norms) == 1 + 2 * 4 + 1, "the example, four norms of two blocks, the last"


# ------------------------------------------------------------------------------------------- apex
@pytest.mark.parametrize(
    ("capability", "kind", "why", "fix"),
    [
        (AMPERE, "missing", "NVIDIA apex is not installed", "model.norm=torch"),
        (AMPERE, "toolkit", "an unrelated web toolkit", "pip uninstall apex"),
        (None, "toolkit", "an unrelated web toolkit", "pip uninstall apex"),
        (None, "nvidia", "NVIDIA apex needs a GPU, this is cpu", "model.norm=torch"),
        (
            AMPERE,
            "unbuilt",
            "ModuleNotFoundError: No module named 'fused_layer_norm_cuda'",
            "model.norm=torch",
        ),
        (AMPERE, "old", "has no attribute 'fused_rms_norm_affine'", "model.norm=torch"),
    ],
)
def test_a_norm_that_cannot_be_had_is_refused_with_the_reason(
    capability: tuple[int, int] | None,
    kind: str,
    why: str,
    fix: str,
    packages: Packages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "toolkit":
        packages.toolkit()
    elif kind != "missing":
        bodies = {"nvidia": POISON, "unbuilt": "import fused_layer_norm_cuda", "old": ""}
        packages.apex(norm=bodies[kind])
    with pytest.raises(ConfigError, match=r"model\.norm=apex is not available") as refused:
        choose_accelerators(model(norm="apex"), device=pretend(monkeypatch, capability), dtype=BF16)
    assert refused.value.exit_code == 2
    assert why in str(refused.value.why)
    assert fix in str(refused.value.fix)
