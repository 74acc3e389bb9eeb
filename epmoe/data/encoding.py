"""A text of any length to ids, in little memory: the ids of the whole, made from parts that overlap.

What a token is depends on the letters around it, and on those alone: a few words. So neighbouring parts share some
text, and one takes over from the other where both have the same tokens for a while:

    part 1     [ . . . . . . . . . | a b c d e f | x ]          x: the end of the part, which no token may cross
    part 2                 [ y | a b c d e f | . . . . . ]      y: its beginning, which hides what stood before
                                     ^ from here on part 2 counts

Where they do not agree, the part grows. A tokenizer that looks at the whole text, if there is one, gets the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from epmoe.data.tokenizer import Tokenizer

PART_CHARS = 1 << 18
"""Longer texts are encoded in parts of about so many characters."""
OVERLAP_CHARS = 1 << 13


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Neighbouring tokens and their text."""

    text: str
    ids: NDArray[np.int64]
    spans: NDArray[np.int64] | None
    """``[tokens, 2]``: characters ``[start, end)`` of the whole text that each came from; None = not asked for."""


def encode_text(tokenizer: Tokenizer, blocks: Iterable[str], *, spans: bool = False) -> Iterator[Encoded]:
    """The tokens of a text that comes in blocks, in order; they are those of the text in one piece.

    Args:
        tokenizer: Of the tokens.
        blocks: The text, cut anywhere.
        spans: Say which characters each token came from.
    """
    parts = _parts(blocks)
    if tokenizer.context_free:
        place = 0
        for text in parts:
            yield _encode(tokenizer, text, place, spans=spans)
            place += len(text)
        return
    text, following = next(parts, ""), next(parts, None)
    if following is None:
        yield _encode(tokenizer, text, 0, spans=spans)
        return
    yield from _overlapping(tokenizer, text, following, parts, spans=spans)


def _parts(blocks: Iterable[str]) -> Iterator[str]:
    """The same text in blocks of PART_CHARS; only the last one may be shorter."""
    kept: list[str] = []
    size = 0
    for block in blocks:
        for start in range(0, len(block), PART_CHARS):
            kept.append(block[start : start + PART_CHARS])
            size += len(kept[-1])
            if size >= PART_CHARS:
                joined = "".join(kept)
                yield joined[:PART_CHARS]
                kept, size = [joined[PART_CHARS:]], size - PART_CHARS
    if size:
        yield "".join(kept)


def _encode(tokenizer: Tokenizer, text: str, place: int, *, spans: bool) -> Encoded:
    if not spans:
        return Encoded(text=text, ids=np.array(tokenizer.encode(text), np.int64), spans=None)
    ids, offsets = tokenizer.encode_with_offsets(text)
    found = np.array(offsets, np.int64).reshape(-1, 2) + place
    return Encoded(text=text, ids=np.array(ids, np.int64), spans=found)


def _overlapping(
    tokenizer: Tokenizer, text: str, following: str | None, parts: Iterator[str], *, spans: bool
) -> Iterator[Encoded]:
    place = given = 0  # characters in front of the part, and those whose tokens are handed out
    current = _encode(tokenizer, text, place, spans=True)
    while following is not None:
        overlap = place + len(text) - OVERLAP_CHARS
        longer = text[overlap - place :] + following
        ahead = _encode(tokenizer, longer, overlap, spans=True)
        takeover = _takeover(current, ahead, overlap)
        if takeover is None:
            text += following + "".join(islice(parts, len(text) // PART_CHARS))  # twice as long
            current = _encode(tokenizer, text, place, spans=True)
        else:
            yield _cut(current, text, place, given, takeover, spans=spans)
            text, place, given, current = longer, overlap, takeover, ahead
        following = next(parts, None)
    yield _cut(current, text, place, given, place + len(text) + 1, spans=spans)


def _takeover(current: Encoded, ahead: Encoded, overlap: int) -> int | None:
    """The character in the middle of the overlap from which on both have the same tokens; None when they differ."""
    low, high = overlap + OVERLAP_CHARS // 4, overlap + OVERLAP_CHARS * 3 // 4
    ids, spans = _inside(current, low, high)
    other_ids, other_spans = _inside(ahead, low, high)
    if not np.array_equal(ids, other_ids) or not np.array_equal(spans, other_spans):
        return None
    middle = np.flatnonzero(spans[:, 0] >= (low + high) // 2)
    if not len(middle) or middle[0] == 0:
        return None
    first = int(middle[0])
    start, before = int(spans[first, 0]), int(spans[first - 1, 1])
    return start if before <= start else None


def _inside(part: Encoded, low: int, high: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    assert part.spans is not None
    chosen = (part.spans[:, 0] >= low) & (part.spans[:, 1] <= high)
    return part.ids[chosen], part.spans[chosen]


def _cut(part: Encoded, text: str, place: int, start: int, end: int, *, spans: bool) -> Encoded:
    """The tokens of characters ``[start, end)``; ``place`` is where the part's text begins."""
    assert part.spans is not None
    chosen = (part.spans[:, 0] >= start) & (part.spans[:, 0] < end)
    return Encoded(
        text=text[start - place : end - place],
        ids=part.ids[chosen],
        spans=part.spans[chosen] if spans else None,
    )
