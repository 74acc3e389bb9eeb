"""Tokenises a shard: some pieces of one corpus become one folder, the unit of work that survives a kill.

<name>-00000/train.bin  .idx  .mask   the documents of each split, as in the result
             val.bin    .idx  .mask
             counts.json              what was counted on the way, and the checksums of the files
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epmoe.data.corpora import (
    MAX_PIECE_BYTES,
    MIN_PIECE_BYTES,
    Corpus,
    Piece,
    Split,
)
from epmoe.data.encoding import PART_CHARS, Encoded, encode_text
from epmoe.data.fidelity import RoundTrip
from epmoe.data.files import StopFlag, never_stop, read_json, stop_if, write_json
from epmoe.data.indexed import FileSums, IndexedWriter, token_dtype
from epmoe.data.passages import Passage, Ranges, documents, read_piece
from epmoe.data.tokenizer import Tokenizer
from epmoe.errors import DataError

SHARDS_PER_CORPUS = 256
SPLITS: tuple[Split, Split] = ("train", "val")
COUNTS_FILE = "counts.json"
Marks = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """One shard to make."""

    corpus: Corpus
    """Only the pieces of this shard."""
    out: str
    tokenizer: str
    """Folder of the tokenizer."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """What is counted while the documents of a split are tokenised; sums over shards."""

    documents: int = 0
    tokens: int = 0
    utf8_bytes: int = 0
    loss_utf8_bytes: int = 0
    """Bytes that count in the loss."""
    replaced: int = 0
    """Documents with bytes that are no text."""
    empty: int = 0
    chars: int = 0
    """Of validation text: its characters, and those that do not come back from the tokens."""
    lost_chars: int = 0

    def add(self, other: Counts) -> None:
        """Adds up."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


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
            out=str(folder / f"{corpus.name}-{number:05d}"),
            tokenizer=str(tokenizer),
        )
        for number, group in enumerate(groups)
        if group
    ]


def make_shard(job: ShardJob, tokenizer: Tokenizer, should_stop: StopFlag = never_stop) -> None:
    """Tokenises a shard into a folder that appears complete, or not at all."""
    out = Path(job.out)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.mkdir()
    try:
        _write_shard(job, tokenizer, unfinished, should_stop)
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_shard(job: ShardJob, tokenizer: Tokenizer, folder: Path, should_stop: StopFlag) -> None:
    with_mask = job.corpus.loss_field is not None
    writers = {split: _SplitWriter(tokenizer, folder / split, with_mask=with_mask) for split in SPLITS}
    for piece in job.corpus.pieces:
        for first, others in documents(_stoppable(read_piece(job.corpus, piece), should_stop)):
            writers[first.split].add(first, chain([first], others))
    record = {split: [asdict(writer.counts), asdict(writer.finish())] for split, writer in writers.items()}
    write_json(folder / COUNTS_FILE, record)


def _stoppable(passages: Iterator[Passage], should_stop: StopFlag) -> Iterator[Passage]:
    """A long document may take minutes."""
    for passage in passages:
        stop_if(should_stop)
        yield passage


def merge_shard(job: ShardJob, split: Split, writer: IndexedWriter) -> Counts:
    """Appends one split of a finished shard; a damaged one is removed, so that the next run makes it again."""
    folder = Path(job.out)
    try:
        counts, sums = read_json(folder / COUNTS_FILE)[split]
        if writer.append_pair(folder / split) == FileSums(**sums):
            return Counts(**counts)
        why = "its checksums differ"
    except (DataError, KeyError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
    shutil.rmtree(folder)
    raise DataError(f"the finished shard {folder} is damaged", why=why, fix="run the command again") from None


class _SplitWriter:
    """Writes the documents of one split."""

    def __init__(self, tokenizer: Tokenizer, prefix: Path, *, with_mask: bool) -> None:
        self.counts = Counts()
        self._tokenizer, self._with_mask = tokenizer, with_mask
        self._writer = IndexedWriter(prefix, token_dtype(tokenizer.size), with_mask=with_mask)

    def add(self, first: Passage, passages: Iterator[Passage]) -> None:
        """Appends a document; one without tokens is only counted."""
        counts = Counts()
        texts = _counted(passages, counts)
        trip = RoundTrip(self._tokenizer) if first.split == "val" else None
        for part, marks in encode_document(self._tokenizer, texts, first.loss_ranges):
            self._writer.extend(part.ids, marks if self._with_mask else None)
            counts.tokens += len(part.ids)
            if trip is not None:
                counts.chars += len(part.text)
                counts.lost_chars += trip.lost(part)
        if counts.tokens == 0:
            self.counts.add(
                Counts(replaced=counts.replaced, empty=1, chars=counts.chars, lost_chars=counts.lost_chars)
            )
            return
        end_counts = first.loss_ranges is None or (
            bool(first.loss_ranges) and first.loss_ranges[-1][1] == len(first.text)
        )
        end = np.array([self._tokenizer.eos_id])
        self._writer.extend(end, np.array([end_counts], np.uint8) if self._with_mask else None)
        self._writer.end_document()
        counts.documents, counts.tokens = 1, counts.tokens + 1
        self.counts.add(counts)

    def finish(self) -> FileSums:
        return self._writer.finish()


def _counted(passages: Iterator[Passage], counts: Counts) -> Iterator[str]:
    """The text of a document, whose bytes are counted as it goes by."""
    for passage in passages:
        size = _utf8_bytes(passage.text)
        counts.utf8_bytes += size
        ranges = passage.loss_ranges
        counts.loss_utf8_bytes += (
            size if ranges is None else sum(_utf8_bytes(passage.text[start:end]) for start, end in ranges)
        )
        counts.replaced = int(passage.replaced)  # it stays so once it is
        yield passage.text


def _utf8_bytes(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(len(text[i : i + PART_CHARS].encode()) for i in range(0, len(text), PART_CHARS))


def encode_document(
    tokenizer: Tokenizer, blocks: Iterable[str], ranges: Ranges | None
) -> Iterator[tuple[Encoded, Marks]]:
    """The tokens of a document, without its end-of-text, and uint8 marks of those that count in the loss.

    A token counts when at least one of its characters lies in a range.
    """
    for part in encode_text(tokenizer, blocks, spans=ranges is not None):
        if ranges is None or part.spans is None:
            yield part, np.ones(len(part.ids), np.uint8)
        else:
            yield part, _inside(part.spans, ranges)


def _inside(spans: NDArray[np.int64], ranges: Ranges) -> Marks:
    """uint8 per token: 1 where ``[a, b)`` overlaps one of the sorted, separate ranges."""
    if not ranges:
        return np.zeros(len(spans), np.uint8)
    limits = np.array(ranges, np.int64)
    # The first range that ends behind the token's first character is the only one that can begin before its end.
    candidate = np.searchsorted(limits[:, 1], spans[:, 0], side="right")
    starts = np.append(limits[:, 0], np.iinfo(np.int64).max)
    return (starts[candidate] < spans[:, 1]).astype(np.uint8)
