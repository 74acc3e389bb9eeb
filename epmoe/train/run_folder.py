"""The folder of a run as its ranks use it: who owns it, what was run, how it ended, how often the same step failed.

    .lock            host:pid:start of the process that owns the folder (rank 0's); gone after a clean end
    run.json         resolved configuration, command, versions, hardware
    run_status.json  state and first cause, because torchrun turns every exit code into 1 (``epmoe.train.status``)
    attempts.json    unfinished attempts per step they started from (the same)

Only rank 0 touches the files (when it is gone, another rank writes how the run ended); what may fail is a collective,
so that all ranks go on or all raise.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from epmoe import env
from epmoe.data.files import write_atomically, write_json
from epmoe.errors import CommError, ConfigError
from epmoe.metrics.machine import hardware, software_versions
from epmoe.process.runtime import Runtime, gather_text, on_rank_zero
from epmoe.train import lock
from epmoe.train.status import (
    Status,
    count_attempt,
    failed,
    forget_attempts,
    note_run,
    read_status,
    write_status,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """An output folder this job owns."""

    path: Path
    attempt: str
    """Name of this attempt, the same on all ranks."""
    is_writer: bool
    """True on rank 0."""
    closed: threading.Event
    """Ends the signs of life."""


def open_run_folder(path: Path) -> RunFolder:
    """Makes the folder if needed and takes its lock. A collective.

    Raises:
        ConfigError: It cannot be written, or a live process owns it.
    """
    on_rank_zero(lambda: _take(path), ConfigError)
    owners = gather_text(lock.owner_of(path / lock.NAME) or "nothing")
    strangers = [rank for rank, owner in enumerate(owners) if owner != owners[0]]
    if strangers:
        raise ConfigError(
            f"out={path} is not the same folder on every rank: rank(s) {strangers} do not see rank 0's lock",
            why="all ranks write into one checkpoint",
            fix="put out= on a disk that all nodes share",
        )
    note_run(path, owners[0])
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    closed = lock.keep(path / lock.NAME) if is_writer else threading.Event()
    return RunFolder(path=path, attempt=owners[0], is_writer=is_writer, closed=closed)


def close_run_folder(run: RunFolder) -> None:
    """Gives the lock back."""
    run.closed.set()
    if run.is_writer:
        lock.give_back(run.path / lock.NAME)


def _take(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"out={path} cannot be written",
            why=f"{error.strerror}: {error.filename}",
            fix="choose another out=",
        ) from None
    lock.take(path / lock.NAME)


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


def _commit() -> str | None:
    """The git commit of the source this runs from, if it is a checkout."""
    source = Path(__file__).parent
    command = ["git", "-C", str(source), "log", "-1", "--format=%H", "--", str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# ------------------------------------------------------------------------------------------- beginning and end
def begin_attempt(run: RunFolder, step: int, config: Mapping[str, Any]) -> int:
    """Counts an attempt that starts from ``step`` -> how many there were, this one included. A collective.

    Raises:
        NoProgress: There is no attempt left.
    """
    count = 0

    def note() -> None:
        nonlocal count
        count = count_attempt(run.path, step, config)

    on_rank_zero(note, ConfigError)
    return int(gather_text(str(count))[0])


def record_state(
    run: RunFolder,
    state: str,
    *,
    exit_code: int | None = None,
    step: int | None = None,
    saved: int | None = None,
    message: str = "",
) -> None:
    """Writes run_status.json of a run that goes on, or ended as it should; then its attempts are forgotten."""
    if not run.is_writer:
        return
    if exit_code is not None:
        forget_attempts(run.path)
    status = Status(
        state=state, attempt=run.attempt, exit_code=exit_code, step=step, saved=saved, message=message
    )
    write_status(run.path, status)


def record_failure(run: RunFolder, error: BaseException, *, step: int | None, place: Runtime) -> None:
    """Writes the first cause into run_status.json: rank 0 does, or where it is lost the lowest rank that is left."""
    lost = isinstance(error, CommError) and place.responder.leads
    before = read_status(run.path)
    if run.is_writer or (lost and before is not None and before.state == "running"):
        status = failed(error, step=step, rank=place.rank, attempt=run.attempt, folder=run.path)
        write_status(run.path, status)
