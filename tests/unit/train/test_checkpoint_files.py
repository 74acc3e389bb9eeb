"""A checkpoint on disk against everything that can happen to files: bits, truncation, other models, planted code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import safe_open

import epmoe.data.files
from epmoe.checkpoint.manifest import MANIFEST, TensorRecord, candidates, read_manifest
from epmoe.checkpoint.safetensors_writer import ShardReader, incomplete_tensors, read_pieces
from epmoe.checkpoint.store import (
    Checkpoint,
    _compare_space,
    _make_room,
    checkpoint_bytes,
    find_resumable,
    load_weights,
    open_checkpoint,
    prune,
    remove_unfinished,
    save_checkpoint,
    verify_checkpoint,
)
from epmoe.checkpoint.tensor_layout import MAX_LISTED, differences
from epmoe.cli.rewind import rewind
from epmoe.errors import CheckpointError, ConfigError, UnreachableCheckpoint
from epmoe.parallel.mesh import build_mesh
from epmoe.process.runtime import start
from epmoe.train import lock
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import Tiny, draw, record, rewrite_manifest, tiny_model, trained


def _write(rank: int, folder: Path) -> None:
    mesh = build_mesh(start("cpu", 20), 2)
    for step in (1, 2):
        model = tiny_model(mesh)
        engine = trained(model, mesh, step)
        save_checkpoint(folder, model=model, engine=engine, mesh=mesh, record=record(step), keep=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with steps 1 and 2, saved by two ranks that shared the experts."""
    run = tmp_path_factory.mktemp("run")
    run_ranks(2, _write, run, run / "ckpt")
    return run


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def _newest(run: Path) -> Path:
    return run / "ckpt" / "step_000000002"


# ------------------------------------------------------------------------------------------- damage
def _flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 16
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit flipped": _flip_a_bit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_and_the_older_checkpoint_used(
    damage: str, written: Path, tmp_path: Path
) -> None:
    names = [path.name for path in _newest(written).iterdir()]
    assert len(names) == 3
    for name in names:
        run = Path(shutil.copytree(written, tmp_path / name))
        DAMAGES[damage](_newest(run) / name)
        found = find_resumable(run / "ckpt")
        assert found.checkpoint is not None
        assert found.checkpoint.manifest.record.step == 1
        assert len(found.rejected) == 1
        assert name in found.rejected[0]
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
            verify_checkpoint(_newest(run))
        assert caught.value.exit_code == 4


def test_every_single_bit_of_a_manifest_and_of_a_shards_header_counts(run: Path) -> None:
    for path in (_newest(run) / MANIFEST, _newest(run) / "shard_00000.safetensors"):
        raw = bytearray(path.read_bytes())
        for position in range(0, min(len(raw), 1500), 7):
            raw[position] ^= 1 << position % 8
            path.write_bytes(raw)
            with pytest.raises(CheckpointError):
                verify_checkpoint(_newest(run))
            raw[position] ^= 1 << position % 8
        path.write_bytes(raw)
    verify_checkpoint(_newest(run))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format=99), "format 99; this epmoe reads format 1"),
        (lambda m: m.pop("format"), "has format None"),
        (lambda m: m["record"].update(step="two"), "record.step"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m["files"].update({"../outside.safetensors": {"size": 0, "crc32": 0}}), "names the file"),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 0, "crc32": 0}}), "names the file"),
        (
            lambda m: m["files"].pop("shard_00001.safetensors"),
            "shard_00001.safetensors is not in manifest.json",
        ),
        (lambda m: m["record"].update(step=7), "holds the checkpoint of step 7: the folder was renamed"),
        (lambda m: m["tensors"]["model.norm"].update(shape=[-1]), "tensors.model.norm.shape"),
        (lambda m: m["tensors"]["model.norm"].update(shape=[10**12]), "lists tensors of"),
        (lambda m: m["tensors"]["model.norm"].update(dtype="F33"), "'F33' is no type of a tensor"),
        (lambda m: m["tensors"]["model.norm"].update(shape=[]), r"model.norm: held as F32 \[3\] in shard_"),
        (
            lambda m: m["tensors"]["model.temperature"].update(shape=[1]),
            r"model.temperature: held as F32 \[\]",
        ),
        (lambda m: m["files"].update({"a\0b.safetensors": {"size": 0, "crc32": 0}}), "names the file"),
        (lambda m: m["record"].update(samples=2**40), "record.samples"),
        (lambda m: m["record"].update(tokens=2**63), "record.tokens"),
        (lambda m: m["record"].update(trainer=None), "record.trainer"),
        (lambda m: m["tensors"].pop("model.norm"), "model.norm is in shard_.*, but not expected"),
        (lambda m: m["tensors"].clear(), "but not expected"),
    ],
    ids=[
        "newer",
        "no format",
        "wrong type",
        "unknown key",
        "parent folder",
        "absolute",
        "unlisted shard",
        "other step",
        "negative size",
        "more than its files hold",
        "unknown type",
        "no shape",
        "a shape where there is none",
        "null character",
        "too many samples",
        "too many tokens",
        "no counters",
        "tensor left out",
        "no tensors",
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(change: Any, says: str, run: Path) -> None:
    rewrite_manifest(_newest(run), change)
    with pytest.raises(CheckpointError, match=says):
        verify_checkpoint(_newest(run))
    assert "\n" not in find_resumable(run / "ckpt").rejected[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_not_an_object_is_refused(text: str, run: Path) -> None:
    (_newest(run) / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        read_manifest(_newest(run))


def test_latest_json_is_for_people_only(run: Path) -> None:
    (run / "ckpt" / "latest.json").write_text('{"step": 7, "folder": "../../step_000000007"}')
    assert open_checkpoint(run).path == _newest(run)


# ------------------------------------------------------------------------------------------- finding
def test_a_checkpoint_is_named_by_its_folder_its_run_or_the_folder_of_checkpoints(run: Path) -> None:
    older = run / "ckpt" / "step_000000001"
    assert open_checkpoint(older).path == older
    assert open_checkpoint(run).path == open_checkpoint(run / "ckpt").path == _newest(run)


def test_a_path_without_a_checkpoint_says_what_was_looked_for(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path, run / ".." / "x"):
        with pytest.raises(CheckpointError, match="no usable checkpoint"):
            open_checkpoint(path)
    for step in (1, 2):
        (run / "ckpt" / f"step_{step:09d}" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"step_000000002 has no manifest.json.*step_000000001 has no"):
        open_checkpoint(run)


def test_other_names_are_not_candidates(run: Path) -> None:
    (run / "ckpt" / "step_000000008").write_text("a file")
    for name in ("step_9", "step_0000000100", ".tmp-step_000000010-ab", "step_00000001x"):
        (run / "ckpt" / name).mkdir()
    assert [path.name for path in candidates(run / "ckpt")] == ["step_000000002", "step_000000001"]


def test_order_is_by_step_not_by_clock(run: Path) -> None:
    os.utime(_newest(run), (1, 1))
    assert open_checkpoint(run).path == _newest(run)


# ------------------------------------------------------------------------------------------- retention
def _more(run: Path, *steps: int) -> Path:
    """Adds copies under the names of other steps; all have been seen whole then."""
    for step in (1, *steps):
        folder = run / "ckpt" / f"step_{step:09d}"
        if step > 1:
            shutil.copytree(_newest(run), folder)
            rewrite_manifest(folder, lambda m: m["record"].update(step=step))  # noqa: B023 - called at once
        verify_checkpoint(folder)
    verify_checkpoint(_newest(run))
    return run / "ckpt"


def _steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in candidates(folder)]


def test_the_newest_are_kept(run: Path) -> None:
    folder = _more(run, 3, 4)
    prune(folder, 3)
    assert _steps(folder) == [4, 3, 2]
    prune(folder, 1)
    assert _steps(folder) == [4]


def test_what_is_found_damaged_does_not_push_out_good_ones(run: Path) -> None:
    folder = _more(run, 3, 4)
    for step in (3, 4):
        _flip_a_bit(folder / f"step_{step:09d}" / "shard_00000.safetensors")
    assert find_resumable(folder).checkpoint.path == _newest(run)  # type: ignore[union-attr]
    prune(folder, 3)
    assert _steps(folder) == [4, 3, 2, 1]  # only two are known to be good
    prune(folder, 1)
    assert _steps(folder) == [4, 3, 2]  # what is newer than the newest good one is left for people to look at


def test_what_nobody_has_read_counts_for_nothing(run: Path) -> None:
    folder = Path(shutil.copytree(run / "ckpt", run / "copy"))
    prune(folder, 1)
    assert _steps(folder) == [2, 1]
    verify_checkpoint(folder / "step_000000001")
    prune(folder, 1)
    assert _steps(folder) == [2, 1]
    verify_checkpoint(folder / "step_000000002")
    prune(folder, 2)
    assert _steps(folder) == [2, 1]
    prune(folder, 1)
    assert _steps(folder) == [2]


def test_links_are_followed_verified_and_never_removed(run: Path, tmp_path: Path) -> None:
    folder, other_disk = _more(run, 3), tmp_path / "elsewhere"
    shutil.move(folder / "step_000000001", other_disk)
    (folder / "step_000000001").symlink_to(other_disk)
    prune(folder, 1)
    assert _steps(folder) == [3, 1]
    shutil.rmtree(folder / "step_000000003")
    assert open_checkpoint(run).manifest.record.step == 1
    assert torch.equal(_weights(run), draw("1 norm", 3))
    _flip_a_bit(other_disk / "shard_00001.safetensors")
    with pytest.raises(CheckpointError, match="step_000000001 is damaged: shard_00001"):
        open_checkpoint(run)


def _weights(run: Path) -> torch.Tensor:
    model = Tiny(0, 4)
    load_weights(open_checkpoint(run), model=model)
    return model.norm.detach()


def test_a_folder_of_checkpoints_that_is_a_link_to_nowhere_is_named(run: Path, tmp_path: Path) -> None:
    (run / "ckpt").rename(tmp_path / "disk")
    (run / "ckpt").symlink_to(tmp_path / "disk")
    assert open_checkpoint(run).manifest.record.step == 2
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    for find in (lambda: open_checkpoint(run), lambda: find_resumable(run / "ckpt")):
        with pytest.raises(CheckpointError, match=r"ckpt is a link to .*disk, which is not there") as caught:
            find()
        assert "mounted" in str(caught.value)


# ------------------------------------------------------------------------------------------- what is no file
@pytest.mark.parametrize("name", [MANIFEST, "shard_00000.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling link"])
def test_only_regular_files_are_read(name: str, kind: str, run: Path) -> None:
    path = _newest(run) / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(CheckpointError, match=name if kind != "dangling link" else "step_000000002"):
        verify_checkpoint(_newest(run))
    assert open_checkpoint(run).manifest.record.step == 1


def test_a_pipe_of_the_promised_size_is_not_waited_for(run: Path) -> None:
    path = _newest(run) / "shard_00000.safetensors"
    path.unlink()
    os.mkfifo(path)
    rewrite_manifest(_newest(run), lambda m: m["files"][path.name].update(size=0))
    with pytest.raises(CheckpointError):
        verify_checkpoint(_newest(run))


def test_a_shard_that_shrinks_after_it_was_verified_is_named(run: Path) -> None:
    checkpoint = open_checkpoint(run)
    path = checkpoint.path / "shard_00000.safetensors"
    model = Tiny(0, 4)
    original = ShardReader.read_metadata

    def shrink(self: ShardReader) -> Any:
        found = original(self)
        os.truncate(path, path.stat().st_size // 2)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "read_metadata", shrink)
        with pytest.raises(CheckpointError, match=r"shard_00000\.safetensors became shorter"):
            load_weights(checkpoint, model=model)


def test_a_newer_checkpoint_that_is_passed_over_is_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _flip_a_bit(_newest(run) / "shard_00000.safetensors")
    assert open_checkpoint(run).manifest.record.step == 1
    assert "warning: passed over a checkpoint:" in (said := capsys.readouterr().err)
    assert "step_000000002 is damaged: shard_00000.safetensors has CRC-32" in said


# ------------------------------------------------------------------------------------------- no answer
def _fail(monkeypatch: pytest.MonkeyPatch, call: str, path: Path, code: int) -> None:
    """Makes one system call fail for one path, as a file system does that does not answer."""
    original = getattr(os, call)

    def failing(name: Any, *rest: Any, **more: Any) -> Any:
        if isinstance(name, (str, Path)) and Path(name) == path:
            raise OSError(code, os.strerror(code), str(name))
        return original(name, *rest, **more)

    monkeypatch.setattr(os, call, failing)


def _fail_reading(monkeypatch: pytest.MonkeyPatch, path: Path, code: int) -> None:
    """It can be opened, and what is in it does not come."""
    original = epmoe.data.files.open_regular

    def opened(name: Path) -> BinaryIO:
        file = original(name)
        if name == path:
            file.read = Mock(side_effect=OSError(code, os.strerror(code)))  # type: ignore[method-assign]
        return file

    for module in ("epmoe.data.files", "epmoe.checkpoint.manifest", "epmoe.checkpoint.safetensors_writer"):
        monkeypatch.setattr(f"{module}.open_regular", opened)


SHARD = "shard_00000.safetensors"
NO_ANSWERS = [
    ("scandir", ".", errno.ESTALE),
    ("open", MANIFEST, errno.ESTALE),
    ("open", MANIFEST, errno.EACCES),
    ("open", SHARD, errno.ETIMEDOUT),
    ("open", SHARD, errno.EMFILE),
    ("stat", SHARD, errno.EIO),
    ("listdir", "", errno.ENOTCONN),
    ("read", MANIFEST, errno.EIO),
    ("read", SHARD, errno.EIO),
]


@pytest.mark.parametrize(
    ("call", "name", "code"), NO_ANSWERS, ids=[f"{c} {n} {errno.errorcode[e]}" for c, n, e in NO_ANSWERS]
)
def test_a_file_system_that_does_not_answer_is_no_damage(
    call: str, name: str, code: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "ckpt" if name == "." else _newest(run) / name
    with monkeypatch.context() as patch:
        if call == "read":
            _fail_reading(patch, path, code)
        else:
            _fail(patch, call, path, code)
        for find in (lambda: find_resumable(run / "ckpt"), lambda: open_checkpoint(run)):
            with pytest.raises(UnreachableCheckpoint) as caught:
                find()
            assert caught.value.exit_code == 4
            assert f"{os.strerror(code)} ({errno.errorcode[code]})" in caught.value.what
            assert str(path) in caught.value.what
            assert "run the same command again" in str(caught.value.fix)
    assert open_checkpoint(run).path == _newest(run)


def test_a_header_that_cannot_be_read_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _newest(run) / SHARD
    _fail_reading(monkeypatch, path, errno.EIO)
    with pytest.raises(UnreachableCheckpoint, match=r"shard_00000.safetensors cannot be read: .* \(EIO\)"):
        read_pieces(path)


def test_what_cannot_be_looked_at_is_not_taken_for_missing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail(monkeypatch, "lstat", _newest(run) / MANIFEST, errno.EIO)
    _fail(monkeypatch, "stat", _newest(run) / MANIFEST, errno.EIO)
    with pytest.raises(UnreachableCheckpoint, match=r"manifest.json cannot be looked at: .* \(EIO\)"):
        open_checkpoint(_newest(run))


def test_a_real_read_error_is_no_damage(run: Path) -> None:
    (_newest(run) / MANIFEST).unlink()
    (_newest(run) / MANIFEST).symlink_to("/proc/self/mem")  # its first page is not there: EIO
    with pytest.raises(
        UnreachableCheckpoint, match=r"step_000000002/manifest.json cannot be read: .* \(EIO\)"
    ):
        open_checkpoint(run)
    assert _steps(run / "ckpt") == [2, 1]


# ------------------------------------------------------------------------------------------- space
def _disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=10**9))


def test_space_is_compared_before_training(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = checkpoint_bytes(read_manifest(_newest(run)).tensors)
    _disk(monkeypatch, 2 * size)
    _compare_space(run / "ckpt", size, 3)
    assert capsys.readouterr().err == ""  # two of four are there already
    _compare_space(run / "no checkpoints yet", size, 1)
    assert capsys.readouterr().err == ""
    _compare_space(run / "no checkpoints yet", size, 2)
    assert f"{3 * size:,} will be needed for checkpoint.keep=2" in capsys.readouterr().err
    _disk(monkeypatch, size - 1)
    with pytest.raises(CheckpointError, match=f"takes {size:,} bytes"):
        _compare_space(run / "no checkpoints yet", size, 1)
    _compare_space(run / "ckpt", size, 1)  # the older of two can make room
    assert "make room" in capsys.readouterr().err


def test_room_is_made_from_the_oldest_and_the_newest_good_one_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tensors = _more(run, 3, 4), read_manifest(_newest(run)).tensors
    _disk(monkeypatch, 10**8)
    assert _make_room(folder, tensors)
    assert _steps(folder) == [4, 3, 2]
    _disk(monkeypatch, 0)
    assert _make_room(folder, tensors)
    assert _steps(folder) == [4]
    assert not _make_room(folder, tensors)
    assert _steps(folder) == [4]
    assert "the disk is full; step_000000001 makes room" in capsys.readouterr().err


def test_what_interrupted_saves_left_is_removed_without_following_links(run: Path, tmp_path: Path) -> None:
    folder, outside = run / "ckpt", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("data")
    (folder / ".tmp-step_000000003-0a").mkdir()
    (folder / ".tmp-step_000000003-0a" / "shard_00000.safetensors").write_bytes(b"half")
    (folder / ".tmp-step_000000003-link").symlink_to(outside)
    (folder / ".tmp-mine").mkdir()
    (folder / ".latest.json.123").write_text("{")
    removed = remove_unfinished(folder)
    assert removed == [".latest.json.123", ".tmp-step_000000003-0a", ".tmp-step_000000003-link"]
    assert (outside / "precious").exists()
    assert (folder / ".tmp-mine").exists()
    assert _steps(folder) == [2, 1]
    assert remove_unfinished(run / "no such folder") == []


# ------------------------------------------------------------------------------------------- weights alone
def test_one_process_without_a_group_reads_the_weights_of_any_layout(written: Path) -> None:
    model = Tiny(0, 4).double()
    read = load_weights(open_checkpoint(written), model=model)
    assert read == record(2)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor.detach(), draw(f"2 {name}", *tensor.shape).double())
    assert model.steps_seen.tolist() == [3, 1]
    assert model.head.weight is model.embed.weight


def _renamed() -> Tiny:
    model = Tiny(0, 4)
    model.norms = model.norm
    del model.norm
    return model


def _half() -> Tiny:
    model = Tiny(0, 2)
    model.experts.num_experts = 2
    return model


def _other_dtype() -> Tiny:
    model = Tiny(0, 4)
    model.register_buffer("steps_seen", torch.zeros(2))
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: Tiny(0, 4, width=5),
            ["model.embed.weight is [7, 3] in the checkpoint, [7, 5] in the model"],
        ),
        (
            _renamed,
            [
                "model.norms is not in the checkpoint (nearest: model.norm)",
                "model.norm is in the checkpoint only",
            ],
        ),
        (_other_dtype, ["model.steps_seen is I64 in the checkpoint, F32 in the model"]),
        (
            _half,
            ["model.experts.w_in is [4, 3, 5] in the checkpoint, [2, 3, 5] in the model"],
        ),
    ],
    ids=["shape", "renamed", "dtype", "only some experts"],
)
def test_another_architecture_is_refused_before_anything_is_read(
    make: Callable[[], Tiny], says: list[str], written: Path
) -> None:
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(open_checkpoint(written), model=model)
    for words in says:
        assert words in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_differences_are_listed_with_the_nearest_name_up_to_a_limit() -> None:
    one = TensorRecord(dtype="F32", shape=(2,))
    stored = {f"model.layer{i}.weight": one for i in range(15)}
    wanted = {f"model.layer{i}.wight": one for i in range(15)}
    lines = differences(stored, wanted, same_dtype=True)
    assert len(lines) == 30
    assert lines[0] == "model.layer0.wight is not in the checkpoint (nearest: model.layer0.weight)"
    assert sum("nearest" in line for line in lines) == MAX_LISTED
    half = {"model.w": TensorRecord(dtype="BF16", shape=(2,))}
    assert differences({"model.w": one}, half, same_dtype=False) == []
    assert differences({"model.w": one}, half, same_dtype=True) == [
        "model.w is F32 in the checkpoint, BF16 in the model"
    ]


# ------------------------------------------------------------------------------------------- no code in checkpoints
class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_planted_pickles_are_not_executed(run: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Canary(canary))
    for folder in (_newest(run), run / "ckpt"):
        for name in (".metadata", "model.pt", "optim.bin", "__0_0.distcp", "rng_state.pth"):
            (folder / name).write_bytes(payload)
        np.save(folder / "array.npy", np.array([Canary(canary)], dtype=object), allow_pickle=True)
    load_weights(open_checkpoint(run), model=Tiny(0, 4))
    (_newest(run) / "shard_00000.safetensors").write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"shard_00000\.safetensors has"):
        load_weights(open_checkpoint(_newest(run)), model=Tiny(0, 4))
    (_newest(run) / MANIFEST).write_bytes(payload)
    with pytest.raises(CheckpointError):
        open_checkpoint(_newest(run))
    assert not canary.exists()
    pickle.loads(payload)  # noqa: S301 - the payload does work
    assert canary.exists()


def test_a_checkpoint_is_nothing_but_json_and_tensors(written: Path) -> None:
    manifest = read_manifest(_newest(written))
    keys = set()
    for path in _newest(written).iterdir():
        raw = path.read_bytes()
        if path.name == MANIFEST:
            json.loads(raw)
            continue
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        del header["__metadata__"]
        ends = [0, *sorted(entry["data_offsets"][1] for entry in header.values())]
        starts = sorted(entry["data_offsets"][0] for entry in header.values())
        assert starts == ends[:-1]  # no bytes between the tensors
        assert len(raw) == 8 + length + ends[-1]  # nor behind them
        with safe_open(path, framework="pt") as file:  # and others can read it
            keys |= set(file.keys())
    assert keys == set(manifest.tensors)
    assert {"model.experts.w_in", "optim.experts.w_in.exp_avg_sq", "optim.embed.weight.step"} <= keys


def test_incomplete_shards_are_told_apart(written: Path) -> None:
    folder = _newest(written)
    manifest = read_manifest(folder)
    names = sorted(manifest.files)
    assert incomplete_tensors(folder, names, manifest.tensors) == []
    missing = next(key for key in read_pieces(folder / names[0]) if "experts" not in key)
    one = incomplete_tensors(folder, names[1:], manifest.tensors)
    assert any(line.startswith(f"{missing}: written by no rank") for line in one)
    assert any(line.startswith("model.experts.w_in: rows 0 to 1 are written not at all") for line in one)
    other = incomplete_tensors(folder, names[:1], manifest.tensors)
    assert any(line.startswith("model.experts.w_in: rows 2 to 3 are missing") for line in other)
    twice = incomplete_tensors(folder, [*names, names[0]], manifest.tensors)
    assert any(line.startswith("model.experts.w_in: rows 0 to 1 are written twice") for line in twice)
    fewer = {key: value for key, value in manifest.tensors.items() if key != "model.norm"}
    assert any("model.norm is in" in line for line in incomplete_tensors(folder, names, fewer))


def test_a_verified_checkpoint_says_what_it_is(written: Path) -> None:
    checkpoint = open_checkpoint(written)
    assert isinstance(checkpoint, Checkpoint)
    assert (checkpoint.manifest.world_size, checkpoint.manifest.ep_size) == (2, 2)
    assert checkpoint.manifest.record == record(2)
    assert checkpoint.manifest.versions["torch"] == torch.__version__
    assert checkpoint.manifest.tensors["model.experts.w_in"] == TensorRecord(dtype="F32", shape=(4, 3, 5))


# ------------------------------------------------------------------------------------------- going back
def test_going_back_sets_what_is_newer_aside_and_deletes_nothing(run: Path) -> None:
    (run / "run_status.json").write_text("{}")
    (run / "metrics.jsonl").write_text("lines")
    rewind(run, 1)
    assert open_checkpoint(run).manifest.record.step == 1
    aside = run / "ckpt" / "after-step_000000001-1"
    assert sorted(path.name for path in aside.iterdir()) == [
        "metrics.jsonl",
        "run_status.json",
        "step_000000002",
    ]
    assert open_checkpoint(aside / "step_000000002").manifest.record.step == 2
    assert (run / "metrics.jsonl").read_text() == "lines"
    assert not (run / "run_status.json").exists()
    assert not (run / ".lock").exists()


def test_going_back_to_what_is_not_there_or_damaged_or_in_use_is_refused(run: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        rewind(run, 7)
    _flip_a_bit(run / "ckpt" / "step_000000001" / "shard_00000.safetensors")
    with pytest.raises(CheckpointError, match="step_000000001 is damaged"):
        rewind(run, 1)
    (run / ".lock").write_text(lock.identity())
    with pytest.raises(ConfigError, match="in use"):
        rewind(run, 2)
    assert _steps(run / "ckpt") == [2, 1]
