"""The lock of a run folder. It names its owner, who shows every few seconds that it lives. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import threading
import time
from io import FileIO
from pathlib import Path

from epmoe import env
from epmoe.data.files import open_regular, write_atomically
from epmoe.errors import ConfigError

NAME = ".lock"
BEAT_S = 15.0
"""The owner touches the file this often."""
MAX_BYTES = 4096
SILENT_S = 300.0
"""An owner on another machine that has not touched it for so long is gone; network disks tell times a minute late."""


def take(lock: Path) -> None:
    """Makes the file, or takes it over from an owner that is gone.

    Raises:
        ConfigError: A live process owns it.
    """
    for _ in range(5):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise _no_file(lock, error) from None
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            # Looking and writing are one step: of many that find it stale, the first takes it and the others see that.
            _exclusively(file)
            if not _is_still(lock, file):
                continue
            _require_gone(lock, file.read(MAX_BYTES).decode(errors="replace"))
            file.seek(0)
            file.truncate()
            file.write(identity().encode())
            return
    raise ConfigError(f"{lock} keeps changing hands", why="several runs start in this folder at once")


def _exclusively(file: FileIO) -> None:
    """Waits for others that look at this moment; a disk without such locks has to do without."""
    for _ in range(100):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return None
    return None


def _is_still(lock: Path, file: FileIO) -> bool:
    """Whether the path still leads to this file: its owner may have given it back meanwhile."""
    mine = os.fstat(file.fileno())
    if not stat.S_ISREG(mine.st_mode):
        raise _no_file(lock)
    try:
        return os.path.samestat(mine, lock.lstat())
    except FileNotFoundError:
        return False


def _no_file(lock: Path, error: OSError | None = None) -> ConfigError:
    if lock.is_symlink():
        what = f"{lock} is a link to {os.readlink(lock)}"
    else:
        what = f"{lock} is no file that can be read{f': {error.strerror}' if error else ''}"
    return ConfigError(
        what,
        why="a run locks its folder with a file of that name",
        fix="move it away, or choose another out=",
    )


def keep(lock: Path) -> threading.Event:
    """Touches the file from a thread until the event that this returns is set."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(lock)

    threading.Thread(target=beat, name="epmoe lock", daemon=True).start()
    return over


def age_s(lock: Path) -> float:
    """Seconds since the owner's last sign of life, by this machine's clock; infinite without a lock."""
    try:
        return time.time() - lock.stat().st_mtime
    except OSError:
        return float("inf")


def give_back(lock: Path) -> None:
    """Removes the file if this process owns it."""
    if owner_of(lock) == identity():
        lock.unlink()


def _require_gone(lock: Path, owner: str) -> None:
    """Raises where the owner is alive."""
    if not owner or is_gone(owner, _age_on_disk_s(lock)):
        return
    host, pid, *_ = owner.split(":")
    here = host == socket.gethostname()
    given_up = f"; if that machine is gone, start again {SILENT_S / 60:g} minutes after its last sign of life"
    raise ConfigError(
        f"{lock.parent} is in use by process {pid} on {host}",
        fix=f"stop that run or choose another out={'' if here else given_up}",
    )


def owner_of(lock: Path) -> str | None:
    """What the lock says; None when there is none."""
    try:
        with open_regular(lock) as file:
            return file.read(MAX_BYTES).decode(errors="replace")
    except OSError:
        return None


def identity() -> str:
    """``host:pid:start:job`` of this process, unlike that of any other."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}:{env.batch_job()}"


def _age_on_disk_s(lock: Path) -> float:
    """As ``age_s``, by the clock of the disk: machines need not agree on the time."""
    probe = lock.with_name(f".probe-{os.getpid()}")
    try:
        write_atomically(probe, b"")
        return probe.stat().st_mtime - lock.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def is_gone(owner: str, silent_s: float = 0.0) -> bool:
    """Whether the process that wrote a lock is over: certainly if it ran here, elsewhere by its silence."""
    try:
        host, pid, started, job = owner.split(":")
        if host != socket.gethostname():
            # Out of sight, unless Slurm has requeued this very job on another node.
            return silent_s > SILENT_S or (job != "" and job == env.batch_job())
        return _started(int(pid)) != started
    except ValueError:
        return True  # not a lock of ours: damaged


def _started(pid: int) -> str | None:
    """When a process started (clock ticks since boot), so that a reused pid is not mistaken for it; None = dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    except OSError:
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]
