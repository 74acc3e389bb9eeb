"""Checkpoints that are either there in full or not there.

    .tmp-step_000000120-3f9a01c2/   every rank streams its shard (DCP plans, safetensors), size and CRC-32 counted
        manifest.json               by rank 0, when every tensor and every expert is there exactly once; fsync
    -> rename to step_000000120 -> latest.json -> the oldest go

Nothing is read before ``verify_checkpoint`` has seen every byte. A tensor is stored once, whole, whatever the layout:
stacked experts are shards of one tensor whose dim 0 is the global expert id, so reading them on another number of
ranks is DCP's ordinary job. The disk never holds a pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from epmoe import env
from epmoe.data.files import sync_folder, write_json
from epmoe.errors import CheckpointError, EpmoeError, warn
from epmoe.parallel.mesh import ExpertMesh
from epmoe.parallel.runtime import gather_text, on_rank_zero, raise_together
from epmoe.train.engine import Engine
from epmoe.train.entries import (
    MAX_LISTED,
    Held,
    as_entries,
    differences,
    held_by_this_rank,
    layout_problems,
    local_tensors,
    whole_tensors,
)
from epmoe.train.manifest import (
    FORMAT,
    MANIFEST,
    FileRecord,
    Manifest,
    TrainingRecord,
    candidates,
    damaged_files,
    looks_complete,
    read_manifest,
    step_folder,
    unlisted_shards,
    write_manifest,
)
from epmoe.train.run_folder import software_versions
from epmoe.train.shards import ShardWriter, incomplete_tensors

UNFINISHED = ".tmp-"
LATEST = "latest.json"
FOLDER = "ckpt"
"""Where a run keeps its checkpoints, inside its folder."""


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

    Args:
        folder: The run's checkpoint folder; made if missing.
        record: Where training stands.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: The disk is full or not writable, or the ranks do not hold every expert exactly once.
            Older checkpoints are untouched.
    """
    tensors = local_tensors(model, engine)
    layouts = _agree_on_layout(held_by_this_rank(model, tensors), mesh)
    name = step_folder(record.step)
    temporary = folder / gather_text(f"{UNFINISHED}{name}-{uuid.uuid4().hex[:8]}")[0]
    try:
        on_rank_zero(lambda: temporary.mkdir(parents=True), CheckpointError)
        env.fault("ckpt.stage", step=record.step)
        files = _write_shards(temporary, as_entries(tensors, mesh), record.step)
        manifest = Manifest(
            format=FORMAT,
            record=record,
            world_size=mesh.world_size,
            ep_size=mesh.ep_size,
            versions=software_versions(),
            files=files,
            tensors=whole_tensors(layouts[0]),
        )
        on_rank_zero(lambda: _write_manifest(temporary, manifest), CheckpointError)
        on_rank_zero(lambda: _publish(temporary, folder / name, keep, record.step), CheckpointError)
    except EpmoeError:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder / name


def _agree_on_layout(mine: dict[str, Held], mesh: ExpertMesh) -> list[dict[str, Held]]:
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
    return layouts


def _write_shards(temporary: Path, entries: dict[str, Tensor], step: int) -> dict[str, FileRecord]:
    """Every rank its share of the tensors -> all ranks' files."""
    writer = ShardWriter(temporary, step)
    try:
        save(entries, storage_writer=writer)
    except CheckpointException as error:
        raise _first_failure(error, f"writing {temporary} failed") from error
    env.fault("ckpt.shard_done", step=step)
    mine = {name: file.model_dump() for name, file in writer.files.items()}
    files: dict[str, FileRecord] = {}
    for text in gather_text(json.dumps(mine)):
        files |= {name: FileRecord(**file) for name, file in json.loads(text).items()}
    return files


def _write_manifest(temporary: Path, manifest: Manifest) -> None:
    if problems := incomplete_tensors(temporary, sorted(manifest.files), manifest.tensors):
        raise CheckpointError(
            f"{temporary} is not complete: {len(problems)} problems", why="; ".join(problems[:MAX_LISTED])
        )
    env.fault("ckpt.before_manifest", step=manifest.record.step)
    write_manifest(temporary, manifest)
    sync_folder(temporary)
    env.fault("ckpt.after_manifest", step=manifest.record.step)


def _publish(temporary: Path, final: Path, keep: int, step: int) -> None:
    env.fault("ckpt.before_rename", step=step)
    if final.exists():  # an earlier attempt at this step, passed over because it was damaged
        os.rename(final, temporary.with_name(f"{temporary.name}-replaced"))
    os.rename(temporary, final)
    sync_folder(final.parent)
    env.fault("ckpt.after_rename", step=step)
    env.fault("ckpt.before_latest", step=step)
    write_json(final.parent / LATEST, {"step": step, "folder": final.name})
    prune(final.parent, keep)


def prune(folder: Path, keep: int) -> None:
    """Removes checkpoints older than the newest ``keep`` complete ones. Damaged ones do not count as kept."""
    found = candidates(folder)
    kept = [path for path in found if looks_complete(path)][:keep]
    if not kept:
        return
    for path in found[found.index(kept[0]) + 1 :]:
        if path not in kept:
            _remove(path)
    for path in folder.glob(f"{UNFINISHED}*-replaced"):
        _remove(path)


def _remove(path: Path) -> None:
    """An old checkpoint that cannot be deleted costs space; it is no reason to end a run."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        warn(f"{path} cannot be removed: {error.strerror}")


def remove_unfinished(folder: Path) -> list[str]:
    """Removes what interrupted saves left behind -> names. Only for the run that owns the folder; rank 0 calls it."""
    left = sorted([*folder.glob(f"{UNFINISHED}*"), *folder.glob(f".{LATEST}.*")])
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in left]


# ------------------------------------------------------------------------------------------- finding
def verify_checkpoint(path: Path) -> Checkpoint:
    """Reads every byte of a checkpoint once, each rank its share of the files. A collective.

    Raises:
        CheckpointError: On every rank, naming the damaged file or what is wrong with the manifest.
    """
    error, manifest = None, None
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        manifest = read_manifest(path)
        problems = damaged_files(path, manifest, sorted(manifest.files)[rank::world_size])
        problems += unlisted_shards(path, manifest)
        if problems:
            raise CheckpointError(
                f"{path} is damaged: {'; '.join(problems[:MAX_LISTED])}",
                fix="use an older checkpoint; a run resumes from the newest undamaged one by itself",
            )
    except CheckpointError as caught:
        error = caught
    raise_together(error)
    if manifest is None:
        raise AssertionError("a checkpoint without a manifest passed")
    return Checkpoint(path=path, manifest=manifest)


def find_resumable(folder: Path) -> Resumable:
    """The newest checkpoint of a folder that is undamaged, if there is one. A collective."""
    rejected: list[str] = []
    for name in json.loads(gather_text(json.dumps([path.name for path in candidates(folder)]))[0]):
        try:
            return Resumable(checkpoint=verify_checkpoint(folder / name), rejected=tuple(rejected))
        except CheckpointError as error:
            rejected.append(error.what)
    return Resumable(checkpoint=None, rejected=tuple(rejected))


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint a user names: its own folder, or a run's folder for the newest undamaged one. A collective.

    Raises:
        CheckpointError: It is damaged, or there is none.
    """
    # Rank 0 looks, and all follow: another rank may see another disk.
    inside = "" if (path / MANIFEST).exists() else FOLDER if (path / FOLDER).is_dir() else "."
    inside = gather_text(inside)[0]
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
    return found.checkpoint


# ------------------------------------------------------------------------------------------- reading
def load_checkpoint(
    checkpoint: Checkpoint, *, model: nn.Module, engine: Engine, mesh: ExpertMesh
) -> TrainingRecord:
    """Reads weights and optimizer state in place, in any layout. A collective -> where training stood.

    Raises:
        CheckpointError: The model's tensors are not the checkpoint's; nothing has been read then.
    """
    tensors = local_tensors(model, engine)
    _require_match(checkpoint, held_by_this_rank(model, tensors), prefix="", same_dtype=True)
    _read(checkpoint.path, as_entries(tensors, mesh))
    engine.publish()
    return checkpoint.manifest.record


def load_weights(
    checkpoint: Checkpoint,
    *,
    model: nn.Module,
    engine: Engine | None = None,
    mesh: ExpertMesh | None = None,
) -> TrainingRecord:
    """Reads only the weights, in place; floating-point types are converted. A collective if there are ranks.

    Args:
        engine: Whose weights are read into, float32 masters for example; None = the model's own.
        mesh: None in a single process that holds all experts; no process group is needed then.

    Raises:
        CheckpointError: The model's tensors are not the checkpoint's; nothing has been read then.
    """
    tensors = local_tensors(model, engine)
    weights = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    _require_match(checkpoint, held_by_this_rank(model, weights), prefix="model.", same_dtype=False)
    _read(checkpoint.path, as_entries(weights, mesh))
    if engine is not None:
        engine.publish()
    return checkpoint.manifest.record


def _require_match(
    checkpoint: Checkpoint, held: Mapping[str, Held], *, prefix: str, same_dtype: bool
) -> None:
    stored = {key: value for key, value in checkpoint.manifest.tensors.items() if key.startswith(prefix)}
    lines = differences(stored, whole_tensors(held), same_dtype=same_dtype)
    error = None
    if lines:
        more = f"\n    ... and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
        error = CheckpointError(
            f"the model does not fit {checkpoint.path}: {len(lines)} tensors differ",
            why="\n    " + "\n    ".join(lines[:MAX_LISTED]) + more,
            fix="use the configuration of the run that wrote it (manifest.json holds it)",
        )
    raise_together(error)


def _read(path: Path, entries: dict[str, Tensor]) -> None:
    """Fills the tensors in place, each rank reading only its own rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(
                entries,
                storage_reader=HuggingFaceStorageReader(str(path)),
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:
            raise _first_failure(error, f"reading {path} failed") from error


def _first_failure(error: CheckpointException, what: str) -> CheckpointError:
    """The lowest rank's reason, the same on all ranks; DCP has already collected them."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, CheckpointError):
        return CheckpointError(f"rank {rank}: {cause.what}", why=cause.why, fix=cause.fix)
    return CheckpointError(what, why=f"rank {rank}: {type(cause).__name__}: {cause}")
