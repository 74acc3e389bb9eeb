"""Reads the documents of a corpus: each as one passage, or a long text as several, in little memory."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from epmoe.data.corpora import VALIDATION_MODULUS, Corpus, Piece, Split, is_held_out, is_validation
from epmoe.data.files import BLOCK_BYTES
from epmoe.data.forms import BYTE_ORDER_MARK
from epmoe.data.listing import unreadable
from epmoe.data.long_lines import LONG_BYTES, blocks, outline
from epmoe.errors import DataError

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """The text of a document, or of a long one a part; parts follow each other."""

    text: str
    split: Split
    loss_ranges: Ranges | None
    """Characters that count in the loss, None = all; a document with ranges is always whole."""
    replaced: bool
    """True: it had bytes or surrogates that are no text; they became U+FFFD."""
    last: bool
    """The document ends here."""


def read_piece(corpus: Corpus, piece: Piece) -> Iterator[Passage]:
    """The documents of a piece, in order; memory is twice the bytes of the longest JSONL line, or little. A record
    with loss ranges is decoded whole.

    Raises DataError when a line is malformed or, at the end, when the file changed since the scan.
    """
    if corpus.kind == "jsonl":
        for number, line in enumerate(_lines(piece), start=piece.first_line):
            where = f"{piece.path}:{number}"
            if len(line) > LONG_BYTES and corpus.loss_field is None:
                yield from _long_record(corpus, piece, line, where)
            else:
                yield from _record(corpus, piece, line, where)
        return
    blocks = _TextBlocks(piece)
    start = 0
    for split, end in _ends(piece, blocks):
        yield from _between(blocks, start, end, split)
        start = end


def documents(passages: Iterator[Passage]) -> Iterator[tuple[Passage, Iterator[Passage]]]:
    """The first passage of every document, and the others of the same one."""
    for first in passages:
        others = _others(first, passages)
        yield first, others
        deque(others, maxlen=0)  # those that were not asked for


def _others(passage: Passage, passages: Iterator[Passage]) -> Iterator[Passage]:
    while not passage.last:
        passage = next(passages)
        yield passage


# --------------------------------------------------------------------------------------------- text files
class _TextBlocks:
    """The decoded blocks of a piece, read anew at each pass; a short one is read once."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self._short = list(_decoded(piece)) if piece.end - piece.start <= BLOCK_BYTES else None

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        return iter(self._short) if self._short is not None else _decoded(self._piece)


def _decoded(piece: Piece) -> Iterator[tuple[str, bool]]:
    """Text of each block, and whether bytes of the piece had to be replaced so far."""
    decoder, replaced = codecs.getincrementaldecoder("utf-8")("strict"), False
    for block in _checked(piece):
        state = decoder.getstate()
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            decoder, replaced = codecs.getincrementaldecoder("utf-8")("replace"), True
            decoder.setstate(state)
            text = decoder.decode(block, final=not block)
        yield text, replaced


def _checked(piece: Piece) -> Iterator[bytes]:
    """The bytes of a piece in blocks, an empty one at the end; DataError there when they are not those of the scan."""
    digest, left = hashlib.sha256(), piece.end - piece.start
    try:
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            while left and (block := file.read(min(left, BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
                yield block
    except OSError as error:
        raise unreadable(piece.path, error) from None
    _check_unchanged(piece, digest.hexdigest())
    yield b""


def _check_unchanged(piece: Piece, sha256: str) -> None:
    if sha256 != piece.sha256:
        raise DataError(
            f"{piece.path} changed while it was being prepared (bytes {piece.start} to {piece.end})",
            fix="run the command again",
        )


def _ends(piece: Piece, blocks: _TextBlocks) -> list[tuple[Split, int]]:
    """The split of each part of a text, and the character where it ends.

    A text that is all there is has its last twentieth held out; one of less than twenty characters is training.
    """
    total = sum(len(text) for text, _ in blocks)
    held = total // VALIDATION_MODULUS
    if piece.split is not None or held == 0:
        return [(piece.split or "train", total)]
    cut = _last_line_start(blocks, total - 2 * held, total - held)
    return [("train", cut), ("val", total)]


def _last_line_start(blocks: _TextBlocks, low: int, high: int) -> int:
    """Where the last line begins whose line end lies in characters ``[low, high)``; ``high`` when there is none."""
    found, place = high, 0
    for text, _ in blocks:
        newline = text.rfind("\n", max(low - place, 0), max(high - place, 0))
        if newline >= 0:
            found = place + newline + 1
        place += len(text)
    return found


def _between(blocks: _TextBlocks, start: int, end: int, split: Split) -> Iterator[Passage]:
    """Characters ``[start, end)`` as one document."""
    place = 0
    for text, replaced in blocks:
        part = text[max(start - place, 0) : max(end - place, 0)]
        place += len(text)
        if part or start == end:
            yield Passage(text=part, split=split, loss_ranges=None, replaced=replaced, last=place >= end)


# --------------------------------------------------------------------------------------------- JSONL
def _lines(piece: Piece) -> Iterator[bytes]:
    """The lines of a piece that are not empty."""
    digest, left = hashlib.sha256(), piece.end - piece.start
    try:
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            while left and (line := file.readline(left)):
                digest.update(line)
                left -= len(line)
                if line := line.removeprefix(BYTE_ORDER_MARK):
                    yield line
    except OSError as error:
        raise unreadable(piece.path, error) from None
    _check_unchanged(piece, digest.hexdigest())


def _decode(data: bytes) -> tuple[str, bool]:
    """UTF-8 -> (text, whether bytes had to be replaced)."""
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace"), True


def _long_record(corpus: Corpus, piece: Piece, line: bytes, where: str) -> Iterator[Passage]:
    """The text of a long line in parts; what is wrong with it, or short in it, is seen on the whole line."""
    digest, replaced = hashlib.sha256(), False
    try:
        record, long = outline(line)
        chosen = long[record[corpus.text_field]]
        for span in long.values():
            for text, wrong, _ in blocks(line, span):  # what is no text shows in any of them
                if span == chosen:
                    clean = _clean(text)
                    digest.update(clean.encode())
                    replaced = replaced or wrong or clean != text
    except (ValueError, RecursionError, KeyError, TypeError):
        yield from _record(corpus, piece, line, where)
        return
    split = piece.split or ("val" if is_held_out(digest.digest()) else "train")
    for text, _, last in blocks(line, chosen):
        yield Passage(text=_clean(text), split=split, loss_ranges=None, replaced=replaced, last=last)


def _record(corpus: Corpus, piece: Piece, data: bytes, where: str) -> Iterator[Passage]:
    line, replaced = _decode(data)
    if line.isspace():
        return
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON", why=str(error), fix="correct or remove the line"
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get(corpus.text_field), str):
        raise _no_text_field(corpus.text_field, record, where)
    text = record[corpus.text_field]
    clean = _clean(text)
    split = piece.split or ("val" if is_validation(clean.encode()) else "train")
    ranges = None
    if corpus.loss_field is not None and record.get(corpus.loss_field) is not None:
        ranges = _loss_ranges(record[corpus.loss_field], len(text), corpus.loss_field, where)
    yield Passage(text=clean, split=split, loss_ranges=ranges, replaced=replaced or clean != text, last=True)


def _clean(text: str) -> str:
    """JSON may spell half a surrogate pair, which no encoding can write. One for one, so ranges still fit."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _no_text_field(field: str, record: object, where: str) -> DataError:
    if not isinstance(record, dict):
        holds = f"the line holds {_json_type(record)}, not an object"
    elif field in record:
        holds = f"its value is {_json_type(record[field])}"
    else:
        holds = f"the line has the keys {', '.join(map(repr, sorted(record)[:10])) or 'of an empty object'}"
    return DataError(
        f"{where}: no text under the key {field!r}",
        why=holds,
        fix="set data.sources[].text_field, or correct or remove the line",
    )


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "true or false", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), "a number")


def _loss_ranges(value: Any, length: int, field: str, where: str) -> Ranges:
    """Checked ranges, sorted and merged, so that no character counts twice."""
    merged: list[tuple[int, int]] = []
    for pair in sorted(_checked_pairs(value, length, field, where)):
        if merged and pair[0] <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], pair[1]))
        elif pair[0] < pair[1]:
            merged.append(pair)
    return tuple(merged)


def _checked_pairs(value: Any, length: int, field: str, where: str) -> Iterator[tuple[int, int]]:
    for pair in value if isinstance(value, list) else [value]:
        numbers = isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)
        if not numbers or not 0 <= pair[0] <= pair[1] <= length:
            raise DataError(
                f"{where}: {field} holds {pair!r}, which is no [start, end) range of a text of {length} characters",
                fix="character ranges need 0 <= start <= end <= length of the text",
            )
        yield pair[0], pair[1]
