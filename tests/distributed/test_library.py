"""The layer in models of other people: under DDP, FSDP2 and DeepSpeed, and what happens without the call they need."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from epmoe import shard_experts
from epmoe.parallel import ddp, deepspeed, fsdp
from epmoe.parallel.fsdp import rows_here
from epmoe.parallel.mesh import ExpertMesh, build_mesh
from epmoe.process import runtime
from tests.distributed.harness import run_ranks
from tests.examples import example
from tests.patience import HANGS_S

WITH_DEEPSPEED = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed; make test-slow does it",
    ),
]
EXAMPLES = ["ddp_moe", "fsdp_moe", pytest.param("deepspeed_moe", marks=WITH_DEEPSPEED)]
STOPPED = {
    "ddp_moe": "nobody sums their gradients",
    "fsdp_moe": "nobody sums their gradients",
    "deepspeed_moe": "expert data parallel group is not initialized",
}
"""What an example says when nobody has called ``prepare``."""


def run(rank: int, name: str, helper: str | None) -> float | str:
    """What an example returns, or why it stops when the call of a helper is removed."""
    module = example(name)
    with pytest.MonkeyPatch.context() as patch:
        if helper is not None:
            patch.setattr(module, helper, lambda model, mesh: None)
        try:
            loss: float = module.main()
            return loss
        except (AssertionError, RuntimeError, ValueError) as error:
            return str(error)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_learns(tmp_path: Path, name: str) -> None:
    lines = Path(str(example(name).__file__)).read_text().splitlines()
    assert len(lines) < 60
    assert all(loss < 0.1 for loss in run_ranks(2, run, tmp_path, name, None))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_stops_without_its_helpers(tmp_path: Path, name: str) -> None:
    for stopped in run_ranks(2, run, tmp_path, name, "prepare"):
        assert STOPPED[name] in stopped
    for stopped in run_ranks(2, run, tmp_path, name, "shard_experts"):
        assert "holds 4 experts, but 4 over 2 ranks are 2 on each; call epmoe.shard_experts" in stopped


# ------------------------------------------------------------------------------------------- gradients
MICRO = 2
"""Backward passes of a step."""


def prepared(mesh: ExpertMesh | None, wrapper: str) -> tuple[nn.Module, nn.Module]:
    """The model in float64, and what is called."""
    model = example("reverser").Reverser().double()
    if mesh is None:
        return model, model
    shard_experts(model, mesh)
    if wrapper == "ddp":
        if (
            mesh.ep_rank + mesh.edp_rank * mesh.ep_size >= mesh.ep_size
        ):  # copies begin alike, whatever they were
            model.moe.experts.w_in.data.fill_(torch.nan)
        ddp.prepare(model, mesh)
        return model, DistributedDataParallel(model)
    fsdp.prepare(model, mesh)
    fully_shard(model)
    return model, model


def gradients(rank: int, ep_size: int, wrapper: str) -> dict[str, tuple[Tensor, int]]:
    """Of one step in two micro-batches: this rank's rows of each tensor, and which is the first."""
    place = runtime.start("cpu", HANGS_S)
    mesh = build_mesh(place, ep_size)
    model, wrapped = prepared(mesh, wrapper)
    for micro in range(MICRO):
        wrapped(example("reverser").batch(micro, rank, place.world_size)).backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        rows, part, parts, before = rows_here(parameter.grad), rank, place.world_size, 0
        total = parameter.shape[0]
        if "experts" in name:
            part, parts, before = mesh.edp_rank, mesh.edp_size, mesh.ep_rank * (4 // ep_size)
        # FSDP gives each rank ceil(rows / ranks), as long as there are some left.
        first = min(part * -(-total // parts), total) if wrapper == "fsdp" else 0
        found[name] = (rows.clone(), before + first)
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """The gradients of one process that has the batches of all four ranks: the mean over ranks, as wrappers have it."""
    model, _ = prepared(None, "")
    for micro in range(MICRO):
        for rank in range(4):
            (model(example("reverser").batch(micro, rank, 4)) / 4).backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(
    tmp_path: Path, whole: dict[str, Tensor], wrapper: str, ep_size: int
) -> None:
    ranks: list[dict[str, Any]] = run_ranks(4, gradients, tmp_path, ep_size, wrapper)
    for found in ranks:
        assert found.keys() == whole.keys()
    for name, wanted in whole.items():
        for found in ranks:
            rows, first = found[name]
            torch.testing.assert_close(rows, wanted[first : first + rows.shape[0]], rtol=1e-9, atol=1e-15)


def deepspeed_gradients(rank: int, ep_size: int, stage: int) -> dict[str, tuple[Tensor, int]]:
    """As ``gradients``, in float32: DeepSpeed's ZeRO knows no float64."""
    from deepspeed.utils import safe_get_full_grad

    place = runtime.start("cpu", HANGS_S)
    mesh = build_mesh(place, ep_size)
    model = example("reverser").Reverser()
    shard_experts(model, mesh)
    deepspeed.prepare(model, mesh)
    settings = example("deepspeed_moe").CONFIG | {
        "gradient_accumulation_steps": MICRO,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.load_deepspeed("cpu").initialize(model=model, config=settings)
    for micro in range(MICRO):
        engine.backward(engine(example("reverser").batch(micro, rank, place.world_size)))
        if micro < MICRO - 1:
            engine.step()
    return {
        name: (
            MICRO * safe_get_full_grad(parameter),
            mesh.ep_rank * (4 // ep_size) if "experts" in name else 0,
        )
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("stage", "ep_size"), [pytest.param(*way, marks=WITH_DEEPSPEED) for way in ((0, 2), (1, 4), (2, 2))]
)
def test_deepspeed_has_the_gradients_of_one_process(
    tmp_path: Path, whole: dict[str, Tensor], stage: int, ep_size: int
) -> None:
    deepspeed.load_deepspeed("cpu")  # once here instead of seconds in every child
    for found in run_ranks(4, deepspeed_gradients, tmp_path, ep_size, stage):
        assert found.keys() == whole.keys()
        for name, wanted in whole.items():
            rows, first = found[name]
            wanted = wanted[first : first + rows.shape[0]].float()
            assert float((rows - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), name
