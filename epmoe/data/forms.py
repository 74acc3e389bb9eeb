"""What a file is, told from its first bytes: text, JSON, something packed, or no text at all.

A name is believed in one case only: ``.jsonl`` and ``.ndjson`` say what every line is meant to be, so a line that is
none is an error of the file and not another form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

PROBE_BYTES = 8192
"""A form shows among so many first bytes; text has no NUL byte there."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINES_SUFFIXES = (".jsonl", ".ndjson")
PACKED: Mapping[bytes, str] = MappingProxyType(
    {
        b"\x1f\x8b": "gzip",
        b"\x28\xb5\x2f\xfd": "zstd",
        b"\xfd7zXZ\0": "xz",
        b"BZh": "bzip2",
        b"\x04\x22\x4d\x18": "lz4",
        b"PK\x03\x04": "zip",
        b"7z\xbc\xaf\x27\x1c": "7-zip",
        b"Rar!": "rar",
        b"PAR1": "Parquet",
        b"ARROW1": "Arrow",
        b"\xff\xff\xff\xff": "Arrow stream",
        b"Obj\x01": "Avro",
        b"ORC": "ORC",
        b"\x89HDF": "HDF5",
        b"\x93NUMPY": "NumPy",
        b"SQLite format 3": "SQLite",
        b"%PDF-": "PDF",
        b"MMIDIDX": "token index",
        b"\xff\xfe": "UTF-16",
        b"\xfe\xff": "UTF-16",
        b"\0\0\xfe\xff": "UTF-32",
    }
)
"""First bytes of files that may hold text which this project does not unpack."""
TAR_MARK = (257, b"ustar")
JSON_START = re.compile(r"\{|\[\s*[\[{\"]")
"""Prose begins with ``[1]`` as well; a list of numbers is none of records."""

Shape = Literal["text", "lines", "json", "packed", "binary"]
"""``lines``: a JSON object per line. ``json``: JSON of another shape. ``packed``: ``Form.what`` says as what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a file is."""

    shape: Shape
    what: str = ""
    """Of a packed file: gzip, Parquet ..."""
    keys: tuple[str, ...] = ()
    """Of ``lines`` and ``json``: the keys of the first object, as far as it was seen."""


def form_of(path: Path) -> Form:
    """Reads the beginning of a file; OSError when it cannot be read."""
    with path.open("rb") as file:
        head = file.read(PROBE_BYTES)
    form = form_of_bytes(head, whole=len(head) < PROBE_BYTES)
    if path.name.lower().endswith(LINES_SUFFIXES) and form.shape not in ("packed", "binary"):
        return Form(shape="lines", keys=form.keys)
    return form


def form_of_bytes(head: bytes, *, whole: bool) -> Form:
    """The form of a file that begins so; ``whole``: there is no more of it."""
    for mark, what in PACKED.items():
        if head.startswith(mark) and _is_packed(what, head):
            return Form(shape="packed", what=what)
    if head[TAR_MARK[0] :].startswith(TAR_MARK[1]):
        return Form(shape="packed", what="tar")
    if b"\0" in head:
        return Form(shape="binary")
    text = head.removeprefix(BYTE_ORDER_MARK).decode("utf-8", errors="replace").strip()
    return _json_form(text, whole=whole) if JSON_START.match(text) else Form(shape="text")


def _is_packed(what: str, head: bytes) -> bool:
    """Marks of plain letters may begin a text as well: those formats have bytes that no text has."""
    if what in ("bzip2", "rar", "Parquet", "ORC", "Avro"):
        return b"\0" in head or not _is_utf8(head)
    return True


def _is_utf8(head: bytes) -> bool:
    try:
        head[:-4].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def _json_form(text: str, *, whole: bool) -> Form:
    """Of a text that begins like JSON: lines when the first value ends with its line, which is an object."""
    first, _, rest = text.partition("\n")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return _longer_json(text, first, whole=whole)
    if not isinstance(value, dict):
        shape: Shape = "lines" if rest.lstrip().startswith("[") else "json"
        return Form(shape=shape, keys=_keys(value))
    following = rest.lstrip().partition("\n")[0]
    if following and not _begins_json(following, whole=whole and "\n" not in rest.strip()):
        return Form(shape="text")
    return Form(shape="lines", keys=_keys(value))


def _longer_json(text: str, first: str, *, whole: bool) -> Form:
    """The first value does not end with its line: it goes on in the next ones, or behind what was read."""
    if not _begins_json(text, whole=whole):
        return Form(shape="text")
    one_line = first == text
    return Form(shape="lines" if one_line and text.startswith("{") else "json", keys=_early_keys(text))


def _begins_json(text: str, *, whole: bool) -> bool:
    """Whether it is JSON, or could be when more of it were there."""
    try:
        json.JSONDecoder().raw_decode(text)
    except RecursionError:
        return True
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - len("false")
        return cut and not whole
    return True


def _keys(value: object) -> tuple[str, ...]:
    first = value[0] if isinstance(value, list) and value else value
    return tuple(map(str, first)) if isinstance(first, dict) else ()


def _early_keys(text: str) -> tuple[str, ...]:
    """Keys of a first object that was not read to its end: all strings followed by a colon."""
    decoder, keys, place = json.JSONDecoder(), [], text.find('"')
    while place >= 0:
        try:
            key, end = decoder.raw_decode(text, place)
        except ValueError:
            break
        if text[end:].lstrip().startswith(":"):
            keys.append(str(key))
        place = text.find('"', end)
    return tuple(keys)
