"""The DeepSpeed engine against the native one: gradients, norms, clip, weights, losses, checkpoints.

Model, samples and comparison are those of ``test_parity``. The reference is one process with the native engine.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import epmoe.engines.deepspeed
from epmoe.checkpoint.store import load_checkpoint, save_checkpoint, verify_checkpoint
from epmoe.config import Config, ParallelConfig
from epmoe.config_file import dump_config, override_config
from epmoe.models.compile import compile_blocks
from epmoe.parallel.deepspeed import load_deepspeed
from epmoe.parallel.fsdp import rows_here
from epmoe.parallel.mesh import ExpertMesh, build_mesh, is_stacked
from epmoe.process import runtime
from epmoe.process.stop_signals import StopFlag
from epmoe.train.build import build_model
from epmoe.train.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.distributed.runs import finish, history, make_config
from tests.distributed.test_parity import VOCAB, Samples, config, worst_error
from tests.distributed.tiny import record
from tests.patience import HANGS_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed; make test-slow does it",
    ),
]


@dataclass(frozen=True)
class Cell:
    """One training run."""

    world: int = 1
    ep: int = 1
    stage: int | None = None
    """None = the native engine."""
    accumulation: int = 1
    optimizer: str = "sgd"
    precision: str = "fp32"
    router: str = "gshard_top2"
    steps: int = 2
    buckets: int | None = None
    """Elements of a gradient bucket, if not the usual number."""
    dispatcher: str = "auto"
    exchange: str = "flat"
    recompute: str = "none"
    compiled: bool = False
    fsdp: bool = False
    """The engine fsdp, without a stage."""
    frozen: bool = False
    """Router, attention and norms are."""
    poisoned: int | None = None
    """Step in which the last rank gets objectives that are not numbers."""

    def __str__(self) -> str:
        """The layout, and what is not as usual."""
        usual = Cell(self.world, self.ep, self.stage)
        values = ((f.name, getattr(self, f.name), getattr(usual, f.name)) for f in fields(self))
        others = [f"{name}={value}" for name, value, default in values if value != default]
        return " ".join([f"{self.world}-{self.ep} stage={self.stage}", *others])


EXCHANGES: dict[str, dict[str, Any]] = {
    "flat": {},
    "hierarchical": {"exchange": "hierarchical", "ranks_per_node": 2},
}
"""The parallel section."""
LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
STAGES = (0, 1, 2)
PARITY = [Cell(world, ep, stage, acc) for world, ep in LAYOUTS for stage in STAGES for acc in (1, 2)]
PARITY += [Cell(2, 2, stage, 2, buckets=200) for stage in (1, 2)]
PARITY += [
    Cell(world, ep, stage, acc, dispatcher="padded")
    for world, ep in LAYOUTS
    for stage in STAGES
    for acc in (1, 2)
]
PARITY += [  # of two ranks each, so only here do the ranks that share the experts have more than one node
    Cell(4, 4, stage, acc, dispatcher=dispatcher, exchange="hierarchical")
    for stage in STAGES
    for acc in (1, 2)
    for dispatcher in ("auto", "padded")
]
PARITY += [Cell(2, 2, stage, 2, recompute=kind) for stage in STAGES for kind in ("selective", "full")]
PARITY += [Cell(2, 2, 1, 2, recompute="full", compiled=True)]
ADAM = [
    Cell(2, 2, stage, 2, "adamw", precision, steps=4)
    for precision in ("fp32", "bf16_autocast")
    for stage in STAGES
]
FROZEN = [Cell(2, 2, stage, 2, frozen=True) for stage in STAGES]
HALF = [Cell(2, 2, stage, 2, "adamw", "bf16_params", steps=4) for stage in (1, 2)]
HASH = [Cell(2, 2, stage, router="hash", steps=30) for stage in STAGES]
POISONED = [Cell(2, 2, stage, 2, poisoned=1, steps=4) for stage in (None, 0, 1, 2)]
NATIVE = [Cell(), Cell(frozen=True), Cell(router="hash", steps=30)]
NATIVE += [
    Cell(2, 2, None, 2, "adamw", precision, steps=4) for precision in ("fp32", "bf16_autocast", "bf16_params")
]
CELLS = [*NATIVE, *PARITY, *FROZEN, *ADAM, *HALF, *HASH, *POISONED]


def config_of(cell: Cell) -> Config:
    raw = config("gshard_top2", cell.precision, cell.accumulation, cell.world).model_dump()
    raw["optimizer"] |= {"name": cell.optimizer, "lr": 0.3 if cell.optimizer == "sgd" else 0.01}
    raw["train"]["steps"] = cell.steps
    raw["train"]["recompute"] = cell.recompute
    raw["train"]["freeze"] = ("router", "attention", "norms") if cell.frozen else ()
    raw["moe"]["dispatcher"] = cell.dispatcher
    raw["parallel"] = EXCHANGES[cell.exchange]
    if cell.fsdp:
        raw["parallel"] = {"engine": "fsdp"}
    elif cell.stage is not None:
        raw["parallel"] = raw["parallel"] | {"engine": "deepspeed", "zero_stage": cell.stage}
    if cell.router == "hash":
        raw["moe"] |= {"router": {"name": "hash"}, "top_k": 1, "losses": {}}
    return Config.model_validate(raw)


def make_trainer(cell: Cell, place: Any, mesh: ExpertMesh) -> Trainer:
    cfg = config_of(cell)
    model = build_model(cfg, VOCAB, device=place.device, mesh=mesh)
    if cell.compiled:
        compile_blocks(model, backend="aot_eager")
    return Trainer(cfg, place, mesh, model=model, data=Samples(), stop=StopFlag())  # type: ignore[arg-type]


def watch(trainer: Trainer) -> dict[str, Any]:
    """Fills itself with the parts of the first step's gradients, as the update gets them."""
    seen: dict[str, Any] = {}
    step = trainer.engine.step

    def watched(lr: float) -> None:
        if not seen:
            parts = trainer.engine.gradients()
            seen["gradients"] = {name: part.local.clone() for name, part in parts.items()}
            seen["where"] = {name: (part.first_row, part.shape) for name, part in parts.items()}
        step(lr)

    trainer.engine.step = watched  # type: ignore[method-assign]
    return seen


def poison(trainer: Trainer, when: int) -> None:
    backward = trainer.engine.backward

    def poisoned(objective: Tensor) -> None:
        last = trainer.runtime.rank == trainer.runtime.world_size - 1
        backward(objective * math.nan if last and trainer.progress.step == when else objective)

    trainer.engine.backward = poisoned  # type: ignore[method-assign]


def train_cells(rank: int, cells: list[Cell]) -> list[dict[str, Any]]:
    place = runtime.start("cpu", HANGS_S)
    layouts = sorted({(cell.ep, cell.exchange) for cell in cells})
    meshes = {way: build_mesh(place, way[0], ParallelConfig(**EXCHANGES[way[1]])) for way in layouts}
    return [train_cell(place, meshes[cell.ep, cell.exchange], cell) for cell in cells]


def train_cell(place: Any, mesh: ExpertMesh, cell: Cell) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        if cell.buckets is not None:
            patch.setattr(epmoe.engines.deepspeed, "BUCKET_ELEMENTS", cell.buckets)
        trainer = make_trainer(cell, place, mesh)
    found = watch(trainer)
    if cell.poisoned is not None:
        poison(trainer, cell.poisoned)
    results = [trainer.step() for _ in range(cell.steps)]
    engine = trainer.engine
    return found | {
        "losses": [float(result.sums.loss) / result.num_tokens for result in results],
        "norms": [result.grad_norm for result in results],
        "clips": [result.clip for result in results],
        "finite": [result.finite for result in results],
        "weights": {name: tensor.detach().clone() for name, tensor in engine.weights().items()},
        "state": {name: tensor.detach().clone() for name, tensor in engine.state().items()},
    }


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Once here instead of two seconds in every child."""
    load_deepspeed("cpu")


Results = Callable[[Cell], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the ranks of a cell found. All cells of a world size are trained by the same processes, when first asked."""

    @cache
    def world(size: int) -> dict[Cell, list[dict[str, Any]]]:
        cells = [cell for cell in dict.fromkeys(CELLS) if cell.world == size]
        ranks = run_ranks(size, train_cells, tmp_path_factory.mktemp("ranks"), cells, timeout=280)
        return {cell: [rank[index] for rank in ranks] for index, cell in enumerate(cells)}

    return lambda cell: world(cell.world)[cell]


@pytest.mark.parametrize("cell", [*PARITY, *FROZEN], ids=str)
def test_equals_one_native_process(results: Results, cell: Cell) -> None:
    [reference], ranks = results(Cell(frozen=cell.frozen)), results(cell)
    for rank in ranks:
        for kind in ("gradients", "weights"):
            error, name = worst_error(kind, rank, reference)
            assert error <= 1e-5, f"{kind} of {name}: off by {error:.2e}"
        assert rank["losses"] == pytest.approx(reference["losses"], rel=2e-6)
        assert rank["norms"] == pytest.approx(reference["norms"], rel=1e-6)
        assert rank["norms"] == ranks[0]["norms"]
        assert rank["clips"] == ranks[0]["clips"]
    assert min(reference["clips"]) < 1.0, "the clip was not active"


@pytest.mark.parametrize("cell", [*ADAM, *HALF], ids=str)
def test_moments_and_masters_equal_those_of_the_native_engine(results: Results, cell: Cell) -> None:
    """In the same layout, where the same numbers are added."""
    native = results(replace(cell, stage=None))
    for rank, reference in zip(results(cell), native, strict=True):
        for kind in ("gradients", "weights", "state"):
            assert rank[kind].keys() == reference[kind].keys()
            for name, wanted in reference[kind].items():
                got = rank[kind][name]
                assert got.dtype == wanted.dtype, name
                assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), (kind, name)
        assert rank["norms"] == results(cell)[0]["norms"]


@pytest.mark.parametrize("cell", HASH, ids=str)
def test_thirty_steps(results: Results, cell: Cell) -> None:
    """With the hash router, whose decisions no rounding can flip."""
    [reference] = results(Cell(router="hash", steps=30))
    for rank in results(cell):
        assert rank["losses"] == pytest.approx(reference["losses"], rel=2e-6)
    assert reference["losses"][-1] < reference["losses"][0]


@pytest.mark.parametrize("cell", POISONED, ids=str)
def test_the_trainer_decides_which_steps_are_left_out(results: Results, cell: Cell) -> None:
    """One that is not finite on one rank is left out on all, and leaves nothing behind."""
    native = results(replace(cell, stage=None))
    for rank, reference in zip(results(cell), native, strict=True):
        assert rank["finite"] == [True, False, True, True]
        assert rank["losses"] == pytest.approx(reference["losses"], rel=2e-6)
        for name, wanted in reference["weights"].items():
            assert torch.allclose(rank["weights"][name], wanted, rtol=1e-5, atol=1e-7), name


# ------------------------------------------------------------------------------------------- checkpoints
def stored(trainer: Trainer) -> dict[str, Tensor]:
    engine = trainer.engine
    return {name: tensor.detach().clone() for name, tensor in {**engine.weights(), **engine.state()}.items()}


def save(trainer: Trainer, folder: Path) -> Path:
    return save_checkpoint(
        folder, model=trainer.model, engine=trainer.engine, mesh=trainer.mesh, record=record(2), keep=1
    )


def load(trainer: Trainer, path: Path) -> None:
    load_checkpoint(verify_checkpoint(path), model=trainer.model, engine=trainer.engine, mesh=trainer.mesh)


def hand_over(rank: int, base: Path, ep: int, precision: str) -> list[str]:
    """From the native engine through every stage back to it -> what was not the same after a hand-over."""
    place = runtime.start("cpu", HANGS_S)
    mesh = build_mesh(place, ep)

    def trainer(stage: int | None) -> Trainer:
        return make_trainer(Cell(place.world_size, ep, stage, 1, "adamw", precision), place, mesh)

    source = trainer(None)
    source.step()
    problems, path = [], save(source, base / "native")
    for stage in (1, 2, None) if precision == "bf16_params" else (1, 0, 2, None):
        target = trainer(stage)
        load(target, path)
        wanted, got = stored(source), stored(target)
        assert wanted.keys() == got.keys()
        problems += [f"{stage} {name}" for name in wanted if not torch.equal(wanted[name], got[name])]
        parameters = dict(source.model.named_parameters())
        problems += [
            f"{stage} parameter {name}"
            for name, parameter in target.model.named_parameters()
            if not torch.equal(parameter, parameters[name])
        ]
        target.step()
        assert any(not torch.equal(tensor, wanted[name]) for name, tensor in stored(target).items())
        source, path = target, save(target, base / str(stage))
    return problems


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16_params"])
def test_checkpoints_go_between_engines(tmp_path: Path, world: int, ep: int, precision: str) -> None:
    assert run_ranks(world, hand_over, tmp_path, tmp_path, ep, precision, timeout=HANGS_S) == [[]] * world


def write_and_read(rank: int, base: Path, ep: int, stage: int | None) -> dict[str, Tensor]:
    """Writes a checkpoint if there is none, or reads it -> what the engine has then."""
    place = runtime.start("cpu", HANGS_S)
    trainer = make_trainer(Cell(place.world_size, ep, stage, 1, "adamw"), place, build_mesh(place, ep))
    if (base / "step_000000002").exists():
        load(trainer, base / "step_000000002")
    else:
        trainer.step()
        save(trainer, base)
    return stored(trainer)


def test_a_checkpoint_of_partitions_loads_on_another_number_of_ranks(tmp_path: Path) -> None:
    base = tmp_path / "ckpt"
    [whole] = run_ranks(1, write_and_read, tmp_path, base, 1, None)
    for world, ep, stage in ((4, 2, 2), (2, 2, 1)):
        for rank, got in enumerate(run_ranks(world, write_and_read, tmp_path, base, ep, stage)):
            for name, wanted in whole.items():
                rows = wanted.chunk(ep)[rank % ep] if is_stacked(name, wanted) else wanted
                assert torch.equal(got[name], rows), name


def pass_on(rank: int, cell: Cell, source: Path | None, target: Path) -> dict[str, Tensor]:
    """Reads a checkpoint, or trains a step, and writes one -> what the engine has."""
    place = runtime.start("cpu", HANGS_S)
    cfg = config_of(cell)
    trainer = make_trainer(cell, place, build_mesh(place, cell.ep, cfg.parallel))
    if source is None:
        trainer.step()
    else:
        load(trainer, source)
    save(trainer, target)
    return {name: rows_here(tensor).clone() for name, tensor in stored(trainer).items()}


def test_a_checkpoint_goes_through_every_engine_and_layout(tmp_path: Path) -> None:
    """What partitions of ZeRO 2 over four ranks wrote is read by shards of FSDP2, and so on, and back: same bits."""
    way = [
        Cell(),
        Cell(4, 2, 2),
        Cell(2, 2, fsdp=True),
        Cell(2, 1, 1),
        Cell(4, 4, 0),
        Cell(4, 1, fsdp=True),
        Cell(),
    ]
    source, ends = None, []
    for number, cell in enumerate(way):
        cell = replace(cell, optimizer="adamw")
        ranks = run_ranks(cell.world, pass_on, tmp_path, cell, source, tmp_path / str(number))
        source = tmp_path / str(number) / "step_000000002"
        ends.append(ranks[0])
    first, last = ends[0], ends[-1]
    assert first.keys() == last.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, last[name])] == []


# ------------------------------------------------------------------------------------------- launchers
LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"),
    "deepspeed": ("-m", "deepspeed.launcher.runner", "--num_gpus=2", "--no_local_rank", "--module"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_under_a_launcher(base: Path, launcher: str) -> None:
    """From the configuration: engine, stage and recomputation; the losses are those of the native engine."""
    losses = {}
    for engine in ("native", "deepspeed"):
        cfg = make_config(base, f"{launcher}-{engine}", "train.steps=4", f"parallel.engine={engine}")
        if engine == "native":
            finish(base, cfg)
        else:
            cfg = override_config(cfg, ["train.recompute=full", "parallel.zero_stage=2"])
            (base / f"{launcher}.yaml").write_text(dump_config(cfg))
            run_launcher(launcher, str(base / f"{launcher}.yaml"))
        losses[engine] = [step["loss"] for step in history(Path(cfg.out))]
    assert losses["deepspeed"] == pytest.approx(losses["native"], rel=2e-6)
    described = json.loads((Path(cfg.out) / "run.json").read_text())
    assert described["world_size"] == 2


def run_launcher(launcher: str, file: str) -> None:
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *LAUNCHERS[launcher], "epmoe", "train", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
