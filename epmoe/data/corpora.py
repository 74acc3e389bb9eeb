"""Bodies of text: which files they have, which documents are in them, and who is validation.

A corpus is a sorted list of pieces. A piece is a byte range of one file that holds whole documents: a text file is
one piece and one document, a ``.jsonl`` file is cut into pieces of whole lines. Files of a folder with a NUL byte in
their first 8 KB are images, archives and the like, and are skipped. Pieces are hashed when the corpus is
scanned and checked again when they are read, so the prepared data is that of the fingerprint.

What becomes validation does not depend on order, machine or preparation options:

    files            sha256 of the path relative to the folder (POSIX, UTF-8), as an integer, is 0 modulo 20
    JSONL documents  the same of the text
    with val_path    everything there is validation, everything in ``path`` is training
    a single file    its last twentieth, from the beginning of a line where there is one nearby
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from epmoe.config import SourceConfig
from epmoe.data.files import BLOCK_BYTES, Report, StopFlag, never_stop, silent, stop_if
from epmoe.data.known import Cut, KnownFiles
from epmoe.errors import DataError

VALIDATION_MODULUS = 20
STDLIB_SKIPPED = frozenset(
    ("test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "__pycache__")
)
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 20, 16 << 20
PIECES_PER_FILE = 256
PROBE_BYTES = 8192
"""Text has no NUL byte among so many first ones."""

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
    """None: the sha256 of each JSONL document's text decides; of a single text file the end is validation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A scanned source: its pieces in order, and how to read them."""

    name: str
    kind: Kind
    pieces: tuple[Piece, ...]
    text_field: str
    loss_field: str | None
    skipped: int = 0
    """Files that are no text."""

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


def scan(
    source: SourceConfig,
    progress: Report = silent,
    should_stop: StopFlag = never_stop,
    known: KnownFiles | None = None,
) -> Corpus:
    """Lists and hashes a source of text -> Corpus, sorted, the same on every machine.

    Reads every byte once, except of files that are ``known``. Raises DataError for missing paths, unreadable files
    and folders without text: leaving a file out silently would make the corpus depend on who prepares it.
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
    known = known or KnownFiles()
    pieces: list[Piece] = []
    done = skipped = 0

    def read(file: Path) -> tuple[Cut, ...]:
        nonlocal done
        cuts = []
        for cut in _line_cuts(file) if kind == "jsonl" else _text_cuts(file):
            stop_if(should_stop)
            cuts.append(cut)
            done += cut[1] - cut[0]
            progress(f"reading {source.name}", done, 0)
        return tuple(cuts)

    for path, split in places:
        files, before = _list_files(source, kind, path), len(pieces)
        for name, file in files:
            try:
                cuts = known.cuts(file, read)
            except OSError as error:
                raise _unreadable(file, error) from None
            skipped += kind == "files" and not cuts
            own_split = split or (None if kind == "jsonl" else _split_of(name, path))
            pieces += [_piece(cut, name, file, own_split) for cut in cuts]
        if kind == "files" and len(pieces) == before:
            raise _no_text(source, path, len(files))
    return Corpus(
        name=source.name,
        kind=kind,
        pieces=tuple(pieces),
        text_field=source.text_field,
        loss_field=source.loss_field,
        skipped=skipped,
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
        parts: dict[Split, str] = {piece.split: text} if piece.split else _held_out(text)
        for split, part in parts.items():
            yield Document(text=part, split=split, loss_ranges=None, replaced=replaced)
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


def _no_text(source: SourceConfig, path: str, num_files: int) -> DataError:
    return DataError(
        f"source {source.name}: none of the {num_files} file(s) in {path} is text",
        why=f"each has a NUL byte among its first {PROBE_BYTES} bytes, as images, archives and UTF-16 have",
        fix="correct data.sources[].path or glob, or convert the files to UTF-8",
    )


def _piece(cut: Cut, name: str, file: Path, split: Split | None) -> Piece:
    start, end, sha256, first_line = cut
    return Piece(
        path=str(file), name=name, start=start, end=end, sha256=sha256, first_line=first_line, split=split
    )


# --------------------------------------------------------------------------------------------- files
def _text_cuts(path: Path) -> Iterator[Cut]:
    """The whole file, or nothing when it is no text."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            if size == 0 and b"\0" in block[:PROBE_BYTES]:
                return
            digest.update(block)
            size += len(block)
    yield 0, size, digest.hexdigest(), 1


def _held_out(text: str) -> dict[Split, str]:
    """The two splits of a text that is all there is; one of less than twenty characters is training."""
    held = len(text) // VALIDATION_MODULUS
    if held == 0:
        return {"train": text}
    start = len(text) - held
    start = text.rfind("\n", start - held, start) + 1 or start
    return {"train": text[:start], "val": text[start:]}


def _split_of(name: str, path: str) -> Split | None:
    """Of a file without ``val_path``: its name decides, unless it is all there is."""
    if Path(path).expanduser().is_file():
        return None
    return "val" if is_validation(name.encode("utf-8", "surrogateescape")) else "train"


def _list_files(source: SourceConfig, kind: Kind, path: str) -> list[tuple[str, Path]]:
    """Name inside the source, and place."""
    if _is_stdlib(source):
        return _stdlib_files(Path(sysconfig.get_path("stdlib")))
    root = Path(path).expanduser().absolute()
    if root.is_file() or kind == "jsonl":
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
def _line_cuts(path: Path) -> Iterator[Cut]:
    """Cuts of whole lines, 1 to 16 MiB each."""
    start, first_line = 0, 1
    hint = min(max(path.stat().st_size // PIECES_PER_FILE, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    with path.open("rb") as file:
        while lines := file.readlines(hint):
            data = b"".join(lines)
            yield start, start + len(data), hashlib.sha256(data).hexdigest(), first_line
            start, first_line = start + len(data), first_line + len(lines)


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
