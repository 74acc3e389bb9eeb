"""Training in float16: near float32, and one loss scale on all ranks, through overflows and restarts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from epmoe.config_file import override_config
from epmoe.parallel.fsdp import rows_here
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from epmoe.process.stop_signals import StopFlag
from epmoe.train import loss_scale
from epmoe.train.build import build_model
from epmoe.train.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.distributed.runs import End, ends, history, make_config
from tests.distributed.test_parity import VOCAB, Samples, config
from tests.patience import HANGS_S

STEPS = 6
INTERVAL = 3
"""Finite steps to a larger scale, in these tests."""


def query(trainer: Trainer) -> torch.Tensor:
    """Some weights, this rank's rows of them."""
    return rows_here(trainer.engine.weights()["blocks.0.attention.q_proj.weight"]).clone()


def train_cell(place: Any, mesh: Any, precision: str, fault: str, engine: str = "native") -> dict[str, Any]:
    """Six steps; what they did, and the weights."""
    os.environ["EPMOE_FAULT"] = fault
    cfg = override_config(config("ragged", precision, 1, place.world_size), [f"parallel.engine={engine}"])
    model = build_model(cfg, VOCAB, device=place.device, mesh=mesh)
    trainer = Trainer(cfg, place, mesh, model=model, data=Samples(), stop=StopFlag())  # type: ignore[arg-type]
    start = query(trainer)
    results = [trainer.step()]
    moved = not torch.equal(start, query(trainer))
    gradients = {name: part.local.clone() for name, part in trainer.engine.gradients().items()}
    scales = [trainer.progress.loss_scale]
    for _ in range(STEPS - 1):
        results.append(trainer.step())
        scales.append(trainer.progress.loss_scale)
    return {
        "factors": [scale.factor if scale else None for scale in scales],
        "losses": [float(result.sums.loss) / result.num_tokens for result in results],
        "norms": [result.grad_norm for result in results],
        "overflow": [result.overflow for result in results],
        "progress": trainer.progress,
        "moved": moved,
        "gradients": gradients,
        "clip": results[0].clip,
    }


def train_ranks(rank: int) -> list[dict[str, Any]]:
    loss_scale.GROWTH_INTERVAL = INTERVAL  # type: ignore[misc]
    place = runtime.start("cpu", HANGS_S)
    mesh = build_mesh(place, 2)
    fault = "point=train.after_backward,rank=1,step=1,action=inf"
    cells: list[tuple[str, ...]] = [("fp32", ""), ("fp16_autocast", ""), ("fp16_autocast", fault)]
    cells += [("fp16_autocast", "", "fsdp"), ("fp16_autocast", fault, "fsdp")]
    return [train_cell(place, mesh, *cell) for cell in cells]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return run_ranks(2, train_ranks, tmp_path_factory.mktemp("ranks"))


def test_float16_trains_as_float32_does(ranks: list[list[dict[str, Any]]]) -> None:
    """Losses to 0.2%, gradients of the first step to 3% of the largest of their tensor: float16 has 11 bits."""
    for single, half, *_ in ranks:
        errors = {
            name: float((half["gradients"][name] - value).abs().max() / value.abs().max())
            for name, value in single["gradients"].items()
            if value.any()
        }
        print("worst gradient", max(errors.items(), key=lambda item: item[1]))
        print("losses", [a / b - 1 for a, b in zip(half["losses"], single["losses"], strict=True)])
        assert max(errors.values()) < 0.03
        assert half["losses"] == pytest.approx(single["losses"], rel=2e-3)
        assert half["norms"] == pytest.approx(single["norms"], rel=2e-2), "of gradients without the scale"
        assert half["losses"] != single["losses"], "float16 was not used"
        assert single["factors"] == [None] * STEPS


def test_the_scale_grows_after_finite_steps(ranks: list[list[dict[str, Any]]]) -> None:
    for _, half, *_ in ranks:
        assert half["factors"] == [2.0**16, 2.0**16, 2.0**17, 2.0**17, 2.0**17, 2.0**18]
        assert not any(half["overflow"])


def test_an_overflow_on_one_rank_halves_the_scale_on_all(ranks: list[list[dict[str, Any]]]) -> None:
    for _, _, hit, *_ in ranks:
        assert hit["factors"] == [2.0**15, 2.0**15, 2.0**15, 2.0**16, 2.0**16, 2.0**16]
        assert hit["overflow"] == [True] + [False] * (STEPS - 1)
        assert not hit["moved"], "the update was left out"
        progress = hit["progress"]
        assert (progress.overflowed, progress.skipped, progress.skipped_in_a_row) == (1, 0, 0)
    assert ranks[0][2]["norms"] == ranks[1][2]["norms"]
    assert ranks[0][2]["progress"] == ranks[1][2]["progress"]


def test_shards_have_the_scale_of_native_gradients(ranks: list[list[dict[str, Any]]]) -> None:
    for _, *native, good, hit in ranks:
        for shards, wanted in zip((good, hit), native, strict=True):
            assert shards["factors"] == wanted["factors"]
            assert shards["overflow"] == wanted["overflow"]
            assert shards["moved"] == wanted["moved"]
            assert shards["progress"] == wanted["progress"]
            assert shards["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
            assert shards["norms"][1:] == pytest.approx(wanted["norms"][1:], rel=1e-3)


def test_overflows_end_the_run_only_at_the_floor(tmp_path: Path) -> None:
    """17 factors from 2**16 to 1: sixteen steps shrink it, and from the next on it is not the scale's fault."""
    overrides = [
        "train.precision=fp16_autocast",
        "train.max_nonfinite=2",
        "train.steps=30",
        "checkpoint.every=0",
    ]
    run = make_config(tmp_path, "floor", *overrides)
    for end in ends(tmp_path, run, "point=train.after_backward,rank=1,action=inf"):
        assert end.code == 5
        assert end.message.startswith("step 18 is not finite")
        assert "2 such step(s) in a row" in end.message


def test_a_restart_goes_on_with_the_scale(tmp_path: Path) -> None:
    overrides = ["train.precision=fp16_autocast", "checkpoint.every=1", "train.steps=4"]
    run = make_config(tmp_path, "again", *overrides)
    inf = "point=train.after_backward,rank=0,step=2,action=inf"
    [first, _] = ends(tmp_path, run, f"point=train.step_start,step=3,action=term;{inf}")
    assert first.message.startswith("stopped after step")
    assert ends(tmp_path, run, None) == [End(0), End(0)]
    lines = history(Path(run.out))
    assert [line["loss_scale"] for line in lines] == [65536.0, 32768.0, 32768.0, 32768.0]
    assert [line["overflowed_steps"] for line in lines] == [0, 1, 1, 1]
    assert [line["skipped_steps"] for line in lines] == [0] * 4
