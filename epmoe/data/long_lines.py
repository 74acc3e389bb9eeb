"""A JSON line with a text of any length: its letters are decoded in blocks, for a whole one takes four bytes each."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from typing import Any

from epmoe.data.files import BLOCK_BYTES

Span = tuple[int, int]

LONG_BYTES = 4 * BLOCK_BYTES
"""Lines up to here are decoded whole."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_UNITS = re.compile(
    rb"(?:[^\\]++"
    rb"|\\[^u]"
    rb"|\\u(?![dD][89abAB]).{4}"
    rb"|\\u[dD][89abAB]..\\u[dD][c-fC-F].."  # a surrogate pair stays together
    rb"|\\u[dD][89abAB]..(?=[^\\]|\\[^u]|\\u[^dD]|\\u.[^c-fC-F])"
    rb")*+",
    re.DOTALL,
)
"""As many whole letters and escapes of a JSON string as there are before the end that is given."""
_MARK = secrets.token_hex(16)
"""Stands for a long string where the line is looked at as a whole; no text has it by chance."""


def outline(line: bytes) -> tuple[Any, dict[str, Span]]:
    """The value of a line with a mark in place of every long string, and where in the line each of these is.

    Raises:
        ValueError: It is no JSON.
    """
    spans = {
        f"{_MARK}{match.start()}": match.span()
        for match in _STRING.finditer(line)
        if match.end() - match.start() > BLOCK_BYTES
    }
    kept, place = [], 0
    for mark, (start, end) in spans.items():
        kept += [line[place:start], json.dumps(mark).encode()]
        place = end
    kept.append(line[place:])
    return json.loads(b"".join(kept).decode("utf-8", errors="replace")), spans


def blocks(line: bytes, span: Span) -> Iterator[tuple[str, bool, bool]]:
    """The text of a JSON string in the line; whether bytes of the block had to be replaced, and whether it is the last.

    Raises:
        ValueError: It is no string of JSON.
    """
    start, stop = span[0] + 1, span[1] - 1  # without the quotes
    while start < stop:
        end = _cut(line, start, stop)
        data = b'"%b"' % line[start:end]
        try:
            text, replaced = data.decode("utf-8"), False
        except UnicodeDecodeError:
            text, replaced = data.decode("utf-8", errors="replace"), True
        yield json.loads(text), replaced, end == stop
        start = end


def _cut(line: bytes, start: int, stop: int) -> int:
    """Where a block that begins at ``start`` may end: behind whole letters."""
    limit = start + BLOCK_BYTES
    if limit >= stop:
        return stop
    units = _UNITS.match(line, start, limit)
    end = units.end() if units else start
    for back in range(min(4, end - start)):
        if line[end - back] & 0xC0 != 0x80:  # the first byte of a letter in UTF-8
            return end - back
    return end if end > start else limit
