"""What the files of a source held when they were last read, so that an unchanged corpus is not read at every start."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from epmoe.data.files import write_atomically

Cut = tuple[int, int, str, int]
"""Start and end in bytes, sha256, and number of the first line of some whole documents of a file."""
Stamp = tuple[int, int, int]
Known = dict[str, tuple[Stamp, tuple[Cut, ...]]]


class KnownFiles:
    """Cuts of files by path, trusted while size and times are what they were when the file was read.

    Args:
        path: Where they are kept; None = nowhere.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._old: Known = {}
        self._new: Known = {}
        with suppress(OSError, ValidationError):  # without it, or with a damaged one, everything is read
            self._old = TypeAdapter(Known).validate_json(b"{}" if path is None else path.read_bytes())

    def cuts(self, file: Path, read: Callable[[Path], tuple[Cut, ...]]) -> tuple[Cut, ...]:
        """The cuts of a file, from ``read`` unless they are known."""
        stat = file.stat()  # before reading, so that a change meanwhile is noticed next time
        # The time of change catches what copying tools hide by setting the time of modification.
        stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        known = self._old.get(str(file))
        self._new[str(file)] = known if known is not None and known[0] == stamp else (stamp, read(file))
        return self._new[str(file)][1]

    def save(self) -> None:
        """Keeps the cuts of the files that were asked for; a disk that takes no files only costs time."""
        if self._path is None or self._new == self._old:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, TypeAdapter(Known).dump_json(self._new))
