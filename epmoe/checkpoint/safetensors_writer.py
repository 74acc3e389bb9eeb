"""One safetensors file per rank, written and described for torch's distributed checkpoint (DCP).

DCP plans who writes what and how shards become the tensors of another layout. Its own safetensors writer first
builds the file in memory (twice the shard) and is seven times slower, so the bytes are streamed here instead, in the
same format: ``HuggingFaceStorageReader`` reads it. It maps files into memory, though, where one that shrinks meanwhile
ends the process; ``ShardReader`` reads them.

    8 bytes length | JSON: name -> dtype, shape, place; where in the whole tensor each piece belongs | raw bytes
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from epmoe import env
from epmoe.checkpoint.manifest import SHARD_SUFFIX, FileRecord, Manifest, TensorRecord, damage_of
from epmoe.data.files import open_regular
from epmoe.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
PIECE_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 100 * 2**20
"""safetensors' own limit."""


class ShardWriter(HuggingFaceStorageWriter):
    """DCP storage that streams this rank's tensors into one file, counting bytes and CRC-32 on the way.

    Args:
        folder: Where the shards go; exists.
        step: For fault points.
    """

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.step = step
        self.files: dict[str, FileRecord] = {}
        """The file this rank wrote; empty when the plan left it nothing."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the planned items and waits for the disk."""
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        name = f"shard_{plan.storage_data['shard_index'] - 1:05d}{SHARD_SUFFIX}"
        # Large elements first keeps every tensor aligned to its element size.
        items = sorted(plan.items, key=lambda item: (-_record(item)[0].itemsize, item.index.fqn))
        header, total = _header(items)
        try:
            with (self.folder / name).open("xb") as raw:
                file = _CountedFile(raw, total, self.step)
                file.write(memoryview(header))
                for item in items:
                    data = planner.resolve_data(item)
                    if not isinstance(data, Tensor):
                        raise AssertionError(f"checkpoint entry {item.index.fqn} is not a tensor")
                    file.write(_bytes_of(data))
                raw.flush()
                os.fsync(raw.fileno())
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            raise CheckpointError(
                f"cannot write {self.folder / name}: {error.strerror}",
                why=f"the file needs {total:,} bytes; the file system has {free:,} free",
                fix="free some space, or lower checkpoint.keep; older checkpoints are untouched",
            ) from error
        self.files = {name: FileRecord(size=file.size, crc32=file.crc32)}
        results = [WriteResult(item.index, _record(item)[2], name) for item in items]
        done.set_result(results)
        return done


class _CountedFile:
    """Writes in pieces and keeps size and CRC-32 of what was written."""

    def __init__(self, raw: BinaryIO, total: int, step: int) -> None:
        self._raw, self._total, self._step = raw, total, step
        self.size = 0
        self.crc32 = 0

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._raw.write(piece)
            self.crc32 = zlib.crc32(piece, self.crc32)
            halfway = self.size < self._total / 2 <= self.size + len(piece)
            self.size += len(piece)
            if halfway:
                env.fault("ckpt.mid_shard", step=self._step)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; no copy for a contiguous one on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _record(item: WriteItem) -> tuple[torch.dtype, list[int], int]:
    """dtype, shape and bytes of a planned piece."""
    data = item.tensor_data
    if data is None:
        raise AssertionError(f"checkpoint entry {item.index.fqn} is not a tensor")
    shape = list(data.chunk.sizes)
    dtype = data.properties.dtype
    return dtype, shape, torch.Size(shape).numel() * dtype.itemsize


def _header(items: list[WriteItem]) -> tuple[bytes, int]:
    """The file's first bytes, and the size of the whole file."""
    header: dict[str, object] = {}
    offsets, position = {}, 0
    for item in items:
        dtype, shape, size = _record(item)
        header[item.index.fqn] = {
            "dtype": DTYPES[dtype],
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}  # type: ignore[union-attr]
        position += size
    header["__metadata__"] = {
        "DCP_SHARDING_INFO": json.dumps(offsets),
        "DCP_VERSION": "1.0",
        "format": "pt",
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + position


# ------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a tensor in one file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    """Where it belongs in the whole tensor."""
    begin: int
    """Its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along dim 0; of the whole where there is no dim 0."""
        return math.prod(self.shape[1:]) * TORCH_DTYPES[self.dtype].itemsize


def read_pieces(path: Path) -> dict[str, Piece]:
    """The pieces a shard holds, by key, from its header alone.

    Raises:
        CheckpointError: The header is damaged; ``UnreachableCheckpoint`` where that cannot be told.
    """
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        metadata = header.pop("__metadata__")
        offsets = json.loads(metadata["DCP_SHARDING_INFO"])
        return {
            key: _piece(path.name, entry, offsets[key]["saved_offsets"], 8 + length, size)
            for key, entry in header.items()
        }
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {damage_of(path, error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a shard of epmoe", why=f"{type(error).__name__}: {error}"
        ) from None


def _piece(file: str, entry: Mapping[str, Any], start: list[int], data: int, file_size: int) -> Piece:
    first, end = entry["data_offsets"]
    piece = Piece(
        file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]), start=tuple(start), begin=data + first
    )
    size = math.prod(piece.shape) * TORCH_DTYPES[piece.dtype].itemsize
    if min((0, first, *piece.shape, *piece.start)) < 0 or end - first != size or data + end > file_size:
        raise ValueError(
            f"bytes {first} to {end} of {file_size - data} for {piece.dtype} {list(piece.shape)}"
        )
    return piece


class ShardReader(HuggingFaceStorageReader):
    """DCP storage that reads the tensors of a checkpoint from the files its manifest names, and from no others.

    Raises:
        CheckpointError: From ``load``: a file is not what it was when the checkpoint was verified.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(str(folder))
        self._folder, self._manifest = folder, manifest

    def read_metadata(self) -> Metadata:
        """Whole tensors from the manifest, their pieces from the shards' headers."""
        pieces: dict[str, list[Piece]] = {key: [] for key in self._manifest.tensors}
        storage: dict[MetadataIndex, Piece] = {}
        for name in sorted(self._manifest.files):
            for key, piece in read_pieces(self._folder / name).items():
                pieces[key].append(piece)
                storage[MetadataIndex(key, piece.start)] = piece
        tensors: dict[str, Any] = {
            key: _described(self._manifest.tensors[key], found) for key, found in pieces.items()
        }
        return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(load_id=self.load_id))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the planned rows in place, file by file."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].file, []).append(item)
        for name, items in by_file.items():
            try:
                self._read_items(self._folder / name, items, planner)
            except OSError as error:
                raise CheckpointError(
                    f"{self._folder / name} is gone: {damage_of(self._folder / name, error)}"
                ) from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_items(self, path: Path, items: list[ReadItem], planner: LoadPlanner) -> None:
        with open_regular(path) as file:
            for item in items:
                target = planner.resolve_tensor(item).detach()
                _read_rows(file, self.storage_data[item.storage_index], item, target)
                planner.commit_tensor(item, target)


def _described(tensor: TensorRecord, pieces: list[Piece]) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=TORCH_DTYPES[tensor.dtype]),
        size=torch.Size(tensor.shape),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(piece.start), sizes=torch.Size(piece.shape))
            for piece in pieces
        ],
    )


def _read_rows(file: BinaryIO, piece: Piece, item: ReadItem, target: Tensor) -> None:
    """Fills the target from rows of a piece, a few at a time: no copy of a large tensor is made."""
    if not target.numel():
        return
    first, count = (item.storage_offsets[0], item.lengths[0]) if piece.shape else (0, 1)
    rows = target if piece.shape else target.view(1)
    inner = tuple(
        slice(start, start + n) for start, n in zip(item.storage_offsets[1:], item.lengths[1:], strict=True)
    )
    at_once = max(1, PIECE_BYTES // piece.row_bytes)
    for done in range(0, count, at_once):
        number = min(at_once, count - done)
        data = bytearray(number * piece.row_bytes)
        file.seek(piece.begin + (first + done) * piece.row_bytes)
        if (found := file.readinto(data)) != len(data):  # type: ignore[attr-defined]
            raise CheckpointError(
                f"{file.name} became shorter while it was read",
                why=f"{len(data):,} bytes were expected, {found:,} are left",
                fix="find out who writes to it; a run resumes from the newest undamaged checkpoint by itself",
            )
        loaded = torch.frombuffer(data, dtype=TORCH_DTYPES[piece.dtype]).view(number, *piece.shape[1:])
        rows[done : done + number].copy_(loaded[(slice(None), *inner)])


def incomplete_tensors(folder: Path, names: list[str], expected: Mapping[str, TensorRecord]) -> list[str]:
    """What keeps the shards from holding every expected tensor exactly once, one line each. Reads headers."""
    pieces: dict[str, list[Piece]] = {}
    for name in names:
        for key, piece in read_pieces(folder / name).items():
            pieces.setdefault(key, []).append(piece)
    problems = [
        f"{key} is in {found[0].file}, but not expected"
        for key, found in pieces.items()
        if key not in expected
    ]
    for key, wanted in expected.items():
        problem = _coverage(pieces.get(key, []), wanted)
        if problem:
            problems.append(f"{key}: {problem}")
    return problems


def _coverage(pieces: list[Piece], wanted: TensorRecord) -> str | None:
    """Why the pieces, cut along dim 0, do not make the tensor exactly once; None if they do."""
    if not pieces:
        return "written by no rank"
    if len(pieces) == 1 and pieces[0].shape == wanted.shape and pieces[0].dtype == wanted.dtype:
        return None
    if not all(wanted.shape and piece.shape for piece in pieces):
        held = ", ".join(f"{piece.dtype} {list(piece.shape)} in {piece.file}" for piece in pieces)
        return f"held as {held}, expected {wanted.dtype} {list(wanted.shape)} once"
    rows = 0
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.dtype != wanted.dtype or piece.shape[1:] != wanted.shape[1:] or any(piece.start[1:]):
            return f"{piece.file} holds {piece.dtype} {list(piece.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
        if piece.start[0] != rows:
            kind = "twice" if piece.start[0] < rows else "not at all"
            return f"rows {min(rows, piece.start[0])} to {max(rows, piece.start[0]) - 1} are written {kind}"
        rows += piece.shape[0]
    return None if rows == wanted.shape[0] else f"rows {rows} to {wanted.shape[0] - 1} are missing"
