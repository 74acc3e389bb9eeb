"""Compiled blocks with the exchanges between two ranks inside their graphs train as plain ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from epmoe.models.compile import compile_blocks
from epmoe.models.decoder import Decoder
from epmoe.parallel import runtime
from epmoe.parallel.mesh import build_mesh
from tests.distributed import test_parity
from tests.distributed.harness import run_ranks


def train_cells(rank: int) -> list[dict[str, Any]]:
    place = runtime.start("cpu", 200.0)
    mesh = build_mesh(place, 2)
    build = test_parity.build_model

    def compiled(*args: Any, **kwargs: Any) -> Decoder:
        model = build(*args, **kwargs)
        assert compile_blocks(model, backend="aot_eager") == "2 whole block(s)"
        return model

    plain = test_parity.train_cell(place, mesh, "padded", "fp64", 1)
    with mock.patch.object(test_parity, "build_model", compiled):
        return [plain, test_parity.train_cell(place, mesh, "padded", "fp64", 1)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_with_one_graph_per_block(tmp_path: Path) -> None:
    for plain, compiled in run_ranks(2, train_cells, tmp_path, timeout=200.0):
        for name, value in plain["weights"].items():
            assert torch.allclose(compiled["weights"][name], value, rtol=1e-9, atol=1e-9), name
        assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-9)
