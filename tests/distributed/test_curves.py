"""Two hundred steps of the quickstart model on real text: every layout follows the curve of one process.

A layout takes half a minute, so they run only when they are asked for: ``make test-long``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from epmoe.config import Config
from epmoe.config_file import load_config
from epmoe.data.loader import TrainData
from epmoe.data.prepare import prepare
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from epmoe.process.stop_signals import StopFlag
from epmoe.train.build import build_model
from epmoe.train.trainer import Trainer
from tests.distributed.harness import run_ranks

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the model is trained."""

    world: int = 1
    ep: int = 1
    engine: str = "native"
    shard: str = "full"
    precision: str = "fp64"

    def __str__(self) -> str:
        return f"({self.world},{self.ep}) {self.engine} {self.shard} {self.precision}"


LAYOUTS = tuple(
    Layout(world=world, ep=ep, engine=engine, shard=shard)
    for world, ep in ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
    for engine, shard in (("native", "full"), ("fsdp", "full"), ("fsdp", "hybrid"))
)


def config_of(layout: Layout, folder: Path) -> Config:
    """The model and its vocabulary as they are, and this project's own pages. By SGD: where gradients are small, Adam
    makes much of rounding."""
    pages = folder / "pages"
    return load_config(
        ROOT / "configs/quickstart.yaml",
        [
            f"data.sources=[{{name: pages, path: {pages}, glob: '**/*.md', val_path: {pages / 'adr'}}}]",
            f"data.cache={folder / 'cache'}",
            "optimizer.name=sgd",
            "optimizer.lr=0.1",
            "data.seq_len=32",
            f"train.steps={STEPS}",
            "train.global_batch_size=4",
            f"train.precision={layout.precision}",
            f"parallel.ep_size={layout.ep}",
            f"parallel.engine={layout.engine}",
            f"parallel.fsdp_shard={layout.shard}",
        ],
    )


def curve_of(rank: int, layout: Layout, folder: Path) -> dict[str, Any]:
    """Loss of every step, and what every router sent to every expert."""
    place = runtime.start("cpu", 200.0)
    config = config_of(layout, folder)
    prepared = prepare(config.data)
    mesh = build_mesh(place, layout.ep, config.parallel)
    model = build_model(config, prepared.padded_vocab_size, device=place.device, mesh=mesh)
    data = TrainData(prepared, config.data, config.seed)
    trainer = Trainer(config, place, mesh, model=model, data=data, stop=StopFlag())
    losses, demands = [], []
    for _ in range(STEPS):
        sums = (result := trainer.step()).sums
        losses.append(float(sums.loss) / result.num_tokens)
        demands.append([did.demand_E.tolist() for did in sums.layers])
    return {"losses": losses, "demands": demands}


Found = Callable[[Layout], dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What rank 0 saw, when first asked."""
    folder = tmp_path_factory.mktemp("curves")
    shutil.copytree(ROOT / "docs", folder / "pages")  # as they are now, whatever is written meanwhile

    @cache
    def train(layout: Layout) -> dict[str, Any]:
        curve: dict[str, Any] = run_ranks(layout.world, curve_of, folder, layout, folder, timeout=280)[0]
        return curve

    return train


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_float64(found: Found, layout: Layout) -> None:
    reference, got = found(Layout()), found(layout)
    assert got["losses"] == pytest.approx(reference["losses"], rel=1e-9)
    assert got["demands"] == reference["demands"]
    assert reference["losses"][-1] < reference["losses"][0] - 1


@pytest.mark.parametrize("layout", [replace(layout, precision="fp32") for layout in LAYOUTS], ids=str)
def test_float32(found: Found, layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to the first token that rounding sends to another expert."""
    reference, got = found(Layout(precision="fp32")), found(layout)
    pairs = enumerate(zip(got["demands"], reference["demands"], strict=True))
    same = next((step for step, (one, other) in pairs if one != other), STEPS)
    with capsys.disabled():
        where = f"the first routing difference is in step {same + 1}" if same < STEPS else "they route alike"
        print(f"\n{layout}, {STEPS} steps: {where}")
    assert same > 0
    assert got["losses"][:same] == pytest.approx(reference["losses"][:same], rel=2e-6)
