"""Runs in shards: the same start, the same records and text as native ones, and one engine goes on for another.

The same gradients, norms and weights, too. Checkpoints are in ``test_resize.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from epmoe import ModuleExperts
from epmoe.checkpoint.manifest import read_manifest, step_folder
from epmoe.config import Config
from epmoe.config_file import override_config
from epmoe.parallel.fsdp import rows_here, shard_model
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from epmoe.process.stop_signals import StopFlag
from epmoe.train.build import build_engine, build_model
from epmoe.train.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.distributed.runs import attempts, history, make_config, status
from tests.distributed.test_parity import (
    VOCAB,
    Cell,
    Results,
    Samples,
    assert_same_training,
    config,
    train_all,
    worst_error,
)
from tests.distributed.test_torchrun import LIMIT_S, log_of, torchrun
from tests.patience import HANGS_S

pytestmark = pytest.mark.timeout(300)  # all cells are trained when the first is asked for
SHORT = ["train.steps=4", "train.eval_every=2", "checkpoint.every=0"]
FSDP = ["parallel.engine=fsdp"]
HYBRID = [*FSDP, "parallel.fsdp_shard=hybrid", "parallel.ep_size=1"]


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    """Runs of two ranks, one after the other on the same ones, by name."""
    configs = {
        "native": make_config(base, "engine-native", *SHORT),
        "fsdp": make_config(base, "engine-fsdp", *SHORT, *FSDP),
        "hybrid": make_config(base, "engine-hybrid", *SHORT, *HYBRID),
        "poisoned": make_config(base, "engine-poisoned", *SHORT, *HYBRID),
        "to native": make_config(base, "engine-to-native", *SHORT, *FSDP),
        "to fsdp": make_config(base, "engine-to-fsdp", *SHORT),
    }
    stop = "point=train.step_start,rank=0,step=3,action=term"
    faults = {
        "poisoned": "point=train.after_backward,rank=1,step=2,action=nan",
        "to native": stop,
        "to fsdp": stop,
    }
    plan: list[tuple[Config, str | None]] = [(cfg, faults.get(name)) for name, cfg in configs.items()]
    plan += [
        (make_config(base, "engine-to-native", *SHORT), None),
        (make_config(base, "engine-to-fsdp", *SHORT, *FSDP), None),
    ]
    for found in run_ranks(2, attempts, base, plan):
        assert [end.code for end in found] == [0, 0, 0, 0, 75, 75, 0, 0], found
    return {name: Path(cfg.out) for name, cfg in configs.items()}


@pytest.mark.parametrize("name", ["fsdp", "hybrid", "to native", "to fsdp"])
def test_records_validation_and_text_are_those_of_a_native_run(name: str, folders: dict[str, Path]) -> None:
    wanted, found = history(folders["native"]), history(folders[name])
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "lr"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in wanted], rel=2e-6)
    assert [len(line["val"]) for line in found] == [0, 1, 0, 1]
    for line, native in zip(found, wanted, strict=True):
        assert line["val"] == pytest.approx(native["val"], rel=2e-6)
    samples = [json.loads((folders[run] / "summary.json").read_text())["sample"] for run in (name, "native")]
    assert samples[0] == samples[1] != ""


def test_one_copy_of_a_shard_that_is_not_finite_is_a_skipped_step_on_every_rank(
    folders: dict[str, Path],
) -> None:
    manifest = read_manifest(folders["poisoned"] / "ckpt" / step_folder(4))
    assert manifest.record.trainer["skipped"] == 1
    assert status(folders["poisoned"])["state"] == "done"


# ------------------------------------------------------------------------------------------- parity
CELLS: list[Cell] = [(1, 1, "native", precision, 1) for precision in ("fp32", "fp64")]
CELLS += [
    (world, ep, "fsdp", precision, accumulation)
    for world, ep in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
    for precision, accumulation in (("fp32", 1), ("fp64", 2))
]
CELLS += [(world, ep, "fsdp_hybrid", "fp64", 2) for world, ep in ((2, 1), (2, 2), (4, 2), (4, 4))]
CELLS += [(2, 2, f"fsdp_{recompute}", "fp64", 2) for recompute in ("full", "selective")]


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All cells of this file."""
    return train_all(CELLS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_shards_are_trained_as_one_process_would(parity: Results, cell: Cell) -> None:
    [reference] = parity[(1, 1, "native", cell[3], 1)]
    assert_same_training(parity[cell], reference, cell[3])


@pytest.mark.parametrize("engine", ["fsdp", "fsdp_hybrid"])
def test_shards_are_trained_and_make_up_the_whole_model(parity: Results, engine: str) -> None:
    [reference] = parity[(1, 1, "native", "fp64", 1)]
    for (_, _, name, precision, _), ranks in parity.items():
        if (name, precision) != (engine, "fp64"):
            continue
        assert all(worst_error("weights", rank, reference)[0] <= 1e-9 for rank in ranks)
        for parameter, gradient in reference["gradients"].items():
            held = set()
            for rank in ranks:
                first, shape = rank["where"][parameter]
                held |= set(range(first, first + rank["gradients"][parameter].shape[0]))
                assert shape == gradient.shape
            assert held == set(range(gradient.shape[0])), parameter


# ------------------------------------------------------------------------------------------- the start
def _starts(rank: int) -> None:
    place = runtime.start("cpu", HANGS_S)
    for precision in ("fp32", "bf16_params"):
        for ep_size in (1, 2):
            mesh = build_mesh(place, ep_size)
            native = config("deepseek", precision, 1, 2)
            engines = []
            for cfg in (native, override_config(native, FSDP)):
                model = build_model(cfg, VOCAB + 1, device=place.device, mesh=mesh)
                engines.append(build_engine(cfg, model, mesh))
            whole, shards = engines
            parts = [engine.gradients() for engine in engines]
            assert parts[0].keys() == parts[1].keys()
            for name, tensor in shards.weights().items():
                wanted, local = whole.weights()[name], rows_here(tensor)
                if name in parts[0]:
                    assert parts[1][name].shape == parts[0][name].shape
                    first = parts[1][name].first_row - parts[0][name].first_row
                    wanted = wanted[first : first + local.shape[0]]
                assert local.dtype == wanted.dtype == torch.float32
                assert torch.equal(local, wanted), name
            held = torch.tensor(sum(part.local.numel() for part in parts[1].values()))
            torch.distributed.all_reduce(held)
            assert held == sum(torch.Size(part.shape).numel() for part in parts[0].values()), (
                "nothing is held twice"
            )


def test_shards_start_with_the_bits_of_native_weights(tmp_path: Path) -> None:
    run_ranks(2, _starts, tmp_path)


def _modules(rank: int) -> str:
    place = runtime.start("cpu", HANGS_S)
    model = build_model(config("topk", "fp32", 1, 1), VOCAB, device=place.device)
    next(model.moe_layers()).experts = ModuleExperts([nn.Identity()])
    with pytest.raises(ValueError, match="ModuleExperts") as caught:
        shard_model(
            model, build_mesh(place, 1), hybrid=False, compute_dtype=None, materialise=lambda *_: None
        )
    return str(caught.value)


def test_experts_that_are_modules_are_refused(tmp_path: Path) -> None:
    [message] = run_ranks(1, _modules, tmp_path)
    assert "blocks.0.moe.experts is a ModuleExperts" in message
    assert "engine native" in message


def _two_experts_only(rank: int) -> list[list[float]]:
    place = runtime.start("cpu", HANGS_S)
    found = []
    for ep_size in (1, 2, 4):
        cfg = override_config(config("topk", "fp64", 2, 4), [*FSDP, "moe.capacity_factor=null"])
        mesh = build_mesh(place, ep_size)
        model = build_model(cfg, VOCAB, device=place.device, mesh=mesh)
        trainer = Trainer(cfg, place, mesh, model=model, data=Samples(), stop=StopFlag())  # type: ignore[arg-type]
        for name, tensor in trainer.engine.weights().items():
            if name.endswith("router.weight"):
                rows_here(tensor).zero_()  # equal logits: everything goes to experts 0 and 1
        result = trainer.step()
        sums = torch.zeros(4, dtype=torch.float64)
        for name, part in trainer.engine.gradients().items():
            if name.endswith("experts.w_in"):
                rows = slice(part.first_row, part.first_row + part.local.shape[0])
                sums[rows] += part.local.abs().sum(dim=(1, 2))
        torch.distributed.all_reduce(sums)
        found.append([result.grad_norm, *sums.tolist()])
    return found


def test_experts_and_ranks_without_a_row_have_zero_gradients_and_wait_for_nobody(tmp_path: Path) -> None:
    for layouts in run_ranks(4, _two_experts_only, tmp_path):
        for norm, *by_expert in layouts:
            assert norm == pytest.approx(layouts[0][0], rel=1e-12)
            assert by_expert == pytest.approx(layouts[0][1:], rel=1e-9)
            assert by_expert[0] > 0 < by_expert[1]
            assert by_expert[2:] == [0.0, 0.0]


# ------------------------------------------------------------------------------------------- a real job
@pytest.mark.slow
@pytest.mark.torchrun
def test_a_job_of_torchrun_in_shards_is_finished_by_native_ranks(
    base: Path, folders: dict[str, Path]
) -> None:
    config = make_config(base, "job-fsdp", *SHORT, *FSDP)
    stop = "point=train.step_start,rank=1,step=3,action=term"
    with torchrun(base, config, fault=stop) as agent:
        assert agent.wait(LIMIT_S) != 0
    assert status(Path(config.out))["exit_code"] == 75, "\n".join(log_of(config)[-40:])
    assert any("engine fsdp" in line for line in log_of(config))
    native = make_config(base, "job-fsdp", *SHORT)
    with torchrun(base, native) as agent:
        assert agent.wait(LIMIT_S) == 0, "\n".join(log_of(native)[-40:])
    assert any("changed since: parallel.engine: fsdp -> native" in line for line in log_of(native))
    losses, wanted = ([line["loss"] for line in history(f)] for f in (Path(native.out), folders["native"]))
    assert losses == pytest.approx(wanted, rel=2e-6)
