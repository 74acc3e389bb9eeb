"""What of a text its tokens keep.

Bits per byte divide a loss by the bytes of a text. They mean something only where the tokens are that text: a tokenizer
that folds case, or knows no word for half of it, makes the text easier and not the model better.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epmoe.data.encoding import Encoded
from epmoe.data.indexed import IndexedPair
from epmoe.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from epmoe.errors import DataError

PROBES = (
    "Plain words, Capitals AND the rest.",
    " a leading space, two  in the middle and one at the end ",
    "line\n\n\tindented\r\nline \n",
    "don't , stop . it ' s",
    "é e\u0301 ﬁ ½ Ⅳ Å Ω ２ ß İ ſ ẞ 漢字 한글 สวัสดี עברית 👩‍👩‍👧 \u00a0 \u200b \u3000",
    "".join(map(chr, range(1, 0x250))),
    "".join(chr(point) for point in range(0x80, 0x110000, 613) if not 0xD800 <= point < 0xE000),
)
"""Letters of both cases, spaces, composed and compatible characters, and every byte that UTF-8 can have."""
CONTEXT_TOKENS = 16
PART_TOKENS = 1 << 18
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def gives_text_back(tokenizer: Tokenizer) -> bool:
    """Whether texts of every kind come back from their tokens unchanged."""
    try:
        return all(tokenizer.decode(tokenizer.encode(probe)) == probe for probe in PROBES)
    except DataError:  # a model without an unknown token refuses what it does not know
        return False


class RoundTrip:
    """Counts the characters of a document that do not come back from its tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []

    def lost(self, part: Encoded) -> int:
        """Characters of the next part that are missing from what is decoded, or are there without having been in it.

        Parts are decoded behind some tokens of the one before: the first token of a text loses its leading space.
        """
        ids = part.ids.tolist()
        shown = len(self._tokenizer.decode(self._before)) if self._before else 0
        decoded = self._tokenizer.decode([*self._before, *ids])[shown:]
        self._before = (self._before + ids)[-CONTEXT_TOKENS:]
        if decoded == part.text:
            return 0
        wanted, found = Counter(part.text), Counter(decoded)
        # At least one, also where the same characters stand in another order.
        return min(max((wanted - found).total(), (found - wanted).total(), 1), max(len(part.text), 1))


def decoded_parts(tokenizer: Tokenizer, ids: NDArray[Any]) -> Iterator[str]:
    """The text of a document in parts, so that one of any length needs little memory; a part ends with a character."""
    before: list[int] = []
    start = 0
    while start < len(ids):
        for stop in range(start + PART_TOKENS, start + PART_TOKENS + CONTEXT_TOKENS):
            block = ids[start:stop].tolist()
            text = tokenizer.decode([*before, *block])
            if stop >= len(ids) or not text.endswith("\ufffd"):
                break
        yield text[len(tokenizer.decode(before)) if before else 0 :]
        before, start = block[-CONTEXT_TOKENS:], start + len(block)


def count_text_bytes(pair: IndexedPair, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Bytes of the text behind the tokens of a pair, all and those that count in the loss; None: they do not say.

    Exact also where a document begins or ends inside a character.
    """
    size_V = _bytes_of_ids(tokenizer)
    if size_V is None or not gives_text_back(tokenizer):
        return None
    total = counted = 0
    for start, stop in pairwise(pair.document_offsets.tolist()):
        ids = np.asarray(pair.tokens[start:stop])
        size_N = size_V[ids]
        if len(size_N):
            size_N[0] += _first_less(tokenizer, int(ids[0]), int(size_N[0]))
        total += int(size_N.sum())
        counted += int(size_N.sum() if pair.mask is None else size_N[pair.mask[start:stop] != 0].sum())
    return total, counted


def _bytes_of_ids(tokenizer: Tokenizer) -> NDArray[np.int64] | None:
    """Bytes of text that each id stands for, 0 for control tokens."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.append(np.ones(256, np.int64), 0)
    return _bytes_of_pieces(tokenizer) if isinstance(tokenizer, JsonTokenizer) else None


def _bytes_of_pieces(tokenizer: JsonTokenizer) -> NDArray[np.int64] | None:
    """None for decoders that do more than put bytes together."""
    decoder = json.loads(tokenizer.source).get("decoder") or {}
    kinds = {step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step}
    if kinds != {"ByteLevel"} and "ByteFallback" not in kinds:
        return None
    added = tokenizer.inner.get_added_tokens_decoder()
    size_V = np.zeros(tokenizer.size, np.int64)
    for piece, number in tokenizer.inner.get_vocab(with_added_tokens=True).items():
        if number == tokenizer.eos_id or (number in added and added[number].special):
            continue
        if number in added:
            size_V[number] = len(piece.encode())
        elif kinds == {"ByteLevel"}:
            size_V[number] = len(piece)  # a letter of such a piece is a byte
        else:
            size_V[number] = 1 if BYTE_TOKEN.fullmatch(piece) else len(piece.replace("▁", " ").encode())
    return size_V


def _first_less(tokenizer: Tokenizer, first: int, size: int) -> int:
    """What the first token of a text gives less than elsewhere: the space that was put in front of it."""
    decoded = tokenizer.decode([first])
    return min(len(decoded.encode()) - size, 0) if size and "\ufffd" not in decoded else 0
