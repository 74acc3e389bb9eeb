"""Checkpoints across ranks: other layouts read them bit for bit, and no accident leaves half of one."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from epmoe.checkpoint import manifest
from epmoe.checkpoint import store as checkpoint
from epmoe.checkpoint.store import (
    UNFINISHED,
    find_resumable,
    load_checkpoint,
    load_weights,
    remove_unfinished,
    save_checkpoint,
)
from epmoe.checkpoint.tensor_layout import local_tensors
from epmoe.engines.native import NativeEngine
from epmoe.errors import CheckpointError, UnreachableCheckpoint
from epmoe.parallel.mesh import ExpertMesh, build_mesh
from epmoe.process.runtime import start
from tests.distributed.harness import rank_outcomes, run_ranks
from tests.distributed.tiny import NUM_EXPERTS, Tiny, record, tiny_model, trained


def _mesh(ep_size: int) -> ExpertMesh:
    return build_mesh(start("cpu", 20), ep_size)


def _save(folder: Path, model: nn.Module, engine: NativeEngine, mesh: ExpertMesh, step: int) -> None:
    save_checkpoint(folder, model=model, engine=engine, mesh=mesh, record=record(step), keep=5)


def _assert_same(model: nn.Module, engine: NativeEngine, mesh: ExpertMesh, steps: int) -> None:
    """The tensors are, bit for bit, those of a fresh model trained for ``steps`` steps in this layout."""
    fresh = tiny_model(mesh, listed=hasattr(model, "other"))
    wanted = local_tensors(fresh, trained(fresh, mesh, steps))
    found = local_tensors(model, engine)
    assert found.keys() == wanted.keys()
    different = [key for key, tensor in found.items() if not torch.equal(tensor, wanted[key])]
    assert different == []


# ------------------------------------------------------------------------------------------- layouts
def _pass_on(rank: int, folder: Path, ep_sizes: list[int], first: bool) -> list[list[str]]:
    """Loads the newest checkpoint in each layout in turn and saves it again from there."""
    files = []
    for ep_size in ep_sizes:
        mesh = _mesh(ep_size)
        model = tiny_model(mesh, listed=True)
        if first:
            engine, step = trained(model, mesh, 3), 1
        else:
            engine = trained(model, mesh, 0)
            found = find_resumable(folder).checkpoint
            assert found is not None
            read = load_checkpoint(found, model=model, engine=engine, mesh=mesh)
            assert read == record(read.step)
            _assert_same(model, engine, mesh, 3)
            step = read.step + 1
        first = False
        _save(folder, model, engine, mesh, step)
        files.append(sorted(path.name for path in (folder / f"step_{step:09d}").iterdir()))
    return files


def test_weights_and_moments_survive_any_change_of_layout_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    (files, *_) = run_ranks(4, _pass_on, tmp_path, folder, [4, 2, 1], True)
    assert files[0] == ["manifest.json", *(f"shard_{rank:05d}.safetensors" for rank in range(4))]
    run_ranks(2, _pass_on, tmp_path, folder, [2, 1], False)
    run_ranks(1, _pass_on, tmp_path, folder, [1], False)
    run_ranks(2, _pass_on, tmp_path, folder, [1, 2], False)
    run_ranks(4, _pass_on, tmp_path, folder, [4], False)


def _init_from(rank: int, folder: Path) -> None:
    found = find_resumable(folder).checkpoint
    assert found is not None
    mesh = _mesh(4)
    model = tiny_model(mesh).bfloat16()
    engine = trained(model, mesh, 0)  # float32 masters of other values
    load_weights(found, model=model, engine=engine, mesh=mesh)
    fresh = tiny_model(mesh)
    wanted = trained(fresh, mesh, 2).weights()
    for name, tensor in engine.weights().items():
        assert torch.equal(tensor, wanted[name])
    assert torch.equal(model.experts.w_in, wanted["experts.w_in"].bfloat16())
    assert not any(tensor.any() for tensor in engine.state().values())


def _write_one(rank: int, folder: Path, ep_size: int) -> None:
    mesh = _mesh(ep_size)
    model = tiny_model(mesh)
    _save(folder, model, trained(model, mesh, 2), mesh, 2)


def test_starting_from_weights_fills_masters_in_full_precision(tmp_path: Path) -> None:
    run_ranks(2, _write_one, tmp_path, tmp_path / "ckpt", 2)
    run_ranks(4, _init_from, tmp_path, tmp_path / "ckpt")


# ------------------------------------------------------------------------------------------- accidents
KILLS = [
    ("ckpt.stage", 1, "previous"),
    ("ckpt.mid_shard", 1, "previous"),
    ("ckpt.shard_done", 1, "previous"),
    ("ckpt.before_manifest", 0, "previous"),
    ("ckpt.after_manifest", 0, "previous"),
    ("ckpt.before_rename", 0, "previous"),
    ("ckpt.after_rename", 0, "new"),
    ("ckpt.before_latest", 0, "new"),
]


def _killed_while_saving(rank: int, folder: Path, point: str, victim: int) -> None:
    mesh = _mesh(2)
    model = tiny_model(mesh)
    _save(folder, model, trained(model, mesh, 1), mesh, 1)
    os.environ["EPMOE_FAULT"] = f"point={point},rank={victim},step=2,action=kill"
    model = tiny_model(mesh)
    _save(folder, model, trained(model, mesh, 2), mesh, 2)


def _recovers(rank: int, folders: list[Path], expected: list[int]) -> list[int]:
    mesh = _mesh(1)
    steps = []
    for folder, step in zip(folders, expected, strict=True):
        remove_unfinished(folder)
        assert not list(folder.glob(f"{UNFINISHED}*"))
        found = find_resumable(folder)
        assert found.checkpoint is not None
        model = tiny_model(mesh)
        engine = trained(model, mesh, 0)
        read = load_checkpoint(found.checkpoint, model=model, engine=engine, mesh=mesh)
        _assert_same(model, engine, mesh, read.step)
        assert read.step == step
        if (folder / "latest.json").exists():
            named = (folder / "latest.json").read_text().split('"folder": "')[1].split('"')[0]
            assert (folder / named / "manifest.json").exists()
        steps.append(read.step)
    return steps


def test_a_kill_at_any_point_leaves_the_previous_or_the_new_checkpoint_whole(tmp_path: Path) -> None:
    folders = []
    for point, victim, result in KILLS:
        folder = tmp_path / point / "ckpt"
        outcomes = rank_outcomes(2, _killed_while_saving, tmp_path, folder, point, victim)
        assert outcomes[victim].exit_code == -signal.SIGKILL, point
        assert bool(list(folder.glob(f"{UNFINISHED}*"))) == (result == "previous"), point
        folders.append(folder)
    expected = [1 if result == "previous" else 2 for *_, result in KILLS]
    assert run_ranks(1, _recovers, tmp_path, folders, expected) == [expected]


class Padded(Tiny):
    """With a tensor that is larger than the limit in the next test."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__(first, count)
        self.padding = nn.Parameter(torch.zeros(2, 50_000))


def _disk_full(rank: int, folder: Path) -> list[Any]:
    mesh = _mesh(2)
    model = Padded(mesh.ep_rank * 2, 2)
    engine = trained(model, mesh, 1)
    _save(folder, model, engine, mesh, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        _save(folder, model, engine, mesh, 2)
        message = "saved"
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()  # rank 0 clears up
    left = sorted(path.name for path in folder.iterdir())
    dist.barrier()  # everybody has looked
    _save(folder, model, engine, mesh, 3)
    found = find_resumable(folder)
    return [message, left, found.checkpoint is not None and found.checkpoint.path.name, found.rejected]


def test_a_full_disk_stops_the_save_on_all_ranks_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for message, left, newest, rejected in run_ranks(2, _disk_full, tmp_path, tmp_path / "ckpt"):
        assert "cannot write" in message
        assert ".safetensors: File too large" in message
        assert "bytes; the file system has" in message
        assert left == ["latest.json", "step_000000001"]
        assert (newest, rejected) == ("step_000000003", ())


def _wrong_experts(rank: int, folder: Path) -> dict[str, str]:
    mesh = _mesh(2)
    models = {
        "both ranks call theirs 0 and 1": Tiny(0, 2),
        "expert 3 is dropped": Tiny(0, 2) if rank == 0 else Tiny(2, 1),
        "swapped": Tiny(2 - 2 * rank, 2),
        "modules twice": Tiny(0, 2, listed=True) if rank == 0 else _relabelled(),
        "dense differs": Tiny(2 * rank, 2, width=3 + rank),
    }
    said = {}
    for name, model in models.items():
        engine = trained(model, mesh, 0)
        try:
            _save(folder, model, engine, mesh, 1)
            said[name] = "saved"
        except CheckpointError as error:
            said[name] = str(error)
    assert not folder.exists()
    return said


def _relabelled() -> Tiny:
    """Experts 2 and 3 stacked, but 0 and 1 as modules."""
    model = Tiny(2, 2)
    model.other = Tiny(0, 2, listed=True).other
    return model


def test_a_save_in_which_an_expert_is_held_twice_or_by_nobody_is_refused(tmp_path: Path) -> None:
    assert NUM_EXPERTS == 4
    for said in run_ranks(2, _wrong_experts, tmp_path, tmp_path / "ckpt"):
        assert (
            "experts [0, 1] are held twice, experts [2, 3] by no rank"
            in said["both ranks call theirs 0 and 1"]
        )
        assert "experts [] are held twice, experts [3] by no rank" in said["expert 3 is dropped"]
        assert "not in rank order" in said["swapped"]
        assert "other.experts.experts.*.weight" in said["modules twice"]
        assert "experts [0, 1] are held twice" in said["modules twice"]
        assert "model.norm differs between ranks" in said["dense differs"]


def _drifted(rank: int, folder: Path, ep_size: int, name: str) -> str:
    mesh = _mesh(ep_size)
    model = tiny_model(mesh, listed=True)
    engine = trained(model, mesh, 1)
    changed = {**engine.weights(), **engine.state()}[name]
    if rank == 1:
        changed.detach().view(-1)[-1] += 1
    try:
        _save(folder, model, engine, mesh, 1)
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(
    ("ep_size", "name", "says"),
    [
        (2, "norm", "model.norm is one on rank(s) [0] and another on [1]"),
        (2, "norm.exp_avg", "optim.norm.exp_avg is one"),
        (2, "steps_seen", "model.steps_seen is one"),
        (1, "experts.w_in", "model.experts.w_in (part 0) is one on rank(s) [0] and another on [1]"),
        (1, "other.experts.experts.3.weight", "model.other.experts.experts.3.weight is one"),
        (2, "experts.w_in", "saved"),
    ],
)
def test_replicas_that_differ_are_found_before_they_are_written(
    ep_size: int, name: str, says: str, tmp_path: Path
) -> None:
    for said in run_ranks(2, _drifted, tmp_path, tmp_path / "ckpt", ep_size, name):
        assert says in said
    assert (tmp_path / "ckpt").exists() == (says == "saved")


def _saves_on_a_full_disk(rank: int, folder: Path) -> list[str]:
    """Rank 1 finds no space for the third, until something has made room."""
    mesh = _mesh(2)
    model = tiny_model(mesh)
    engine = trained(model, mesh, 1)
    for step in (1, 2):
        _save(folder, model, engine, mesh, step)
    make_room = checkpoint._make_room

    def then_there_is_room(*args: Any) -> bool:
        del os.environ["EPMOE_FAULT"]
        return make_room(*args)

    checkpoint._make_room = then_there_is_room
    os.environ["EPMOE_FAULT"] = "point=ckpt.mid_shard,rank=1,step=3,action=enospc"
    _save(folder, model, engine, mesh, 3)
    dist.barrier()
    return sorted(path.name for path in folder.iterdir())


def test_on_a_full_disk_the_oldest_makes_room_and_the_save_succeeds(tmp_path: Path) -> None:
    for left in run_ranks(2, _saves_on_a_full_disk, tmp_path, tmp_path / "ckpt"):
        assert left == ["latest.json", "step_000000002", "step_000000003"]


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 4
    path.write_bytes(raw)


LIES: dict[str, tuple[str, str, str]] = {
    "a bit of a shard": ("_read_back", "shard_00001.safetensors", "has CRC-32"),
    "the end of a shard": ("_read_back", "shard_00000.safetensors", "bytes, expected"),
    "a whole shard": ("_read_back", "shard_00001.safetensors", "No such file"),
    "a bit of the manifest": ("_read_manifest_back", "manifest.json", "CRC-32 is wrong"),
    "another manifest": ("_read_manifest_back", "manifest.json", "is another one"),
}
"""What a disk does after it said that all is written: before which step, to which file, and what is said."""


def _lie(what: str, path: Path, older: Path) -> None:
    if what.startswith("a bit"):
        _flip(path)
    elif what == "the end of a shard":
        os.truncate(path, path.stat().st_size - 1)
    elif what == "a whole shard":
        path.unlink()
    else:
        path.write_bytes((older / "manifest.json").read_bytes())


def _saves_on_a_disk_that_lies(rank: int, folder: Path, what: str) -> list[Any]:
    point, name, _ = LIES[what]
    mesh = _mesh(2)
    model = tiny_model(mesh)
    _save(folder, model, trained(model, mesh, 1), mesh, 1)
    original = getattr(checkpoint, point)

    def after_the_lie(temporary: Path, *rest: Any) -> Any:
        if rank == 0:
            _lie(what, temporary / name, folder / "step_000000001")
        if point == "_read_back":
            dist.barrier()
        return original(temporary, *rest)

    setattr(checkpoint, point, after_the_lie)
    engine = trained(model, mesh, 2)
    try:
        save_checkpoint(folder, model=model, engine=engine, mesh=mesh, record=record(2), keep=1)
        said, code = "saved", 0
    except CheckpointError as error:
        said, code = str(error), error.exit_code
    dist.barrier()
    found = find_resumable(folder).checkpoint
    newest = found.path.name if found else None
    return [said, code, newest, sorted(path.name for path in folder.iterdir())]


@pytest.mark.parametrize("what", LIES)
def test_what_the_disk_gives_back_otherwise_never_becomes_a_checkpoint(what: str, tmp_path: Path) -> None:
    _, name, says = LIES[what]
    for said, code, newest, left in run_ranks(
        2, _saves_on_a_disk_that_lies, tmp_path, tmp_path / "ckpt", what
    ):
        assert says in said
        assert name in said
        assert "does not give back what was just written" in said
        assert "older checkpoints are untouched" in said
        assert (code, newest) == (4, "step_000000001")
        assert left == ["latest.json", "step_000000001"]
    latest = (tmp_path / "ckpt" / "latest.json").read_text()
    assert "step_000000001" in latest


def _damaged_on_another_rank(rank: int, folder: Path) -> list[Any]:
    mesh = _mesh(2)
    model = tiny_model(mesh)
    for step in (1, 2):
        _save(folder, model, trained(model, mesh, 1), mesh, step)
    shard = folder / "step_000000002" / "shard_00001.safetensors"
    if rank == 0:
        _flip(shard)
    dist.barrier()
    found = find_resumable(folder)
    assert found.checkpoint is not None
    _save(folder, model, trained(model, mesh, 1), mesh, 2)  # the run gets to the same step again
    again = find_resumable(folder)
    assert again.checkpoint is not None
    assert again.checkpoint.path.name == "step_000000002"
    assert not list(folder.glob(f"{UNFINISHED}*"))
    return [found.checkpoint.path.name, found.rejected]


def test_all_ranks_reject_a_checkpoint_that_one_of_them_finds_damaged_and_replace_it(tmp_path: Path) -> None:
    for name, rejected in run_ranks(2, _damaged_on_another_rank, tmp_path, tmp_path / "ckpt"):
        assert name == "step_000000001"
        assert len(rejected) == 1
        assert "step_000000002 is damaged: shard_00001.safetensors has CRC-32" in rejected[0]


def _unreadable_on_one_rank(rank: int, folder: Path) -> list[str]:
    mesh = _mesh(2)
    model = tiny_model(mesh)
    for step in (1, 2):
        _save(folder, model, trained(model, mesh, 1), mesh, step)
    if rank == 1:
        manifest.crc32_of = Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    try:
        find_resumable(folder)
    except UnreachableCheckpoint as error:
        return [error.what, *sorted(path.name for path in folder.iterdir())]
    return ["passed over"]


def test_no_rank_passes_over_what_another_cannot_read(tmp_path: Path) -> None:
    for said, *left in run_ranks(2, _unreadable_on_one_rank, tmp_path, tmp_path / "ckpt"):
        assert "step_000000002/shard_00001.safetensors cannot be read: Input/output error (EIO)" in said
        assert left == ["latest.json", "step_000000001", "step_000000002"]


def _values(rank: int, folder: Path) -> dict[str, Tensor]:
    """float64, bfloat16, integers, a scalar and an empty tensor through DCP and our own writer."""
    mesh = _mesh(1)
    model = nn.Module()
    for index, dtype in enumerate((torch.float64, torch.bfloat16, torch.int32, torch.uint8, torch.bool)):
        model.register_buffer(f"b{index}", (torch.arange(3 + index) % 2).to(dtype))
    model.register_buffer("empty", torch.zeros(0, 3))
    model.register_buffer("scalar", torch.tensor(2.5))
    model.w = nn.Parameter(torch.zeros(1))
    _save(folder, model, trained(model, mesh, 1), mesh, 1)
    wanted = {name: value.clone() for name, value in model.named_buffers()}
    for value in model.buffers():
        value.zero_()
    engine = trained(model, mesh, 0)
    found = find_resumable(folder).checkpoint
    assert found is not None
    load_checkpoint(found, model=model, engine=engine, mesh=mesh)
    return {name: value for name, value in model.named_buffers() if not torch.equal(value, wanted[name])}


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    assert run_ranks(2, _values, tmp_path, tmp_path / "ckpt") == [{}, {}]
