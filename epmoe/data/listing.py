"""The files of a source: those its ``glob`` matches, in order, and what was left out on the way.

Nothing is left out without a word. A folder that cannot be listed, or a link that leads nowhere, is an error: half a
corpus looks like a whole one. Hidden names are tools' (``.git``, ``.DS_Store``) and match only a pattern that begins
with a dot itself; ``**`` does not enter linked folders, which may hold the same text twice or lead in circles; and
folders that epmoe wrote (runs, prepared data, tokenizers) are no text. All three are counted.
"""

from __future__ import annotations

import fnmatch
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from epmoe.errors import DataError

STDLIB_SKIPPED = frozenset(
    ("test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "__pycache__")
)
OWN_RECORDS = {
    "run_status.json": "state",
    "prepared.json": "tokenizer_sha256",
    "epmoe_tokenizer.json": "eos_token",
}
"""Files by which a folder of our own is known, each with a key that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Files of a source, sorted by name."""

    files: tuple[tuple[str, Path], ...]
    """Name inside the source (POSIX), and place."""
    left_out: tuple[str, ...] = ()
    """What was passed by, in words with numbers."""


def list_stdlib() -> Listing:
    """The running Python's library. ``_sysconfigdata*`` and ``config-*`` describe one build, and stay out."""
    root, files = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [d for d in folders if d not in STDLIB_SKIPPED and not d.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                files.append((path.relative_to(root).as_posix(), path))
    return Listing(files=tuple(sorted(files)))


def list_files(source: str, path: str, glob: str) -> Listing:
    """Files below ``path`` that match, or ``path`` itself when it is a file.

    Args:
        source: Its name, for messages.
        path: Folder or file.
        glob: Pattern relative to the folder; ``**`` stands for any folders, none included.

    Raises:
        DataError: Nothing is there or matches, a folder cannot be listed, a link leads nowhere.
    """
    root = Path(path).expanduser().absolute()
    try:
        return _list(source, root, glob)
    except FileNotFoundError:
        raise DataError(
            f"source {source}: {root} does not exist", fix="correct data.sources[].path"
        ) from None
    except OSError as error:
        raise unreadable(error.filename or root, error) from None


def _list(source: str, root: Path, glob: str) -> Listing:
    if not stat.S_ISDIR(root.stat().st_mode):
        return Listing(files=((root.name, root),))
    if is_own_folder(root):
        raise DataError(
            f"source {source}: {root} holds what epmoe wrote (a run, prepared data or a tokenizer), which is no text",
            fix="give the folder of the text; prepared data is named by the prefix of its .bin and .idx files",
        )
    walk = _Walk(root)
    files = dict(walk.find(root, _pattern(source, glob)))
    if not files:
        raise DataError(
            f"source {source}: 0 files in {root} match {glob!r}",
            why=f"left out: {', '.join(walk.left_out)}" if walk.left_out else None,
            fix="correct data.sources[].path or glob",
        )
    return Listing(files=tuple(sorted(files.items())), left_out=walk.left_out)


def unreadable(path: str | Path, error: OSError) -> DataError:
    """The error for a file or folder that the system does not hand out."""
    return DataError(
        f"{path} cannot be read",
        why=error.strerror or str(error),
        fix="correct the path or its permissions, or narrow data.sources[].glob so that it is not asked for",
    )


def is_own_folder(folder: Path) -> bool:
    """Whether epmoe wrote this folder: a run, prepared data, or a tokenizer."""
    return any(_has_key(folder / name, key) for name, key in OWN_RECORDS.items())


def _has_key(path: Path, key: str) -> bool:
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and key in record


def _raise(error: OSError) -> None:
    raise unreadable(error.filename, error)


def _pattern(source: str, glob: str) -> list[str]:
    segments = [part for part in glob.split("/") if part not in ("", ".")]
    if not segments or glob.startswith("/") or ".." in segments:
        raise DataError(
            f"source {source}: glob {glob!r} does not work",
            why="it must name something inside the folder",
            fix="a pattern such as **/*.txt",
        )
    return [*segments, "*"] if segments[-1] == "**" else segments


class _Walk:
    """Goes through the folders that a pattern leads to."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._counts: Counter[str] = Counter()
        self._seen: set[str] = set()

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(f"{number} {what}" for what, number in sorted(self._counts.items()))

    def find(self, folder: Path, pattern: list[str]) -> Iterator[tuple[str, Path]]:
        """Name and place of every file; one that two ways lead to comes twice."""
        head, rest = pattern[0], pattern[1:]
        deep = head == "**"
        if deep:
            yield from self.find(folder, rest)
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            if not deep and not fnmatch.fnmatchcase(entry.name, head):
                continue
            if entry.name.startswith(".") and not head.startswith("."):
                self._leave("hidden name(s)", entry)
            elif deep:
                yield from self._enter_deep(entry, pattern)
            elif rest:
                yield from self._enter(entry, rest)
            elif _is_file(entry):
                place = Path(entry.path)
                yield place.relative_to(self._root).as_posix(), place
            elif not entry.is_dir():
                self._leave("pipe(s), socket(s) or device(s)", entry)

    def _enter_deep(self, entry: os.DirEntry[str], pattern: list[str]) -> Iterator[tuple[str, Path]]:
        if entry.is_symlink() and entry.is_dir():
            self._leave("linked folder(s), which ** does not enter", entry)
        else:
            yield from self._enter(entry, pattern)

    def _enter(self, entry: os.DirEntry[str], pattern: list[str]) -> Iterator[tuple[str, Path]]:
        if not entry.is_dir():
            return
        folder = Path(entry.path)
        if is_own_folder(folder):
            self._leave("folder(s) that epmoe wrote", entry)
        else:
            yield from self.find(folder, pattern)

    def _leave(self, what: str, entry: os.DirEntry[str]) -> None:
        if entry.path not in self._seen:
            self._seen.add(entry.path)
            self._counts[what] += 1


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a regular file; a link that leads nowhere is text that is missing."""
    if entry.is_symlink() and not Path(entry.path).exists():
        raise DataError(
            f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there",
            fix="bring the file back, take the link away, or narrow data.sources[].glob",
        )
    return entry.is_file()
