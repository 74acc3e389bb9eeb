"""Small file helpers: atomic writes, checksums, JSON that may be damaged."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    """Writes a file so that it is either the old one or the complete new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
    """CRC-32 of a whole file, about 2 GB/s."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
            stop_if(should_stop)
    return crc


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
