"""Bodies of text: which files they have, which documents are in them, and who is validation.

A corpus is a sorted list of pieces. A piece is a byte range of one file that holds whole documents: a text file is
one piece and one document, a file of JSON lines is cut into pieces of whole lines. Pieces are hashed when the corpus is
scanned and checked again when they are read (``passages``), so the prepared data is that of the fingerprint. A byte
order mark at the beginning belongs to no document.

What a source holds is decided from the files themselves (``forms``): JSON lines are read as records, other files as
text. Where that would be a guess, such as records beside prose, JSON of one value, or text beside compressed files,
``format`` has to say it. Files of a folder with a NUL byte in their first 8 KB are images and the like, and are
skipped and counted.

What becomes validation does not depend on order, machine or preparation options:

    files            sha256 of the path relative to the folder (POSIX, UTF-8), as an integer, is 0 modulo 20;
                     of files with the same content, the first one's name decides for all
    JSONL documents  the same of the text
    with val_path    everything there is validation, everything in ``path`` is training
    a single file    its last twentieth, from the beginning of a line where there is one nearby
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from epmoe.config import DataConfig, SourceConfig
from epmoe.data.files import BLOCK_BYTES, Report, StopFlag, never_stop, silent, stop_if
from epmoe.data.forms import BYTE_ORDER_MARK, Form, form_of
from epmoe.data.known import Cut, KnownFiles
from epmoe.data.listing import Listing, list_files, list_stdlib, unreadable
from epmoe.errors import DataError

VALIDATION_MODULUS = 20
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 20, 16 << 20
PIECES_PER_FILE = 256

Kind = Literal["files", "jsonl"]
KIND_NAMES: Mapping[Kind, str] = MappingProxyType({"files": "text", "jsonl": "JSON lines"})
Split = Literal["train", "val"]


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
    val_named: bool = False
    """Validation is what ``val_path`` names, not what a rule says."""
    left_out: tuple[str, ...] = ()
    """What of the source is not read, in words with numbers."""

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

    @property
    def sentence(self) -> str:
        """What is read, for people: files, format, size, and what is not."""
        files = len({piece.path for piece in self.pieces})
        left_out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{files:,} file(s) of {KIND_NAMES[self.kind]}, {human_bytes(self.num_bytes)}{left_out}"


def is_validation(key: bytes) -> bool:
    """The split rule: sha256 of the key, as a big-endian integer, is 0 modulo 20."""
    return is_held_out(hashlib.sha256(key).digest())


def is_held_out(sha256: bytes) -> bool:
    """The same of the digest."""
    return int.from_bytes(sha256, "big") % VALIDATION_MODULUS == 0


def human_bytes(count: int) -> str:
    """``1.7 MB``."""
    size, units = float(count), iter(("bytes", "kB", "MB", "GB"))
    unit = next(units)
    while size >= 1000 and unit != "GB":
        size, unit = size / 1000, next(units)
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def is_indexed(source: SourceConfig) -> bool:
    """Whether a source holds tokens; DataError when its path leads nowhere."""
    if source.format != "auto":
        return source.format == "indexed"
    if _is_stdlib(source):
        return False
    path = Path(source.path).expanduser()
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    try:
        if all(Path(f"{prefix}{suffix}").is_file() for suffix in (".bin", ".idx")):
            return True
        found = path.exists()
    except OSError as error:
        raise unreadable(path, error) from None
    if not found:
        raise DataError(
            f"source {source.name}: {source.path!r} is neither a folder nor a file, and "
            f"{path}.bin with {path}.idx do not exist",
            fix="correct data.sources[].path (relative paths start in the working folder)",
        )
    return False


def refuse_as_source(cfg: DataConfig, out: Path) -> None:
    """DataError when a run is about to be written into the very folder of a source; one below it is left out."""
    for source in cfg.sources:
        for path in filter(None, (source.path, source.val_path)):
            if (
                Path(path).expanduser().is_dir()
                and out.expanduser().resolve() == Path(path).expanduser().resolve()
            ):
                raise DataError(
                    f"out={out} is the folder of source {source.name}, so what the run writes would become its text",
                    fix=f"another out, such as out=runs/{source.name} or a folder inside {path}",
                )


def scan(
    source: SourceConfig,
    progress: Report = silent,
    should_stop: StopFlag = never_stop,
    known: KnownFiles | None = None,
) -> Corpus:
    """Lists and hashes a source of text -> Corpus, sorted, the same on every machine.

    Reads every byte once, except of files that are ``known``. Raises DataError for what is missing, cannot be read or
    could be meant in two ways: leaving a file out silently would make the corpus depend on who prepares it.
    """
    known = known or KnownFiles()
    if source.val_path is None:
        return _scan_place(source, source.path, None, progress, should_stop, known)
    if _is_stdlib(source):
        raise DataError(
            f"source {source.name}: val_path does not go with the standard library",
            fix="leave val_path out; every twentieth file is validation",
        )
    train = _scan_place(source, source.path, "train", progress, should_stop, known)
    val = _scan_place(source, source.val_path, "val", progress, should_stop, known)
    if train.kind != val.kind:
        raise DataError(
            f"source {source.name}: path holds {KIND_NAMES[train.kind]}, val_path {KIND_NAMES[val.kind]}",
            fix="give both in one format, or data.sources[].format=text to read both as they are",
        )
    left_out = train.left_out + tuple(f"{words} of val_path" for words in val.left_out)
    return replace(train, pieces=train.pieces + val.pieces, left_out=left_out, val_named=True)


def on_one_side(corpora: Sequence[Corpus]) -> list[Corpus]:
    """Gives text files of the same content the same split, over all sources.

    What ``val_path`` names is validation wherever else it is found; otherwise the first one decides.
    """
    sides: dict[str, Split] = {}
    for corpus in sorted(corpora, key=lambda corpus: not corpus.val_named):
        for piece in corpus.pieces:
            if piece.split == "val" and corpus.val_named:
                sides[piece.sha256] = "val"
            elif piece.split is not None and piece.end > piece.start:  # empty files say nothing
                sides.setdefault(piece.sha256, piece.split)
    return [_moved(corpus, sides) for corpus in corpora]


def also_training(corpora: Sequence[Corpus], corpus: Corpus) -> int:
    """Pieces with validation text of a corpus that are training text too, here or in another source."""
    trained = {piece.sha256 for other in corpora for piece in other.pieces if piece.split == "train"}
    held_out = ("val", None) if corpus.kind == "files" else ("val",)  # None: a file whose end is validation
    return sum(p.split in held_out and p.end > p.start and p.sha256 in trained for p in corpus.pieces)


def _is_stdlib(source: SourceConfig) -> bool:
    return source.format == "stdlib" or (source.format == "auto" and source.path == "stdlib")


def _moved(corpus: Corpus, sides: Mapping[str, Split]) -> Corpus:
    if corpus.val_named:
        return corpus
    pieces = (
        replace(p, split=sides[p.sha256]) if p.split is not None and p.sha256 in sides else p
        for p in corpus.pieces
    )
    return replace(corpus, pieces=tuple(pieces))


# --------------------------------------------------------------------------------------------- scanning
def _scan_place(
    source: SourceConfig,
    path: str,
    split: Split | None,
    progress: Report,
    should_stop: StopFlag,
    known: KnownFiles,
) -> Corpus:
    """The files of ``path`` or ``val_path`` as a corpus."""
    listing = list_stdlib() if _is_stdlib(source) else list_files(source.name, path, source.glob)
    try:
        forms = {name: known.form(file, form_of) for name, file in listing.files}
    except OSError as error:
        raise unreadable(error.filename, error) from None
    kind, names, left_out = _choose(source, path, listing, forms)
    done = 0

    def read(file: Path) -> Iterator[Cut]:
        nonlocal done
        for cut in _line_cuts(file) if kind == "jsonl" else _text_cuts(file):
            stop_if(should_stop)
            done += cut[1] - cut[0]
            progress(f"reading {source.name}", done, 0)
            yield cut

    places, pieces = dict(listing.files), []
    single = listing.files[0][1] == Path(path).expanduser().absolute()
    for name in names:
        try:
            cuts = known.cuts(places[name], kind, lambda file: tuple(read(file)))
        except OSError as error:
            raise unreadable(places[name], error) from None
        side = split or (None if single or kind == "jsonl" else _split_of(name))
        pieces += [_piece(cut, name, places[name], side) for cut in cuts]
    return Corpus(
        name=source.name,
        kind=kind,
        pieces=tuple(pieces),
        text_field=source.text_field,
        loss_field=source.loss_field,
        left_out=listing.left_out + left_out,
    )


def _choose(
    source: SourceConfig, path: str, listing: Listing, forms: Mapping[str, Form]
) -> tuple[Kind, list[str], tuple[str, ...]]:
    """How the files are read, which of them, and what is left out in words."""
    shapes = {
        shape: [name for name, form in forms.items() if form.shape == shape]
        for shape in ("text", "lines", "json", "packed", "binary")
    }
    if source.format != "text" and not _is_stdlib(source) and shapes["packed"]:
        raise _packed(source, path, shapes["packed"], forms)
    wants_lines = source.format == "jsonl" or (
        source.format == "auto" and _are_lines(source, path, listing, shapes, forms)
    )
    if wants_lines and len(forms) == 1 and shapes["text"]:
        shapes["lines"], shapes["text"] = shapes["text"], []  # the only file is what the user says it is
    if wants_lines and shapes["json"]:
        raise _one_value(source, path, shapes["json"])
    chosen = set(shapes["lines"] if wants_lines else shapes["text"] + shapes["lines"] + shapes["json"])
    if not chosen:
        raise _nothing(source, path, len(forms), wants_lines)
    rest = {
        "packed file(s)": shapes["packed"],
        "file(s) with NUL bytes, which are no text": shapes["binary"],
        "file(s) that are no JSON lines": shapes["text"] if wants_lines else [],
    }
    words = tuple(f"{len(names)} {what} ({_some(names)})" for what, names in rest.items() if names)
    return "jsonl" if wants_lines else "files", [name for name in forms if name in chosen], words


def _are_lines(
    source: SourceConfig,
    path: str,
    listing: Listing,
    shapes: Mapping[str, list[str]],
    forms: Mapping[str, Form],
) -> bool:
    """Whether ``auto`` reads JSON lines; DataError where reading text would train on the syntax of JSON."""
    as_json = shapes["lines"] + shapes["json"]
    if not as_json:
        return False
    places = dict(listing.files)
    sizes = {name: places[name].stat().st_size for name in forms}
    texts = [name for name in shapes["text"] if sizes[name]]  # an empty file says nothing
    if not texts and not shapes["json"]:
        return True
    if not texts and not shapes["lines"]:
        raise _one_value(source, path, shapes["json"])
    records = [name for name in as_json if source.text_field in forms[name].keys]
    if records or sum(sizes[name] for name in as_json) > sum(sizes[name] for name in texts):
        raise DataError(
            f"source {source.name}: {path} holds {len(as_json)} file(s) of JSON ({_some(records or as_json)}) and "
            f"{len(texts)} of text ({_some(texts)})",
            why="as text, the syntax of the JSON would be learnt; as records, the text would be left out",
            fix="set data.sources[].format to jsonl (records alone) or text (every file as it is), or narrow glob",
        )
    return False


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _packed(source: SourceConfig, path: str, names: list[str], forms: Mapping[str, Form]) -> DataError:
    kinds = ", ".join(sorted({forms[name].what for name in names}))
    others = len(forms) - len(names)
    text_alone = f"; data.sources[].format=text takes the other {others} file(s) alone" if others else ""
    return DataError(
        f"source {source.name}: {len(names)} of {len(forms)} file(s) in {path} are packed and cannot be read "
        f"({kinds}): {_some(names)}",
        why="the rest would be taken for the whole" if others else None,
        fix=f"convert them to text or JSON lines in UTF-8, or narrow data.sources[].glob{text_alone}",
    )


def _one_value(source: SourceConfig, path: str, names: list[str]) -> DataError:
    return DataError(
        f"source {source.name}: {len(names)} file(s) in {path} are JSON, but not one record per line: {_some(names)}",
        fix="write each record on a line of its own (jq -c '.[]' IN.json > OUT.jsonl), or set "
        "data.sources[].format=text to train on the JSON as it is",
    )


def _nothing(source: SourceConfig, path: str, num_files: int, wants_lines: bool) -> DataError:
    if wants_lines:
        return DataError(
            f"source {source.name}: none of the {num_files} file(s) in {path} holds JSON lines",
            fix="correct data.sources[].path, glob or format",
        )
    return DataError(
        f"source {source.name}: none of the {num_files} file(s) in {path} is text",
        why="each has a NUL byte near its beginning, as images and other data have",
        fix="correct data.sources[].path or glob, or convert the files to UTF-8",
    )


def _piece(cut: Cut, name: str, file: Path, split: Split | None) -> Piece:
    start, end, sha256, first_line = cut
    return Piece(
        path=str(file), name=name, start=start, end=end, sha256=sha256, first_line=first_line, split=split
    )


def _split_of(name: str) -> Split:
    return "val" if is_validation(name.encode("utf-8", "surrogateescape")) else "train"


def _text_cuts(path: Path) -> Iterator[Cut]:
    """The whole file behind its byte order mark."""
    with path.open("rb") as file:
        head = file.read(len(BYTE_ORDER_MARK))
        start = len(head) if head == BYTE_ORDER_MARK else 0
        file.seek(start)
        digest, size = hashlib.sha256(), start
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    yield start, size, digest.hexdigest(), 1


def _line_cuts(path: Path) -> Iterator[Cut]:
    """Cuts of whole lines, 1 to 16 MiB each, or one longer line."""
    start, first_line = 0, 1
    hint = min(max(path.stat().st_size // PIECES_PER_FILE, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    with path.open("rb") as file:
        while lines := file.readlines(hint):
            digest, end = hashlib.sha256(), start
            for line in lines:
                digest.update(line)
                end += len(line)
            yield start, end, digest.hexdigest(), first_line
            start, first_line = end, first_line + len(lines)
