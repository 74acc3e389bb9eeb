"""Compiled blocks train as plain ones do: on two ranks, with the exchanges inside their graphs or among them, and in a
run whose configuration asks for it.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from epmoe.config import ParallelConfig
from epmoe.models.compile import compile_blocks
from epmoe.models.decoder import Decoder
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from epmoe.train import run
from tests.distributed import test_parity
from tests.distributed.harness import run_ranks
from tests.distributed.runs import End, attempt, history, make_config

WHOLE, PARTS = "2 whole block(s)", "the dense parts of 2"
CELLS = {"padded": WHOLE, "overlap_padded": PARTS, "fsdp_full": PARTS}
"""What is trained, and what of it is compiled."""


def train_cells(rank: int) -> list[list[dict[str, Any]]]:
    place = runtime.start("cpu", 200.0)
    return [train_both(place, name) for name in CELLS]


def train_both(place: Any, name: str) -> list[dict[str, Any]]:
    mesh = build_mesh(place, 2, ParallelConfig(**test_parity.PARALLEL.get(name, {})))
    build = test_parity.build_model

    def compiled(*args: Any, **kwargs: Any) -> Decoder:
        model = build(*args, **kwargs)
        in_shards = mesh.parallel.engine == "fsdp"
        assert compile_blocks(model, in_shards=in_shards, backend="aot_eager") == CELLS[name]
        return model

    plain = test_parity.train_cell(place, mesh, name, "fp64", 1)
    with mock.patch.object(test_parity, "build_model", compiled):
        return [plain, test_parity.train_cell(place, mesh, name, "fp64", 1)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_with_compiled_blocks(tmp_path: Path) -> None:
    for plain, compiled in chain(*run_ranks(2, train_cells, tmp_path, timeout=200.0)):
        for name, value in plain["weights"].items():
            assert torch.allclose(compiled["weights"][name], value, rtol=1e-9, atol=1e-9), name
        assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-9)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "backend",
    [pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.long)],
)
def test_a_run_is_compiled_when_its_configuration_says_so(
    base: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole block with its experts."""
    # Inductor is the default.
    monkeypatch.setattr(run, "compile_blocks", partial(compile_blocks, backend=backend))
    short = ["train.steps=3", "checkpoint.every=0", "train.sample.tokens=0", "model.num_layers=1", "moe.every=1",
             "moe.dispatcher=padded"]  # fmt: skip
    losses = []
    for compiled in ("false", "true"):
        cfg = make_config(base, f"compiled-{compiled}", *short, f"train.compile={compiled}")
        assert run_ranks(1, attempt, base, cfg, timeout=280.0) == [End(0)]
        losses.append([step["loss"] for step in history(Path(cfg.out))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
