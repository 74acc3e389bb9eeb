"""What a finished checkpoint says about itself, and the check that its files are still what it says.

    out/ckpt/step_000000120/manifest.json        this file; a folder without it is not a checkpoint
                            shard_00000.safetensors  ... one per rank that had something to write
             latest.json                         for people and tools; loading never relies on it

safetensors, DCP and torch.save all load a file with a flipped bit without a word, hence size and CRC-32 per file, and
a CRC-32 of the manifest itself in its first line.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from epmoe.data.files import crc32_of, write_atomically
from epmoe.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_SUFFIX = ".safetensors"
STEP_FOLDER = re.compile(r"step_(\d{9})")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class FileRecord(_Part):
    """A file as it was written."""

    size: int = Field(ge=0)
    """Bytes."""
    crc32: int = Field(ge=0, lt=2**32)


class TensorRecord(_Part):
    """A tensor over all ranks."""

    dtype: str
    """safetensors' name: F32, BF16, I64 ..."""
    shape: tuple[int, ...]


class TrainingRecord(_Part):
    """Where training stands, and what it is training on: everything a resume needs besides the tensors."""

    step: int = Field(ge=0, lt=10**9)
    """Optimizer steps done."""
    tokens: int = Field(ge=0)
    """Tokens in the loss so far."""
    samples: int = Field(ge=0)
    """The sampler's counter: the next sample number."""
    config: dict[str, Any]
    """The resolved configuration."""
    data_fingerprint: str
    tokenizer_hash: str
    trainer: dict[str, Any] = {}
    """Counters of the training loop."""


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
        CheckpointError: It is missing, damaged, from a newer epmoe, or names files outside the folder.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        value = json.loads(raw)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it is not a finished checkpoint", fix="use another checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
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
        manifest = Manifest.model_validate_json(json.dumps(value))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(f"{path}: {where}: {problem['msg']}", fix="use another checkpoint") from None
    for name in manifest.files:
        if Path(name).name != name or not name.endswith(SHARD_SUFFIX):
            raise CheckpointError(
                f"{path} names the file {name!r}",
                why="shards are plain *.safetensors names in the same folder",
            )
    return manifest


def damaged_files(folder: Path, manifest: Manifest, names: list[str]) -> list[str]:
    """What is wrong with the named files, one line each: missing, other size, other CRC-32. Reads them whole."""
    problems = []
    for name in names:
        path, expected = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != expected.size:
                problems.append(f"{name} has {size} bytes, expected {expected.size}")
                continue
            crc = crc32_of(path)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if crc != expected.crc32:
            problems.append(f"{name} has CRC-32 {crc:08x}, expected {expected.crc32:08x}")
    return problems


def unlisted_shards(folder: Path, manifest: Manifest) -> list[str]:
    """Shards the manifest does not know; a reader that lists the folder would take tensors from them."""
    found = sorted(path.name for path in folder.iterdir() if path.name.endswith(SHARD_SUFFIX))
    return [f"{name} is not in {MANIFEST}" for name in found if name not in manifest.files]


def looks_complete(folder: Path) -> bool:
    """A cheap look: manifest readable, every file there with its size. Contents are not read."""
    try:
        manifest = read_manifest(folder)
        return all((folder / name).stat().st_size == file.size for name, file in manifest.files.items())
    except (CheckpointError, OSError):
        return False


def candidates(folder: Path) -> list[Path]:
    """Checkpoint folders inside ``folder``, newest step first. Links are left out: they may lead anywhere."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name) and not path.is_symlink()]
    return sorted((path for path in found if path.is_dir()), key=lambda path: path.name, reverse=True)
