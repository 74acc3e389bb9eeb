"""What the files of a source held when they were last read, so that an unchanged corpus is not read at every start."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from epmoe.data.files import write_atomically
from epmoe.data.forms import Form

Cut = tuple[int, int, str, int]
"""Start and end in bytes, sha256, and number of the first line of some whole documents of a file."""
Stamp = tuple[int, int, int]
"""Size and times of modification and change: copying tools set the one, and not the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFile:
    """A file as it was read."""

    stamp: Stamp
    form: Form
    kind: str = ""
    """How it was cut; empty = not at all yet."""
    cuts: tuple[Cut, ...] = ()


class KnownFiles:
    """Forms and cuts of files by path, trusted while size and times are what they were when the file was read.

    Args:
        path: Where they are kept; None = nowhere.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._old: dict[str, KnownFile] = {}
        self._new: dict[str, KnownFile] = {}
        # Without it, or with a damaged one, everything is read. json, because a name may be no UTF-8.
        with suppress(OSError, ValueError, RecursionError, ValidationError):
            known = {} if path is None else json.loads(path.read_bytes())
            self._old = TypeAdapter(dict[str, KnownFile]).validate_python(known)

    def form(self, file: Path, read: Callable[[Path], Form]) -> Form:
        """The form of a file, from ``read`` unless it is known."""
        stat = file.stat()  # before reading, so that a change meanwhile is noticed next time
        stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        known = self._new.get(str(file)) or self._old.get(str(file))
        if known is None or known.stamp != stamp:
            known = KnownFile(stamp=stamp, form=read(file))
        self._new[str(file)] = known
        return known.form

    def cuts(self, file: Path, kind: str, read: Callable[[Path], tuple[Cut, ...]]) -> tuple[Cut, ...]:
        """The cuts of a file whose form was asked for, from ``read`` unless they are known."""
        known = self._new[str(file)]
        if known.kind != kind:
            self._new[str(file)] = known = replace(known, kind=kind, cuts=read(file))
        return known.cuts

    def save(self) -> None:
        """Keeps what was asked for; a disk that takes no files only costs time."""
        if self._path is None or self._new == self._old:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            known = {path: asdict(file) for path, file in self._new.items()}
            write_atomically(self._path, json.dumps(known).encode())
