"""Checkpoints that are either there in full or not there.

    .tmp-step_000000120-3f9a01c2/   every rank streams its shard (DCP plans, safetensors), size and CRC-32 counted,
                                    and reads it back from the disk
        manifest.json               by rank 0, when every tensor and every expert is there exactly once; read back
    -> rename to step_000000120 -> latest.json -> the oldest go

Nothing is read before ``verify_checkpoint`` has seen every byte, and nothing goes unless as many as are to be kept have
been seen whole by this process: those it verified or wrote. A tensor is stored once, whole, whatever the layout:
stacked experts are shards of one tensor whose dim 0 is the global expert id, so reading them on another number of
ranks is DCP's ordinary job. The disk never holds a pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from epmoe import env
from epmoe.checkpoint.manifest import (
    CHECKPOINTS,
    FORMAT,
    MANIFEST,
    OF_THE_FILE,
    FileRecord,
    Manifest,
    TensorRecord,
    TrainingRecord,
    candidates,
    damaged_files,
    no_answer,
    read_manifest,
    step_folder,
    unlisted_shards,
    write_manifest,
)
from epmoe.checkpoint.replicas import differing_replicas
from epmoe.checkpoint.safetensors_writer import ShardReader, ShardWriter, incomplete_tensors
from epmoe.checkpoint.tensor_layout import (
    MAX_LISTED,
    WEIGHTS,
    Held,
    as_entries,
    differences,
    held_by_this_rank,
    layout_problems,
    local_tensors,
    whole_tensors,
)
from epmoe.data.files import forget_cached, sync_folder, write_json
from epmoe.engines.protocol import Engine
from epmoe.errors import CheckpointError, EpmoeError, UnreachableCheckpoint, warn
from epmoe.metrics.machine import software_versions
from epmoe.parallel.mesh import ExpertMesh
from epmoe.process.runtime import gather_text, on_rank_zero, raise_together

UNFINISHED = ".tmp-step_"
REPLACED = "-replaced"
LATEST = "latest.json"
FULL = (errno.ENOSPC, errno.EDQUOT)

_seen_whole: set[Path] = set()
"""Checkpoints that this process verified or wrote, by resolved path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint every byte of which has been verified. ``verify_checkpoint`` makes it."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumable:
    """The newest good checkpoint of a folder, and why newer ones were passed over."""

    checkpoint: Checkpoint | None
    rejected: tuple[str, ...]


# ------------------------------------------------------------------------------------------- writing
def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    engine: Engine,
    mesh: ExpertMesh,
    record: TrainingRecord,
    keep: int,
) -> Path:
    """Writes one checkpoint and removes the oldest beyond ``keep``. A collective: all ranks succeed, or all raise.

    On a full disk older checkpoints make room, but for the newest that this process has seen whole.

    Args:
        folder: The run's checkpoint folder; made if missing.
        record: Where training stands.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: The disk is full or not writable, or gives back other bytes than were written; the ranks do
            not hold every expert exactly once, or what several ranks hold is not the same on all of them. Older
            checkpoints are untouched.
    """
    tensors = local_tensors(model, engine)
    entries = as_entries(tensors, mesh)
    layout = _agree_on_layout(held_by_this_rank(model, tensors), mesh)
    _require_equal_replicas(entries, mesh)
    try:
        path = _write(folder, entries, layout, mesh, record)
    except CheckpointError as error:
        if not _disk_is_full(error) or not _make_room(folder, whole_tensors(layout)):
            raise
        path = _write(folder, entries, layout, mesh, record)
    _seen_whole.add(path.resolve())
    on_rank_zero(lambda: prune(folder, keep), CheckpointError)
    return path


def _write(
    folder: Path,
    entries: dict[str, Tensor],
    layout: dict[str, Held],
    mesh: ExpertMesh,
    record: TrainingRecord,
) -> Path:
    name = step_folder(record.step)
    temporary = folder / gather_text(f".tmp-{name}-{uuid.uuid4().hex[:8]}")[0]
    try:
        on_rank_zero(lambda: temporary.mkdir(parents=True), CheckpointError)
        env.fault("ckpt.stage", step=record.step)
        files = _write_shards(temporary, entries, record.step)
        manifest = Manifest(
            format=FORMAT,
            record=record,
            world_size=mesh.world_size,
            ep_size=mesh.ep_size,
            versions=software_versions(),
            files=files,
            tensors=whole_tensors(layout),
        )
        on_rank_zero(lambda: _write_manifest(temporary, manifest), CheckpointError)
        on_rank_zero(lambda: _publish(temporary, folder / name, record.step), CheckpointError)
    except EpmoeError:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder / name


def _agree_on_layout(mine: dict[str, Held], mesh: ExpertMesh) -> dict[str, Held]:
    """What rank 0 holds, if it goes with what the others do."""
    layouts = [
        {key: Held(*entry) for key, entry in json.loads(text).items()}
        for text in gather_text(json.dumps(mine))
    ]
    if problems := layout_problems(layouts, mesh.ep_size):
        raise CheckpointError(
            f"nothing was saved: the ranks do not hold every tensor exactly once ({len(problems)} problems)",
            why="; ".join(problems[:MAX_LISTED]),
            fix="rank r of an ep group must hold experts r*L to r*L+L-1, and all ranks the same dense tensors",
        )
    return layouts[0]


def _require_equal_replicas(entries: Mapping[str, Tensor], mesh: ExpertMesh) -> None:
    problems = differing_replicas(entries, mesh)
    if problems:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"nothing was saved: {len(problems)} tensors are not the same on all ranks that hold them",
            why="; ".join(problems[:MAX_LISTED]) + more,
            fix="find what changes them on one rank alone (weights set by hand, a gradient that is not reduced, a "
            "faulty device); the checkpoints before are untouched",
        )


def _write_shards(temporary: Path, entries: dict[str, Tensor], step: int) -> dict[str, FileRecord]:
    """Every rank its share of the tensors, which it then reads back -> all ranks' files."""
    writer = ShardWriter(temporary, step)
    try:
        save(entries, storage_writer=writer)
    except CheckpointException as error:
        raise _first_failure(error, f"writing {temporary} failed") from error
    _read_back(temporary, writer.files)
    env.fault("ckpt.shard_done", step=step)
    mine = {name: file.model_dump() for name, file in writer.files.items()}
    files: dict[str, FileRecord] = {}
    for text in gather_text(json.dumps(mine)):
        files |= {name: FileRecord(**file) for name, file in json.loads(text).items()}
    return files


def _read_back(temporary: Path, mine: Mapping[str, FileRecord]) -> None:
    """What this rank wrote, from the disk and not from the memory that it went through. A collective."""
    error = None
    try:
        for name in mine:
            forget_cached(temporary / name)
        if problems := damaged_files(temporary, mine):
            error = _not_what_was_written(temporary, problems)
    except (OSError, UnreachableCheckpoint) as caught:
        error = _not_what_was_written(temporary, [str(caught).partition("\n")[0]])
    raise_together(error)


def _not_what_was_written(temporary: Path, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{temporary} does not give back what was just written: {'; '.join(problems)}",
        why="the disk, the way to it or this machine's memory fails",
        fix="look for errors of the disk and the memory (dmesg), or put out= on another disk; older checkpoints are "
        "untouched, and the same command goes on from the newest",
    )


def _write_manifest(temporary: Path, manifest: Manifest) -> None:
    if problems := incomplete_tensors(temporary, sorted(manifest.files), manifest.tensors):
        raise CheckpointError(
            f"{temporary} is not complete: {len(problems)} problems", why="; ".join(problems[:MAX_LISTED])
        )
    env.fault("ckpt.before_manifest", step=manifest.record.step)
    write_manifest(temporary, manifest)
    sync_folder(temporary)
    _read_manifest_back(temporary, manifest)
    env.fault("ckpt.after_manifest", step=manifest.record.step)


def _read_manifest_back(temporary: Path, manifest: Manifest) -> None:
    try:
        forget_cached(temporary / MANIFEST)
        found = read_manifest(temporary)
    except (OSError, CheckpointError) as error:
        raise _not_what_was_written(temporary, [str(error).partition("\n")[0]]) from None
    if (found.files, found.tensors) != (manifest.files, manifest.tensors):
        raise _not_what_was_written(temporary, [f"{MANIFEST} is another one"])


def _publish(temporary: Path, final: Path, step: int) -> None:
    env.fault("ckpt.before_rename", step=step)
    if os.path.lexists(final):  # an earlier attempt at this step, passed over because it was damaged
        os.rename(final, temporary.with_name(f"{temporary.name}{REPLACED}"))
    os.rename(temporary, final)
    sync_folder(final.parent)
    env.fault("ckpt.after_rename", step=step)
    env.fault("ckpt.before_latest", step=step)
    write_json(final.parent / LATEST, {"step": step, "folder": final.name})


# ------------------------------------------------------------------------------------------- retention
def prune(folder: Path, keep: int) -> None:
    """Removes checkpoints older than the newest ``keep`` that this process has seen whole, if there are as many.

    Others do not count as kept. Links, and what is newer than the newest of those, stay.
    """
    found = candidates(folder)
    kept = [path for path in found if path.resolve() in _seen_whole][:keep]
    if len(kept) == keep:
        for path in _older(found, kept):
            _remove(path)
    if kept:
        for path in folder.glob(f"{UNFINISHED}*{REPLACED}"):
            _remove(path)


def _older(found: list[Path], kept: list[Path]) -> list[Path]:
    """What is older than the newest that is kept, and no link."""
    rest = found[found.index(kept[0]) + 1 :]
    return [path for path in rest if path not in kept and not path.is_symlink()]


def _disk_is_full(error: CheckpointError) -> bool:
    """By the text, which all ranks have: the exception is rank 0's or another's."""
    return any(os.strerror(code) in error.what for code in FULL)


def _make_room(folder: Path, tensors: Mapping[str, TensorRecord]) -> bool:
    """Removes the oldest checkpoints, until one more fits, but for the newest seen whole -> whether any went."""
    removed: list[str] = []

    def remove() -> None:
        remove_unfinished(folder)
        found = candidates(folder)
        kept = [path for path in found if path.resolve() in _seen_whole][:1]
        for path in reversed(_older(found, kept) if kept else []):
            warn(f"the disk is full; {path.name} makes room")
            _remove(path)
            removed.append(path.name)
            if shutil.disk_usage(folder).free > 1.01 * checkpoint_bytes(tensors):
                return

    on_rank_zero(remove, CheckpointError)
    return bool(gather_text("".join(removed))[0])


def checkpoint_bytes(tensors: Mapping[str, TensorRecord]) -> int:
    """Bytes of a checkpoint, but for headers and manifest."""
    return sum(tensor.size for tensor in tensors.values())


def require_space(folder: Path, *, model: nn.Module, engine: Engine, keep: int) -> None:
    """Compares what is free with what ``keep`` checkpoints, and one more while it is written, will take. A collective.

    Warns where not all of them fit.

    Raises:
        CheckpointError: Not even one fits, whatever older ones make room.
    """
    size = checkpoint_bytes(whole_tensors(held_by_this_rank(model, local_tensors(model, engine))))
    on_rank_zero(lambda: _compare_space(folder, size, keep), CheckpointError)


def _compare_space(folder: Path, size: int, keep: int) -> None:
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    disk, here = shutil.disk_usage(place), candidates(folder)
    here = [path for path in here if not path.is_symlink()]
    numbers = f"a checkpoint takes {size:,} bytes, the file system of {place} has {disk.free:,} free"
    if disk.free < size and len(here) < 2 and disk.total:
        raise CheckpointError(
            f"no checkpoint fits: {numbers}", fix="free some space, or put out= on a larger disk"
        )
    if disk.free < (missing := max(1, keep + 1 - len(here)) * size) and disk.total:
        warn(
            f"{numbers}; {missing:,} will be needed for checkpoint.keep={keep} and the one being written. "
            "Older ones than the newest will make room when the disk is full"
        )


def _remove(path: Path) -> None:
    """Something old that cannot be deleted costs space; it is no reason to end a run. Links are not followed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        warn(f"{path} cannot be removed: {error.strerror}")


def remove_unfinished(folder: Path) -> list[str]:
    """Removes what interrupted saves left behind -> names. Only for the run that owns the folder; rank 0 calls it."""
    left = sorted([*folder.glob(f"{UNFINISHED}*"), *folder.glob(f".{LATEST}.*")])
    for path in left:
        _remove(path)
    return [path.name for path in left]


# ------------------------------------------------------------------------------------------- finding
def verify_checkpoint(path: Path) -> Checkpoint:
    """Reads every byte of a checkpoint once, each rank its share of the files. A collective.

    Raises:
        CheckpointError: On every rank, naming the damaged file or what is wrong with the manifest;
            ``UnreachableCheckpoint`` where the file system did not give its bytes.
    """
    error, manifest = None, None
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        manifest = read_manifest(path)
        mine = dict(sorted(manifest.files.items())[rank::world_size])
        _require_whole(path, manifest, mine, headers=rank == 0)
    except CheckpointError as caught:
        error = caught
    try:
        raise_together(error)
    except CheckpointError:
        _seen_whole.discard(path.resolve())
        raise
    if manifest is None:
        raise AssertionError("a checkpoint without a manifest passed")
    _seen_whole.add(path.resolve())
    return Checkpoint(path=path, manifest=manifest)


def _require_whole(path: Path, manifest: Manifest, mine: Mapping[str, FileRecord], *, headers: bool) -> None:
    """Reads this rank's files, and on one rank the headers of all."""
    problems = damaged_files(path, mine)
    problems += unlisted_shards(path, manifest)
    if headers and not problems:
        problems += incomplete_tensors(path, sorted(manifest.files), manifest.tensors)
    if problems:
        raise CheckpointError(
            f"{path} is damaged: {'; '.join(problems[:MAX_LISTED])}",
            fix="use an older checkpoint; a run resumes from the newest undamaged one by itself",
        )


def find_resumable(folder: Path) -> Resumable:
    """The newest checkpoint of a folder that is undamaged, if there is one. A collective.

    Raises:
        CheckpointError: The folder cannot be listed, or the file system does not give the bytes of one that may be
            good.
    """
    names: list[str] = []
    on_rank_zero(lambda: names.extend(path.name for path in candidates(folder)), CheckpointError)
    rejected: list[str] = []
    for name in json.loads(gather_text(json.dumps(names))[0]):
        try:
            return Resumable(checkpoint=verify_checkpoint(folder / name), rejected=tuple(rejected))
        except UnreachableCheckpoint:
            raise
        except CheckpointError as error:
            rejected.append(error.what)
    return Resumable(checkpoint=None, rejected=tuple(rejected))


def warn_passed_over(found: Resumable) -> None:
    """Says on rank 0 why newer checkpoints than the one in use were passed over."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    for reason in found.rejected:
        warn(f"passed over a checkpoint: {reason}")


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint a user names: its own folder, or a run's folder for the newest undamaged one. A collective.

    Newer ones that are passed over are named on standard error.

    Raises:
        CheckpointError: It is damaged, or there is none.
    """
    # Rank 0 looks, and all follow: another rank may see another disk.
    seen: list[str] = []
    on_rank_zero(lambda: seen.append(_place_of_checkpoints(path)), CheckpointError)
    inside = gather_text("".join(seen))[0]
    if not inside:
        return verify_checkpoint(path)
    folder = path / inside
    found = find_resumable(folder)
    if found.checkpoint is None:
        raise CheckpointError(
            f"{path} holds no usable checkpoint",
            why="; ".join(found.rejected)
            or f"no {step_folder(0)[:5]}... folder with a {MANIFEST} in {folder}",
            fix="name a run folder, or a step_... folder inside its ckpt folder",
        )
    warn_passed_over(found)
    return found.checkpoint


def _place_of_checkpoints(path: Path) -> str:
    """Below a run's folder or that of its checkpoints; empty where the path is a checkpoint itself."""
    if _is_there(path / MANIFEST):
        return ""
    return CHECKPOINTS if _is_there(path / CHECKPOINTS) else "."


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise no_answer(f"{path} cannot be looked at", error) from None
        return False
    return True


# ------------------------------------------------------------------------------------------- reading
def load_checkpoint(
    checkpoint: Checkpoint, *, model: nn.Module, engine: Engine, mesh: ExpertMesh
) -> TrainingRecord:
    """Reads weights and optimizer state in place, in any layout. A collective -> where training stood.

    Raises:
        CheckpointError: The model's tensors are not the checkpoint's; nothing has been read then.
    """
    tensors = local_tensors(model, engine)
    _require_match(checkpoint, held_by_this_rank(model, tensors), lambda key: True, same_dtype=True)
    _read(checkpoint, as_entries(tensors, mesh))
    engine.publish()
    return checkpoint.manifest.record


def load_weights(
    checkpoint: Checkpoint,
    *,
    model: nn.Module,
    engine: Engine | None = None,
    mesh: ExpertMesh | None = None,
    leave: Callable[[str], bool] = lambda name: False,
) -> TrainingRecord:
    """Reads only the weights, in place; floating-point types are converted. A collective if there are ranks.

    Args:
        engine: Whose weights are read into, float32 masters for example; None = the model's own.
        mesh: None in a single process that holds all experts; no process group is needed then.
        leave: Which tensors of the model stay as they are, by name, whether the checkpoint has them or not.

    Raises:
        CheckpointError: The model's tensors are not the checkpoint's; nothing has been read then.
    """

    def wanted(key: str) -> bool:
        return key.startswith(WEIGHTS) and not leave(key.removeprefix(WEIGHTS))

    tensors = local_tensors(model, engine)
    weights = {key: tensor for key, tensor in tensors.items() if wanted(key)}
    _require_match(checkpoint, held_by_this_rank(model, weights), wanted, same_dtype=False)
    _read(checkpoint, as_entries(weights, mesh))
    if engine is not None:
        engine.publish()
    return checkpoint.manifest.record


def _require_match(
    checkpoint: Checkpoint, held: Mapping[str, Held], wanted: Callable[[str], bool], *, same_dtype: bool
) -> None:
    stored = {key: value for key, value in checkpoint.manifest.tensors.items() if wanted(key)}
    lines = differences(stored, whole_tensors(held), same_dtype=same_dtype)
    error = None
    if lines:
        more = f"\n    ... and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
        error = CheckpointError(
            f"the model does not fit {checkpoint.path}: {len(lines)} tensors differ",
            why="\n    " + "\n    ".join(lines[:MAX_LISTED]) + more,
            fix="use the configuration of the run that wrote it (manifest.json holds it)"
            + ("" if same_dtype else ", or leave groups of parameters out: train.init_without"),
        )
    raise_together(error)


def _read(checkpoint: Checkpoint, entries: dict[str, Tensor]) -> None:
    """Fills the tensors in place, each rank reading only its own rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(
                entries,
                storage_reader=ShardReader(checkpoint.path, checkpoint.manifest),
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:
            raise _first_failure(error, f"reading {checkpoint.path} failed") from error


def _first_failure(error: CheckpointException, what: str) -> CheckpointError:
    """The lowest rank's reason, the same on all ranks; DCP has already collected them."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, CheckpointError):
        return CheckpointError(f"rank {rank}: {cause.what}", why=cause.why, fix=cause.fix)
    return CheckpointError(what, why=f"rank {rank}: {type(cause).__name__}: {cause}")
