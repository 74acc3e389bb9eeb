"""Small file helpers: atomic writes, checksums, JSON that may be damaged."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from epmoe.errors import DataError, Preempted

BLOCK_BYTES = 1 << 20
"""Bytes read at a time."""

StopFlag = Callable[[], bool]
"""Polled between pieces of work; true = stop now."""


Report = Callable[[str, int, int], None]
"""Progress: called with a phase, the bytes done and the bytes there are, 0 = not known yet."""


def silent(phase: str, done: int, total: int) -> None:
    """Reports nothing."""


def never_stop() -> bool:
    """The stop flag of callers that cannot be interrupted."""
    return False


def stop_if(should_stop: StopFlag) -> None:
    """Raises Preempted when the stop flag is up. What is finished stays on disk."""
    if should_stop():
        raise Preempted(
            "data preparation was asked to stop",
            fix="run the same command again; it continues from the finished shards",
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it is either the old one or the complete new one, also after a power cut.

    A link of that name is replaced, its target left alone. What could not be written in full is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of an earlier process with this number
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading. A pipe or a device would be waited for, perhaps for ever.

    Raises:
        OSError: It cannot be opened, or is something else.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(0, "it is not a regular file", str(path))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, readable by people, in a fixed order of keys."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads a JSON file; DataError when it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read", why=str(error)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON", why=str(error)) from None


def crc32_of(path: Path, should_stop: StopFlag = never_stop) -> int:
    """CRC-32 of the bytes that a regular file holds when it is opened, about 2 GB/s."""
    crc = 0
    with open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size
        while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
            crc = zlib.crc32(block, crc)
            left -= len(block)
            stop_if(should_stop)
    return crc


def forget_cached(path: Path) -> None:
    """Asks the kernel to let go of a file that is on the disk, so that the next read shows what the disk has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
