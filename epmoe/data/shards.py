"""Tokenises a shard: some pieces of one corpus become one ``.npz`` file, the unit of work that survives a kill."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epmoe.data.corpora import (
    MAX_PIECE_BYTES,
    MIN_PIECE_BYTES,
    Corpus,
    Document,
    Piece,
    Ranges,
    Split,
    read_piece,
)
from epmoe.data.files import write_atomically
from epmoe.data.indexed import Ints, token_dtype
from epmoe.data.tokenizer import Offsets, Tokenizer
from epmoe.errors import DataError

ENCODE_CHARS = 1 << 20
"""Longer texts are tokenised in parts, so that memory stays small; the parts end at line ends where they can."""
SHARDS_PER_CORPUS = 256
SPLITS: tuple[Split, Split] = ("train", "val")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """One shard to make."""

    corpus: Corpus
    """Only the pieces of this shard."""
    out: str
    tokenizer: str
    """Folder of the tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSplit:
    """The training or validation documents of a shard."""

    tokens: Ints
    lengths: NDArray[np.int64]
    mask: NDArray[np.uint8]
    """One per token, empty when the corpus has no loss ranges."""
    utf8_bytes: int
    loss_utf8_bytes: int
    replaced: int
    empty: int


def plan_shards(corpus: Corpus, folder: Path, tokenizer: Path) -> list[ShardJob]:
    """Groups neighbouring pieces into shards of 1 to 16 MiB, the same ones at every start."""
    wanted = min(max(corpus.num_bytes // SHARDS_PER_CORPUS, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in corpus.pieces:
        if size >= wanted:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.end - piece.start
    return [
        ShardJob(
            corpus=replace(corpus, pieces=tuple(group)),
            out=str(folder / f"{corpus.name}-{number:05d}.npz"),
            tokenizer=str(tokenizer),
        )
        for number, group in enumerate(groups)
        if group
    ]


def make_shard(job: ShardJob, tokenizer: Tokenizer) -> None:
    """Tokenises a shard and writes it atomically."""
    builders = {split: _Builder(tokenizer, with_mask=job.corpus.loss_field is not None) for split in SPLITS}
    for piece in job.corpus.pieces:
        for document in read_piece(job.corpus, piece):
            builders[document.split].add(document)
    arrays: dict[str, Ints] = {}
    for split, builder in builders.items():
        arrays |= {f"{split}_{key}": value for key, value in builder.arrays().items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(Path(job.out), buffer.getvalue())


def read_shard(job: ShardJob, split: Split) -> ShardSplit:
    """One split of a finished shard; a damaged one is removed, so that the next run makes it again."""
    try:
        with np.load(job.out, allow_pickle=False) as arrays:
            counts = arrays[f"{split}_counts"].tolist()
            return ShardSplit(
                tokens=arrays[f"{split}_tokens"],
                lengths=arrays[f"{split}_lengths"],
                mask=arrays[f"{split}_mask"],
                utf8_bytes=counts[0],
                loss_utf8_bytes=counts[1],
                replaced=counts[2],
                empty=counts[3],
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        Path(job.out).unlink()
        raise DataError(
            f"the finished shard {job.out} is damaged", why=str(error), fix="run the command again"
        ) from None


class _Builder:
    """Collects the documents of one split."""

    def __init__(self, tokenizer: Tokenizer, *, with_mask: bool) -> None:
        self._tokenizer, self._with_mask = tokenizer, with_mask
        self._tokens: list[Ints] = []
        self._masks: list[Ints] = []
        self._counts = np.zeros(4, np.int64)

    def add(self, document: Document) -> None:
        ids, marks = encode_document(self._tokenizer, document.text, document.loss_ranges)
        if len(ids) == 1:  # nothing but end-of-text
            self._counts += (0, 0, document.replaced, 1)
            return
        size = len(document.text.encode())
        counted = size if document.loss_ranges is None else _bytes_inside(document.text, document.loss_ranges)
        self._tokens.append(ids.astype(token_dtype(self._tokenizer.size)))
        self._masks.append(marks)
        self._counts += (size, counted, document.replaced, 0)

    def arrays(self) -> dict[str, Ints]:
        tokens = np.concatenate([np.zeros(0, token_dtype(self._tokenizer.size)), *self._tokens])
        masks = self._masks if self._with_mask else []
        return {
            "tokens": tokens,
            "lengths": np.array([len(ids) for ids in self._tokens], np.int64),
            "mask": np.concatenate([np.zeros(0, np.uint8), *masks]),
            "counts": self._counts,
        }


def encode_document(tokenizer: Tokenizer, text: str, ranges: Ranges | None) -> tuple[Ints, Ints]:
    """Ids with end-of-text at the end, and uint8 marks of those that count in the loss.

    A token counts when at least one of its characters lies in a range; end-of-text counts when the last range
    reaches the end of the text.
    """
    ids: list[int] = []
    offsets: Offsets = []
    for start, end in _parts(text):
        if ranges is None:
            ids += tokenizer.encode(text[start:end])
            continue
        part_ids, part_offsets = tokenizer.encode_with_offsets(text[start:end])
        ids += part_ids
        offsets += [(start + a, start + b) for a, b in part_offsets]
    ids.append(tokenizer.eos_id)
    if ranges is None:
        return np.array(ids, np.int64), np.ones(len(ids), np.uint8)
    end_counts = bool(ranges) and ranges[-1][1] == len(text)
    return np.array(ids, np.int64), np.append(_inside(offsets, ranges), np.uint8(end_counts))


def _parts(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        end = min(start + ENCODE_CHARS, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield start, end
        start = end


def _inside(offsets: Offsets, ranges: Ranges) -> NDArray[np.uint8]:
    """uint8 per token: 1 where ``[a, b)`` overlaps one of the sorted, separate ranges."""
    if not offsets or not ranges:
        return np.zeros(len(offsets), np.uint8)
    spans, limits = np.array(offsets, np.int64), np.array(ranges, np.int64)
    # The first range that ends behind the token's first character is the only one that can begin before its end.
    candidate = np.searchsorted(limits[:, 1], spans[:, 0], side="right")
    starts = np.append(limits[:, 0], np.iinfo(np.int64).max)
    return (starts[candidate] < spans[:, 1]).astype(np.uint8)


def _bytes_inside(text: str, ranges: Sequence[tuple[int, int]]) -> int:
    return sum(len(text[start:end].encode()) for start, end in ranges)
