"""apex's FusedAdam in place of AdamW: the same steps, the same state, and a run that changes between the two."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from epmoe.config import OptimizerConfig
from epmoe.engines.optimizer import Optimizer, load_fused_adam
from epmoe.errors import ConfigError
from epmoe.models import accelerators
from epmoe.parallel.gradients import Gradients
from epmoe.parallel.mesh import ExpertMesh
from epmoe.train.build import agree_on_accelerators
from epmoe.train.load_trained import load_trained
from tests.distributed.harness import run_ranks
from tests.distributed.runs import End, attempt, different, make_config, status, tensors
from tests.distributed.tiny import Tiny, draw
from tests.unit.packages import AMPERE, HOPPER, Packages, pretend

NO_GROUPS = cast(ExpertMesh, SimpleNamespace(world_group=None, edp_group=None))
CPU = torch.device("cpu")


def make(model: nn.Module, name: str) -> tuple[Optimizer, Gradients]:
    gradients = Gradients(model, NO_GROUPS)
    config = OptimizerConfig(name=name, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    return Optimizer(config, model, gradients.views), gradients


def train_steps(optimizer: Optimizer, gradients: Gradients, steps: range) -> None:
    for step in steps:
        for name, view in gradients.views.items():
            view.copy_(draw(f"{step} {name}", *view.shape))
        optimizer.step(0.01 * (1 + step % 3))


def assert_same(got: Optimizer, wanted: Optimizer, tolerance: float = 1e-5) -> None:
    assert got.state().keys() == wanted.state().keys()
    both = [(got.state()[k], wanted.state()[k]) for k in wanted.state()]
    both += [(got.weights()[k], wanted.weights()[k]) for k in wanted.weights()]
    for ours, theirs in both:
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_steps_are_those_of_adamw(
    dtype: torch.dtype, packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.apex()
    pretend(monkeypatch, AMPERE)
    pair = [make(Tiny(0, 4).to(dtype), name) for name in ("apex_fused_adam", "adamw")]
    assert_same(pair[0][0], pair[1][0])
    for optimizer, gradients in pair:
        train_steps(optimizer, gradients, range(20))
    assert_same(pair[0][0], pair[1][0])
    assert {float(v) for k, v in pair[0][0].state().items() if k.endswith(".step")} == {20.0}


@pytest.mark.parametrize("names", [("adamw", "apex_fused_adam"), ("apex_fused_adam", "adamw")])
def test_the_state_of_one_is_read_by_the_other(
    names: tuple[str, str], packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.apex()
    pretend(monkeypatch, AMPERE)
    whole, gradients = make(Tiny(0, 4), names[0])
    train_steps(whole, gradients, range(20))
    first, gradients = make(Tiny(0, 4), names[0])
    train_steps(first, gradients, range(10))
    second, gradients = make(Tiny(0, 4), names[1])
    for target, source in ((second.state(), first.state()), (second.weights(), first.weights())):
        for key, tensor in target.items():
            tensor.detach().copy_(source[key])
    train_steps(second, gradients, range(10, 20))
    assert_same(second, whole)


NO_EXTENSION = """
class FusedAdam:
    def __init__(self, *_, **__):
        raise RuntimeError('apex.optimizers.FusedAdam requires cuda extensions')
"""


@pytest.mark.parametrize(
    ("kind", "dtype", "why"),
    [
        ("missing", torch.float32, "NVIDIA apex is not installed"),
        ("toolkit", torch.float32, "an unrelated web toolkit"),
        ("unbuilt", torch.float32, "RuntimeError: apex.optimizers.FusedAdam requires cuda extensions"),
        ("whole", torch.float64, "no kernel for float64"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_refused_with_the_reason(
    kind: str, dtype: torch.dtype, why: str, packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    {
        "missing": lambda: None,
        "toolkit": packages.toolkit,
        "unbuilt": lambda: packages.apex(fused_adam=NO_EXTENSION),
        "whole": packages.apex,
    }[kind]()
    pretend(monkeypatch, AMPERE)
    with pytest.raises(ConfigError, match=r"optimizer\.name=apex_fused_adam is not available") as refused:
        load_fused_adam(CPU, dtype)
    assert refused.value.exit_code == 2
    assert why in str(refused.value.why)
    assert "optimizer.name=adamw" in str(refused.value.fix)


# ------------------------------------------------------------------------------------------- whole runs
def _attempt(rank: int, config: Any, fault: str | None = None) -> End:
    """A run on a rank whose CPU passes for a GPU."""
    accelerators.compute_capability = lambda device: HOPPER
    return attempt(rank, config, fault)


def test_a_run_changes_optimizer_norm_and_attention_and_back(
    base: Path, packages: Packages, capfd: pytest.CaptureFixture[str]
) -> None:
    packages.apex()
    packages.flash(3)
    short = ("train.precision=bf16_autocast", "train.steps=9", "checkpoint.every=0", "train.sample.tokens=0")
    fast = ("optimizer.name=apex_fused_adam", "model.norm=apex")
    whole = make_config(base, "fused-adam-whole", *short, "model.attention=sdpa")
    broken = make_config(base, "fused-adam-broken", *short, "model.attention=sdpa")
    faster = make_config(base, "fused-adam-broken", *short, *fast, "model.attention=auto")
    stop = "point=train.step_start,rank=0,step={},action=term"
    plan = [(whole, None), (broken, stop.format(4)), (faster, stop.format(7)), (broken, None)]
    for config, fault in plan:
        wanted = 75 if fault else 0
        found = run_ranks(2, _attempt, base, config, fault)
        assert [end.code for end in found] == [wanted] * 2, found
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("attention: ")]
    assert said == ["attention: flash-attn 3"], "once, by rank 0, in the run that asked"
    got, expected = tensors(Path(broken.out), 9), tensors(Path(whole.out), 9)
    assert got.keys() == expected.keys()
    assert different(got, expected), (
        "the other kernels round otherwise; equal bits would mean they were not used"
    )
    for key, tensor in expected.items():
        # nine steps at up to 5e-3 in bfloat16; where a gradient is near 0 Adam may step either way once or twice
        if ":model." in key:
            assert float((got[key] - tensor).abs().max()) < 5e-3, key
            assert float((got[key] - tensor).abs().mean()) < 2e-4, key
        elif key.endswith(".step"):
            assert torch.equal(got[key], tensor)


def test_a_checkpoint_of_a_run_with_all_of_them_is_read_without_any(
    base: Path, packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.apex()
    packages.flash(3)
    settings = ("optimizer.name=apex_fused_adam", "model.norm=apex", "model.attention=flash")
    config = make_config(
        base,
        "fused-adam-read",
        "train.precision=bf16_params",
        "train.steps=2",
        "train.sample.tokens=2",
        *settings,
    )
    [end] = run_ranks(1, _attempt, base, config)
    assert end == End(0)
    monkeypatch.setattr(accelerators, "find_spec", lambda name: None)
    loaded = load_trained(Path(config.out), device=CPU)
    assert (loaded.config.model.attention, loaded.config.model.norm) == ("sdpa", "torch")
    with pytest.raises(ConfigError, match="flash"):
        load_trained(Path(config.out), device=CPU, overrides=["model.attention=flash"])


def test_a_run_that_cannot_have_flash_stops_before_anything_with_exit_code_2(base: Path) -> None:
    config = make_config(
        base, "no-flash", "model.attention=flash", "data.tokenizer=bpe", "data.vocab_size=300"
    )
    prepared = {path for path in (base / "cache").rglob("*") if path.is_dir()}
    for end in run_ranks(2, attempt, base, config):
        assert end.code == 2
        assert "flash-attn needs a GPU, this is cpu" in end.message
    assert status(Path(config.out))["exit_code"] == 2
    assert prepared == {path for path in (base / "cache").rglob("*") if path.is_dir()}, (
        "data was prepared first"
    )


def _one_sided(rank: int, config: Any) -> str:
    """Rank 0 has a GPU, rank 1 has none."""
    accelerators.compute_capability = lambda device: HOPPER if rank == 0 else None
    try:
        return agree_on_accelerators(config, CPU).note
    except ConfigError as error:
        return f"refused: {error.what}"


def test_ranks_that_differ_are_counted_by_auto_and_refused_together_by_flash(
    base: Path, packages: Packages
) -> None:
    packages.flash(3)
    auto = make_config(base, "one-sided", "train.precision=bf16_autocast")
    note = "1 rank(s): flash-attn 3; 1 rank(s): sdpa (flash-attn needs a GPU, this is cpu)"
    assert run_ranks(2, _one_sided, base, auto) == [note, note]
    flash = make_config(base, "one-sided", "train.precision=bf16_autocast", "model.attention=flash")
    found = run_ranks(2, _one_sided, base, flash)
    assert all(text.endswith("model.attention=flash is not available") for text in found)
    assert found[0].startswith("refused: rank 1")
