"""Token files in Megatron's format: ``.bin`` holds tokens, ``.idx`` says where sequences and documents are.

    .idx   bytes  0..8    MMIDIDX\\0\\0
                  9..16   uint64 version, 1
                 17       uint8 dtype code: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6, 7: floats)
                 18..25   uint64 sequences Q
                 26..33   uint64 document indices, documents + 1
                 then     int32 lengths [Q], int64 byte pointers into .bin [Q], int64 document indices
    .bin   the tokens of all sequences, one after the other
    .mask  ours, optional: one uint8 per token, 1 = counts in the loss

All numbers are little-endian. Document d is sequences ``[index[d], index[d + 1])``. Sizes are checked by arithmetic
on Python integers, which do not overflow, before anything is mapped.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epmoe.data.files import crc32_of, write_atomically
from epmoe.errors import DataError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
LENGTH, POINTER = np.dtype("<i4"), np.dtype("<i8")
DTYPE_OF_CODE: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        code: np.dtype(f"<{name}")
        for code, name in ((1, "u1"), (2, "i1"), (3, "i2"), (4, "i4"), (5, "i8"), (8, "u2"))
    }
)
FLOAT_CODES = (6, 7)
TOKENS_AT_A_TIME = 1 << 22
MAX_SEQUENCE = 2**31 - 1

Ints = NDArray[Any]


def bin_path(prefix: Path) -> Path:
    """The tokens of a pair."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """The index of a pair."""
    return Path(f"{prefix}.idx")


def mask_path(prefix: Path) -> Path:
    """The loss mask of a pair, if it has one."""
    return Path(f"{prefix}.mask")


def pair_prefix(path: str | Path) -> Path:
    """The prefix a user may have typed with its ``.bin`` or ``.idx``."""
    text = str(Path(path).expanduser())
    return Path(text[:-4] if text.endswith((".bin", ".idx")) else text).absolute()


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedPair:
    """An opened pair. ``tokens`` and ``mask`` are mapped, not read."""

    prefix: Path
    tokens: Ints
    document_offsets: NDArray[np.int64]
    """Token offset of every document, and the total: documents + 1 entries."""
    mask: NDArray[np.uint8] | None
    """1 = counts in the loss; None = every token does."""

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.document_offsets) - 1

    def require_whole(self) -> None:
        """Called before a read, because one of what is no longer there ends the process with SIGBUS.

        Raises:
            DataError: A file has shrunk since it was mapped.
        """
        files = {bin_path(self.prefix): self.tokens, mask_path(self.prefix): self.mask}
        for path, mapped in files.items():
            try:
                size = os.stat(path).st_size
            except OSError:
                continue  # what was removed stays mapped
            if mapped is not None and size < mapped.nbytes:
                raise DataError(
                    f"{path} has shrunk from {mapped.nbytes} to {size} bytes while it was read",
                    why="somebody writes or cuts it; samples are read where they lie",
                    fix="restore it, then run the same command again: training goes on from the last checkpoint",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSums:
    """CRC-32 of the files of a pair."""

    bin_crc32: int
    idx_crc32: int
    mask_crc32: int | None


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrower of the two usual dtypes that holds every id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<i4")


class IndexedWriter:
    """Writes a pair document by document, one sequence each; ``finish`` writes the index.

    Args:
        prefix: Path without ``.bin``.
        dtype: Of the tokens.
        with_mask: Also write ``.mask``.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any], *, with_mask: bool = False) -> None:
        self._prefix, self._dtype = prefix, dtype
        self._lengths = array("q")
        self._open = 0
        """Tokens of the document that is being written."""
        self._bin = bin_path(prefix).open("wb")
        self._mask = mask_path(prefix).open("wb") if with_mask else None
        self._bin_crc = self._mask_crc = 0

    def add(self, tokens: Ints, lengths: Ints, mask: Ints | None = None) -> None:
        """Appends documents.

        Args:
            tokens: Ids of all of them, one after the other.
            lengths: Tokens of each.
            mask: uint8 per token; needed exactly when the writer was made with a mask.
        """
        if int(np.sum(lengths)) != len(tokens):
            raise ValueError(f"lengths add up to {np.sum(lengths)}, got {len(tokens)} tokens")
        self.extend(tokens, mask)
        self._open = 0
        for length in np.asarray(lengths).tolist():
            self._end(length)

    def extend(self, tokens: Ints, mask: Ints | None = None) -> None:
        """Appends tokens to the document that ``end_document`` ends."""
        if (mask is None) != (self._mask is None):
            raise ValueError(f"a mask is {'missing' if mask is None else 'not expected'}")
        data = np.ascontiguousarray(tokens, dtype=self._dtype).data.cast("B")
        self._bin.write(data)
        self._bin_crc = zlib.crc32(data, self._bin_crc)
        self._open += len(tokens)
        if mask is not None and self._mask is not None:
            marks = np.ascontiguousarray(mask, dtype=np.uint8).data
            self._mask.write(marks)
            self._mask_crc = zlib.crc32(marks, self._mask_crc)

    def end_document(self) -> None:
        """Ends the document of what was appended since the last one."""
        self._end(self._open)
        self._open = 0

    def _end(self, length: int) -> None:
        if length > MAX_SEQUENCE:
            raise DataError(
                f"a document has {length} tokens, the format's largest is {MAX_SEQUENCE}", fix="split it"
            )
        self._lengths.append(length)

    def append_pair(self, prefix: Path) -> FileSums:
        """Appends all documents of another pair of the same kind, without holding it -> checksums of what was read."""
        pair = open_indexed(prefix)
        sums = [0, 0]
        for tokens, mask in blocks_of(pair):
            self.extend(tokens, mask)
            sums[0] = zlib.crc32(tokens.data.cast("B"), sums[0])
            sums[1] = 0 if mask is None else zlib.crc32(mask.data, sums[1])
        self._open = 0
        for length in np.diff(pair.document_offsets).tolist():
            self._end(length)
        has_mask = pair.mask is not None
        return FileSums(
            bin_crc32=sums[0],
            idx_crc32=crc32_of(idx_path(prefix)),
            mask_crc32=sums[1] if has_mask else None,
        )

    def finish(self) -> FileSums:
        """Closes the files and writes the index."""
        for file in (self._bin, self._mask):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
                file.close()
        index = index_bytes(np.array(self._lengths, np.int64), self._dtype)
        write_atomically(idx_path(self._prefix), index)
        return FileSums(
            bin_crc32=self._bin_crc,
            idx_crc32=zlib.crc32(index),
            mask_crc32=None if self._mask is None else self._mask_crc,
        )


def index_bytes(lengths: Ints, dtype: np.dtype[Any]) -> bytes:
    """The ``.idx`` of documents of these lengths, one sequence each."""
    code = next(code for code, known in DTYPE_OF_CODE.items() if known == dtype)
    ends = np.cumsum(lengths, dtype=POINTER) * dtype.itemsize
    pointers = np.concatenate([np.zeros(1, POINTER), ends])[: len(lengths)].astype(POINTER)
    documents = np.arange(len(lengths) + 1, dtype=POINTER)
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(documents))
    return b"".join((header, lengths.astype(LENGTH).tobytes(), pointers.tobytes(), documents.tobytes()))


def blocks_of(pair: IndexedPair) -> Iterator[tuple[Ints, Ints | None]]:
    """Tokens and mask in blocks that are read, not mapped: pages of a mapped file stay resident."""
    total = len(pair.tokens)
    for start in range(0, total, TOKENS_AT_A_TIME):
        count = min(TOKENS_AT_A_TIME, total - start)
        yield (
            _read(bin_path(pair.prefix), pair.tokens.dtype, start, count),
            None if pair.mask is None else _read(mask_path(pair.prefix), pair.mask.dtype, start, count),
        )


def _read(path: Path, dtype: np.dtype[Any], start: int, count: int) -> Ints:
    found = np.fromfile(path, dtype, count, offset=start * dtype.itemsize)
    if len(found) != count:
        raise DataError(f"{path} became shorter while it was read", fix="run the command again")
    return found


def open_indexed(prefix: Path) -> IndexedPair:
    """Checks a pair by arithmetic and maps it.

    Raises DataError, with expected and actual bytes, for a damaged header, a float dtype, an index or token file of
    another size than it says, pointers that are not those of sequences in order, and document indices out of order.
    """
    index, tokens_file = idx_path(prefix), bin_path(prefix)
    for file in (index, tokens_file):
        if not file.is_file():
            raise DataError(f"{file} is missing", fix="give the prefix of a .bin/.idx pair")
    header = _read_header(index)
    lengths, pointers, documents = _read_arrays(index, header)
    total, size = _check_lengths(index, lengths), header.dtype.itemsize
    expected, actual = total * size, tokens_file.stat().st_size
    if expected != actual:
        raise DataError(
            f"{tokens_file} has {actual} bytes, expected {expected}",
            why=f"{index} lists {total} tokens of {size} bytes; the copy is incomplete or of another pair",
        )
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    wrong = np.flatnonzero(pointers != offsets[:-1] * size)
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{index}: sequence {first} points to byte {int(pointers[first])}, "
            f"expected {int(offsets[first]) * size}",
            why="sequences must follow each other without gaps",
        )
    if documents[0] != 0 or documents[-1] != len(lengths) or np.any(np.diff(documents) < 0):
        raise DataError(
            f"{index}: document indices run from {documents[0]} to {documents[-1]}, "
            f"expected 0 to {len(lengths)} in order"
        )
    return IndexedPair(
        prefix=prefix,
        tokens=_map(tokens_file, header.dtype, total),
        document_offsets=offsets[documents],
        mask=_open_mask(prefix, total),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    dtype: np.dtype[Any]
    num_sequences: int
    num_indices: int


def _read_header(index: Path) -> _Header:
    """The checked header; also checks the size of the whole index."""
    actual = index.stat().st_size
    if actual < HEADER.size:
        raise DataError(f"{index} has {actual} bytes, expected at least {HEADER.size} for its header")
    with index.open("rb") as file:
        magic, version, code, num_sequences, num_indices = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC or version != 1:
        raise DataError(
            f"{index} begins with {magic!r} and version {version}, expected {MAGIC!r} and version 1",
            why="it is no index of Megatron's .bin/.idx format",
        )
    if code not in DTYPE_OF_CODE:
        kind = "floats, which are no token ids" if code in FLOAT_CODES else "unknown"
        raise DataError(f"{index}: dtype code {code} is {kind}; known codes: {sorted(DTYPE_OF_CODE)}")
    expected = (
        HEADER.size + num_sequences * (LENGTH.itemsize + POINTER.itemsize) + num_indices * POINTER.itemsize
    )
    if expected != actual or num_indices < 1:
        raise DataError(
            f"{index} has {actual} bytes, expected {expected}",
            why=f"its header announces {num_sequences} sequences and {num_indices} document indices",
        )
    return _Header(dtype=DTYPE_OF_CODE[code], num_sequences=num_sequences, num_indices=num_indices)


def _read_arrays(index: Path, header: _Header) -> Iterator[Ints]:
    """Lengths, pointers and document indices."""
    with index.open("rb") as file:
        file.seek(HEADER.size)
        yield np.fromfile(file, LENGTH, header.num_sequences)
        yield np.fromfile(file, POINTER, header.num_sequences)
        yield np.fromfile(file, POINTER, header.num_indices)


def _check_lengths(index: Path, lengths: Ints) -> int:
    if len(lengths) and int(lengths.min()) < 0:
        first = int(np.flatnonzero(lengths < 0)[0])
        raise DataError(f"{index}: sequence {first} has length {int(lengths[first])}")
    return int(lengths.sum(dtype=np.int64))


def _open_mask(prefix: Path, total: int) -> NDArray[np.uint8] | None:
    file = mask_path(prefix)
    if not file.is_file():
        return None
    if file.stat().st_size != total:
        raise DataError(f"{file} has {file.stat().st_size} bytes, expected {total}, one per token")
    return _map(file, np.dtype(np.uint8), total)


def _map(file: Path, dtype: np.dtype[Any], count: int) -> Ints:
    # An empty file cannot be mapped.
    return np.memmap(file, dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)
