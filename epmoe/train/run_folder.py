"""The folder of a run: who owns it, what was run, how it ended, and how often the same step failed.

    .lock            host:pid:start of the process that owns the folder (rank 0's); gone after a clean end
    run.json         resolved configuration, command, versions, hardware
    run_status.json  state and exit code, because torchrun turns every exit code into 1
    attempts.json    unfinished attempts per step they started from

Only rank 0 touches the files (when it is gone, another rank writes how the run ended); what may fail is a collective,
so that all ranks go on or all raise.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

import epmoe
from epmoe import env
from epmoe.data.files import write_json
from epmoe.errors import ConfigError, NoProgress
from epmoe.parallel.runtime import gather_text, on_rank_zero

STATUS = "run_status.json"
MAX_ATTEMPTS = 3
"""Attempts from one step that may fail before the run is called stuck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """An output folder this job owns."""

    path: Path
    is_writer: bool
    """True on rank 0."""


def open_run_folder(path: Path) -> RunFolder:
    """Makes the folder if needed and takes its lock. A collective.

    Raises:
        ConfigError: It cannot be written, or a live process owns it.
    """
    run = RunFolder(path=path, is_writer=not dist.is_initialized() or dist.get_rank() == 0)
    on_rank_zero(lambda: _take(path), ConfigError)
    owners = gather_text(_read(path / ".lock") or "nothing")
    strangers = [rank for rank, owner in enumerate(owners) if owner != owners[0]]
    if strangers:
        raise ConfigError(
            f"out={path} is not the same folder on every rank: rank(s) {strangers} do not see rank 0's lock",
            why="all ranks write into one checkpoint",
            fix="put out= on a disk that all nodes share",
        )
    return run


def close_run_folder(run: RunFolder) -> None:
    """Gives the lock back."""
    lock = run.path / ".lock"
    if run.is_writer and _read(lock) == _own_identity():
        lock.unlink()


def _take(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"out={path} cannot be written",
            why=f"{error.strerror}: {error.filename}",
            fix="choose another out=",
        ) from None
    _lock(path / ".lock")


# ------------------------------------------------------------------------------------------- lock
def _lock(lock: Path) -> None:
    for _ in range(5):
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _reclaim(lock)
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(_own_identity())
        return
    raise ConfigError(f"{lock} keeps changing hands", why="several runs start in this folder at once")


def _reclaim(lock: Path) -> None:
    """Removes a lock whose owner is gone; raises when it is alive."""
    owner = _read(lock)
    if owner == "":  # made a moment ago, or its maker died between making and writing it
        time.sleep(0.2)
        owner = _read(lock)
    if owner is None:
        return
    if owner and not _is_gone(owner):
        host, pid, *_ = owner.split(":")
        raise ConfigError(
            f"{lock.parent} is in use by process {pid} on {host}",
            fix=f"stop that run or choose another out=; if it is certainly over, delete {lock}",
        )
    # Renaming first: of two processes that both found the lock stale, only one gets it.
    stale = lock.with_name(f".lock-stale-{os.getpid()}")
    try:
        os.rename(lock, stale)
    except FileNotFoundError:
        return
    if _read(stale) != owner and not lock.exists():  # somebody's fresh lock was caught: give it back
        os.rename(stale, lock)
        return
    stale.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _own_identity() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}:{env.batch_job()}"


def _is_gone(owner: str) -> bool:
    """Whether the process that wrote a lock is certainly over."""
    try:
        host, pid, started, job = owner.split(":")
        if host != socket.gethostname():
            # Out of sight, unless Slurm has requeued this very job on another node.
            return job != "" and job == env.batch_job()
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


# ------------------------------------------------------------------------------------------- records
def describe_run(run: RunFolder, config: Mapping[str, Any], argv: Sequence[str]) -> None:
    """Writes run.json; credentials in URLs and arguments are replaced."""
    if not run.is_writer:
        return
    description = {
        "config": env.masked(dict(config)),
        "argv": env.masked(list(argv)),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "versions": software_versions(),
        "hardware": hardware(),
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "environment": env.recorded(),
    }
    write_json(run.path / "run.json", description)


def write_status(
    run: RunFolder,
    state: str,
    *,
    exit_code: int | None = None,
    step: int | None = None,
    message: str = "",
    in_place_of_rank_zero: bool = False,
) -> None:
    """Writes run_status.json, on rank 0.

    Args:
        state: ``running`` | ``done`` | ``stopped`` (asked to) | ``failed``.
        exit_code: Of the process; None while it runs.
        step: Optimizer steps done.
        in_place_of_rank_zero: Another rank, which rank 0 did not answer, may write what rank 0 has not.

    A full disk is only warned about: it must not hide the error that is being recorded.
    """
    path = run.path / STATUS
    if not run.is_writer and not (in_place_of_rank_zero and read_status(run.path).get("state") == "running"):
        return
    status = {"state": state, "exit_code": exit_code, "step": step, "message": env.redact(message)}
    try:
        write_json(path, status)
    except OSError as error:
        print(f"warning: {path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def read_status(folder: Path) -> dict[str, Any]:
    """run_status.json; empty when there is none that can be read."""
    try:
        status = json.loads((folder / STATUS).read_bytes())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def software_versions() -> dict[str, str]:
    """Versions that matter for results."""
    return {
        "epmoe": epmoe.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda or "none",
    }


def hardware() -> dict[str, Any]:
    """The machine this rank runs on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
    }


def _commit() -> str | None:
    """The git commit of the source this runs from, if it is a checkout."""
    source = Path(__file__).parent
    command = ["git", "-C", str(source), "log", "-1", "--format=%H", "--", str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# ------------------------------------------------------------------------------------------- restart budget
def begin_attempt(run: RunFolder, step: int, config: Mapping[str, Any]) -> int:
    """Counts an attempt that starts from ``step`` -> how many there were, this one included. A collective.

    An attempt that ends cleanly calls ``end_attempt``; one that is killed does not get to, which is the point.
    Another configuration starts a new count.

    Raises:
        NoProgress: The run has already started ``MAX_ATTEMPTS`` times from this step and never got beyond it.
    """
    count = 0

    def note() -> None:
        nonlocal count
        path = run.path / "attempts.json"
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        count = _earlier_attempts(path, step, digest) + 1
        if count > MAX_ATTEMPTS:
            raise NoProgress(
                f"{MAX_ATTEMPTS} attempts from step {step} failed before the next checkpoint",
                why="the same failure would most likely come again",
                fix=f"read run_status.json and the logs, mend the cause, then delete {path} to try again",
            )
        write_json(path, {"config": digest, "steps": {str(step): count}})

    on_rank_zero(note, ConfigError)
    return int(gather_text(str(count))[0])


def end_attempt(run: RunFolder) -> None:
    """Forgets the attempts: the run is done, or was asked to stop."""
    if run.is_writer:
        (run.path / "attempts.json").unlink(missing_ok=True)


def _earlier_attempts(path: Path, step: int, digest: str) -> int:
    try:
        stored = json.loads(path.read_bytes())
        return int(stored["steps"].get(str(step), 0)) if stored["config"] == digest else 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0
