"""Bodies of text: which files they have, which documents are in them, and who is validation.

A corpus is a sorted list of pieces. A piece is a byte range of one file that holds whole documents: a text file is
one piece and one document, a ``.jsonl`` file is cut into pieces of whole lines. Pieces are hashed when the corpus is
scanned and checked again when they are read, so the prepared data is that of the fingerprint.

What becomes validation does not depend on order, machine or preparation options:

    files            sha256 of the path relative to the folder (POSIX, UTF-8), as an integer, is 0 modulo 20
    JSONL documents  the same of the text
    with val_path    everything there is validation, everything in ``path`` is training
    a single file    training
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

from epmoe.config import SourceConfig
from epmoe.data.files import BLOCK_BYTES, Report, StopFlag, never_stop, silent, stop_if
from epmoe.errors import DataError

VALIDATION_MODULUS = 20
STDLIB_SKIPPED = frozenset(
    ("test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "__pycache__")
)
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 20, 16 << 20
PIECES_PER_FILE = 256

Kind = Literal["files", "jsonl", "indexed"]
KIND_OF_FORMAT: Mapping[str, Kind] = MappingProxyType(
    {"stdlib": "files", "text": "files", "jsonl": "jsonl", "indexed": "indexed"}
)
Split = Literal["train", "val"]
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Whole documents in bytes ``[start, end)`` of one file."""

    path: str
    name: str
    """Path relative to the source, POSIX."""
    start: int
    end: int
    sha256: str
    first_line: int
    """Line number of the first byte, from 1."""
    split: Split | None
    """None: the sha256 of each document's text decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A scanned source: its pieces in order, and how to read them."""

    name: str
    kind: Kind
    pieces: tuple[Piece, ...]
    text_field: str
    loss_field: str | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.end - piece.start for piece in self.pieces)

    @property
    def fingerprint(self) -> str:
        """sha256 of content, order and reading options; paths outside the corpus do not matter."""
        parts = [[p.name, p.start, p.end, p.sha256, p.split] for p in self.pieces]
        described = [self.name, self.kind, self.text_field, self.loss_field, parts]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text and the character ranges of it that count in the loss (None = all)."""

    text: str
    split: Split
    loss_ranges: Ranges | None
    replaced: bool
    """True: it had bytes or surrogates that are no text; they became U+FFFD."""


def is_validation(key: bytes) -> bool:
    """The split rule: sha256 of the key, as a big-endian integer, is 0 modulo 20."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big") % VALIDATION_MODULUS == 0


def kind_of(source: SourceConfig) -> Kind:
    """How a source is read; DataError when ``auto`` cannot tell."""
    if source.format != "auto":
        return KIND_OF_FORMAT[source.format]
    if _is_stdlib(source):
        return "files"
    path = Path(source.path).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        return "jsonl"
    if all(Path(f"{path}{suffix}").is_file() for suffix in (".bin", ".idx")):
        return "indexed"
    if path.is_dir() or path.is_file():
        return "files"
    raise DataError(
        f"source {source.name}: {source.path!r} is no folder, no file, and {path}.bin with {path}.idx do not exist",
        fix="correct data.sources[].path (relative paths start in the working folder)",
    )


def scan(source: SourceConfig, progress: Report = silent, should_stop: StopFlag = never_stop) -> Corpus:
    """Lists and hashes a source of text -> Corpus, sorted, the same on every machine.

    Reads every byte once. Raises DataError for missing paths, unreadable files and folders without files:
    leaving a file out silently would make the corpus depend on who prepares it.
    """
    kind = kind_of(source)
    if _is_stdlib(source) and source.val_path is not None:
        raise DataError(
            f"source {source.name}: val_path does not go with the standard library",
            fix="leave val_path out; every twentieth file is validation",
        )
    places: list[tuple[str, Split | None]] = [(source.path, None if source.val_path is None else "train")]
    if source.val_path is not None:
        places.append((source.val_path, "val"))
    pieces: list[Piece] = []
    done = 0
    for path, split in places:
        found = _jsonl_pieces(path, split) if kind == "jsonl" else _file_pieces(source, path, split)
        for piece in found:
            stop_if(should_stop)
            pieces.append(piece)
            done += piece.end - piece.start
            progress(f"reading {source.name}", done, 0)
    return Corpus(
        name=source.name,
        kind=kind,
        pieces=tuple(pieces),
        text_field=source.text_field,
        loss_field=source.loss_field,
    )


def read_piece(corpus: Corpus, piece: Piece) -> Iterator[Document]:
    """The documents of a piece, in order; DataError when the file changed since the scan or a line is malformed."""
    try:
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            data = file.read(piece.end - piece.start)
    except OSError as error:
        raise _unreadable(piece.path, error) from None
    if hashlib.sha256(data).hexdigest() != piece.sha256:
        raise DataError(
            f"{piece.path} changed while it was being prepared (bytes {piece.start} to {piece.end})",
            fix="run the command again",
        )
    if corpus.kind == "files":
        text, replaced = _decode(data)
        yield Document(text=text, split=piece.split or "train", loss_ranges=None, replaced=replaced)
        return
    for offset, line in enumerate(data.split(b"\n")):
        if line.strip():
            yield _jsonl_document(corpus, piece, line, f"{piece.path}:{piece.first_line + offset}")


def _is_stdlib(source: SourceConfig) -> bool:
    return source.format == "stdlib" or (source.format == "auto" and source.path == "stdlib")


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read", why=str(error), fix="correct the path or its permissions, or narrow glob"
    )


# --------------------------------------------------------------------------------------------- files
def _file_pieces(source: SourceConfig, path: str, split: Split | None) -> Iterator[Piece]:
    for name, file_path in _list_files(source, path):
        digest, size = hashlib.sha256(), 0
        try:
            with file_path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
        except OSError as error:
            raise _unreadable(file_path, error) from None
        own_split: Split = "val" if is_validation(name.encode("utf-8", "surrogateescape")) else "train"
        yield Piece(
            path=str(file_path),
            name=name,
            start=0,
            end=size,
            sha256=digest.hexdigest(),
            first_line=1,
            split=split or ("train" if Path(path).expanduser().is_file() else own_split),
        )


def _list_files(source: SourceConfig, path: str) -> list[tuple[str, Path]]:
    if _is_stdlib(source):
        return _stdlib_files(Path(sysconfig.get_path("stdlib")))
    root = Path(path).expanduser().absolute()
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise DataError(f"source {source.name}: {root} does not exist", fix="correct data.sources[].path")
    try:
        found = [file for file in root.glob(source.glob) if file.is_file()]
        named = sorted((file.relative_to(root).as_posix(), file) for file in found)
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"source {source.name}: glob {source.glob!r} does not work", why=str(error)) from None
    # Hidden files and folders are tools' (.git, .DS_Store), not text.
    named = [(name, file) for name, file in named if not any(p.startswith(".") for p in name.split("/"))]
    if not named:
        raise DataError(
            f"source {source.name}: 0 files in {root} match {source.glob!r}",
            fix="correct data.sources[].path or glob",
        )
    return named


def _stdlib_files(root: Path) -> list[tuple[str, Path]]:
    """The library's own sources. ``_sysconfigdata*`` and ``config-*`` describe one build, so they stay out."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [d for d in folders if d not in STDLIB_SKIPPED and not d.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                files.append((path.relative_to(root).as_posix(), path))
    return sorted(files)


def _decode(data: bytes) -> tuple[str, bool]:
    """UTF-8 -> (text, whether bytes had to be replaced)."""
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace"), True


# --------------------------------------------------------------------------------------------- JSONL
def _jsonl_pieces(source_path: str, split: Split | None) -> Iterator[Piece]:
    path, start, first_line = Path(source_path).expanduser(), 0, 1
    try:
        size = path.stat().st_size
        hint = min(max(size // PIECES_PER_FILE, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
        with path.open("rb") as file:
            while lines := file.readlines(hint):
                data = b"".join(lines)
                yield Piece(
                    path=str(path.absolute()),
                    name=PurePosixPath(path.name).as_posix(),
                    start=start,
                    end=start + len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    first_line=first_line,
                    split=split,
                )
                start, first_line = start + len(data), first_line + len(lines)
    except OSError as error:
        raise _unreadable(path, error) from None


def _jsonl_document(corpus: Corpus, piece: Piece, line: bytes, where: str) -> Document:
    decoded, replaced = _decode(line)
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON", why=str(error), fix="correct or remove the line"
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get(corpus.text_field), str):
        keys = sorted(record)[:10] if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f"{where}: no text under the key {corpus.text_field!r}",
            why=f"the line holds {keys}",
            fix="set data.sources[].text_field, or correct the line",
        )
    text = record[corpus.text_field]
    # JSON may spell half a surrogate pair, which no encoding can write. One for one, so ranges still fit.
    clean = re.sub("[\ud800-\udfff]", "\ufffd", text)
    split = piece.split or ("val" if is_validation(clean.encode()) else "train")
    ranges = None
    if corpus.loss_field is not None and record.get(corpus.loss_field) is not None:
        ranges = _loss_ranges(record[corpus.loss_field], len(text), corpus.loss_field, where)
    return Document(text=clean, split=split, loss_ranges=ranges, replaced=replaced or clean != text)


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
