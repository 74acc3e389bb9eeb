"""What a finished checkpoint says about itself, and the check that its files are still what it says.

    out/ckpt/step_000000120/manifest.json        this file; a folder without it is not a checkpoint
                            shard_00000.safetensors  ... one per rank that had something to write
             latest.json                         for people and tools; loading never relies on it

safetensors, DCP and torch.save all load a file with a flipped bit without a word, hence size and CRC-32 per file, and
a CRC-32 of the manifest itself in its first line.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from epmoe.data.files import crc32_of, open_regular, write_atomically
from epmoe.errors import CheckpointError, UnreachableCheckpoint

FORMAT = 1
MANIFEST = "manifest.json"
CHECKPOINTS = "ckpt"
"""The folder of a run's checkpoints."""
SHARD_SUFFIX = ".safetensors"
STEP_FOLDER = re.compile(r"step_(\d{9})")
MAX_MANIFEST_BYTES = 256 * 2**20
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element, by safetensors' name of its type."""


OF_THE_FILE = (0, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG)
"""Error numbers that say that a file is not there, or is something else: damage. Any other one speaks of the file
system (EIO, ESTALE, ETIMEDOUT ...), of this user or of this process, and the file behind it may be good."""
NOT_ALLOWED = (errno.EACCES, errno.EPERM)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class FileRecord(_Part):
    """A file as it was written."""

    size: int = Field(ge=0)
    """Bytes."""
    crc32: int = Field(ge=0, lt=2**32)


def _known_dtype(dtype: str) -> str:
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{dtype!r} is no type of a tensor here")
    return dtype


class TensorRecord(_Part):
    """A tensor over all ranks."""

    dtype: Annotated[str, AfterValidator(_known_dtype)]
    """safetensors' name: F32, BF16, I64 ..."""
    shape: tuple[Annotated[int, Field(ge=0)], ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Counters(_Part):
    """Counters of the training loop."""

    seconds: float = Field(ge=0, allow_inf_nan=False)
    """Spent in training."""
    skipped: int = Field(default=0, ge=0)
    skipped_in_a_row: int = Field(default=0, ge=0)
    overflowed: int = Field(default=0, ge=0)
    empty: int = Field(default=0, ge=0)
    loss_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    loss_scale_good_steps: int | None = Field(default=None, ge=0)


class TrainingRecord(_Part):
    """Where training stands, and what it is training on: everything a resume needs besides the tensors."""

    step: int = Field(ge=0, lt=10**9)
    """Optimizer steps done."""
    tokens: int = Field(ge=0, lt=2**63)
    """Tokens in the loss so far."""
    samples: int = Field(ge=0, lt=2**40)
    """The sampler's counter: the next sample number. More of them no random draw tells apart."""
    config: dict[str, Any]
    """The resolved configuration."""
    data_fingerprint: str
    tokenizer_hash: str
    trainer: dict[str, Any] = {}
    """``Counters`` of a run of ``epmoe train``; what else a training loop wants back."""


class Manifest(_Part):
    """The whole of manifest.json."""

    format: int
    record: TrainingRecord
    world_size: int
    ep_size: int
    versions: dict[str, str]
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]


def step_folder(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:09d}"


def _first_line(rest: bytes) -> bytes:
    return f'{{"crc32": "{zlib.crc32(rest):08x}",\n'.encode()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json, atomically and to the disk."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    rest = text.removeprefix("{\n").encode()
    write_atomically(folder / MANIFEST, _first_line(rest) + rest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: It is missing, damaged, from a newer epmoe, of another step than the folder's name says,
            names files outside the folder, or promises tensors that its files cannot hold.
    """
    path = folder / MANIFEST
    manifest = _parse_manifest(path, _manifest_bytes(path))
    for name in manifest.files:
        if Path(name).name != name or "\0" in name or not name.endswith(SHARD_SUFFIX):
            raise CheckpointError(
                f"{path} names the file {name!r}",
                why="shards are plain *.safetensors names in the same folder",
            )
    step = STEP_FOLDER.fullmatch(folder.name)
    if step and int(step[1]) != manifest.record.step:
        own = step_folder(manifest.record.step)
        raise CheckpointError(
            f"{folder} holds the checkpoint of step {manifest.record.step}: the folder was renamed",
            fix=f"rename it to {own}; if there is one of that name, keep this one under a name without step_",
        )
    promised = sum(tensor.size for tensor in manifest.tensors.values())
    stored = sum(file.size for file in manifest.files.values())
    if promised > stored:
        raise CheckpointError(
            f"{path} lists tensors of {promised:,} bytes in files of {stored:,} bytes",
            fix="use another checkpoint",
        )
    return manifest


def _manifest_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {MANIFEST}: it is not a finished checkpoint", fix="use another checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {damage_of(path, error)}", fix="use another checkpoint"
        ) from None
    if len(raw) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{path} has more than {MAX_MANIFEST_BYTES:,} bytes", fix="use another checkpoint"
        )
    return raw


def _parse_manifest(path: Path, raw: bytes) -> Manifest:
    try:
        value = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read", why=str(error), fix="use another checkpoint"
        ) from None
    version = value.get("format") if isinstance(value, dict) else None
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format {version!r}; this epmoe reads format {FORMAT}",
            fix="use the version of epmoe that wrote it"
            if isinstance(version, int)
            else "use another checkpoint",
        )
    line = _first_line(raw.partition(b"\n")[2])
    if not raw.startswith(line):
        raise CheckpointError(f"{path} is damaged: its CRC-32 is wrong", fix="use another checkpoint")
    del value["crc32"]
    try:
        return Manifest.model_validate_json(json.dumps(value))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(f"{path}: {where}: {problem['msg']}", fix="use another checkpoint") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return value


def damage_of(path: Path, error: OSError) -> str:
    """What an error in reading a file of a checkpoint says about the file, in words.

    Raises:
        UnreachableCheckpoint: It says nothing about the file.
    """
    if error.errno not in OF_THE_FILE:
        without = f"; to do without this checkpoint, move {path.parent} elsewhere"
        raise no_answer(f"{path} cannot be read", error, without) from None
    return str(error.strerror)


def no_answer(what: str, error: OSError, otherwise: str = "") -> UnreachableCheckpoint:
    """The error where a file system, and not a file, is at fault."""
    wait = "let this user read it" if error.errno in NOT_ALLOWED else "wait until the file system answers"
    return UnreachableCheckpoint(
        f"{what}: {error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})",
        why="a checkpoint that may be good is not passed over for an older one",
        fix=f"{wait}, then run the same command again{otherwise}",
    )


def damaged_files(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """What is wrong with these files, one line each: missing, other size, other CRC-32. Reads them whole."""
    problems = []
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                problems.append(f"{name} has {size} bytes, expected {expected.size}")
                continue
            crc = crc32_of(path)
        except OSError as error:
            problems.append(f"{name}: {damage_of(path, error)}")
            continue
        if crc != expected.crc32:
            problems.append(f"{name} has CRC-32 {crc:08x}, expected {expected.crc32:08x}")
    return problems


def unlisted_shards(folder: Path, manifest: Manifest) -> list[str]:
    """Shards the manifest does not know; a reader that lists the folder would take tensors from them."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return [damage_of(folder / MANIFEST, error)]
    found = [name for name in names if name.endswith(SHARD_SUFFIX)]
    return [f"{name} is not in {MANIFEST}" for name in found if name not in manifest.files]


def candidates(folder: Path) -> list[Path]:
    """Checkpoint folders inside ``folder`` and links that may lead to some, newest step first; by name alone.

    Raises:
        CheckpointError: ``folder`` is something else than a folder, or cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:  # what an entry is, it knows without a look at it
            names = [
                entry.name
                for entry in entries
                if STEP_FOLDER.fullmatch(entry.name)
                and (entry.is_symlink() or entry.is_dir(follow_symlinks=False))
            ]
    except FileNotFoundError:
        if not folder.is_symlink():
            return []
        raise CheckpointError(
            f"{folder} is a link to {os.readlink(folder)}, which is not there",
            fix="bring that folder back (is its disk mounted?), or choose another out= for a new run",
        ) from None
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise no_answer(f"{folder} cannot be listed", error) from None
        raise CheckpointError(
            f"{folder} cannot be listed: {error.strerror}",
            fix="make it a folder, or choose another out=",
        ) from None
    return [folder / name for name in sorted(names, reverse=True)]
