"""How a run ended, and how many attempts it has left. Imports no torch: launchers and people read it too.

    run_status.json  of the latest attempt: where it stands, or the first cause of its end
    attempts.json    unfinished attempts per step they started from

An attempt is one start of all ranks. Its name is what rank 0 wrote into the lock of the run folder, so that nobody
takes the end of an earlier attempt for that of this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from epmoe import env
from epmoe.checkpoint.manifest import CHECKPOINTS
from epmoe.data.files import write_json
from epmoe.errors import EpmoeError, NoProgress, warn
from epmoe.train import lock

STATUS, ATTEMPTS = "run_status.json", "attempts.json"
METRICS = "metrics.jsonl"
MAX_ATTEMPTS = 3
"""Attempts from one step that may fail before the run is called stuck."""


class Status(BaseModel):
    """run_status.json."""

    model_config = ConfigDict(frozen=True, strict=True)

    state: str
    """``running`` | ``done`` | ``stopped`` (asked to) | ``failed``."""
    attempt: str = ""
    """``host:pid:start:job`` of rank 0."""
    written: str = ""
    """Local time with its zone."""
    exit_code: int | None = None
    """Of the first cause, see ``epmoe.errors``; None while the run goes on."""
    step: int | None = None
    """Optimizer steps done; None before the first is known."""
    saved: int | None = None
    """Step of the newest checkpoint that this run is known to have; None before the first."""
    rank: int | None = None
    """Where the first cause was; None when no rank in particular failed."""
    message: str = ""
    """The first cause in words."""
    earlier: Status | None = None
    """How the attempt before this one ended, where this one was refused for lack of progress."""


def read_status(folder: Path) -> Status | None:
    """None when there is no status that can be read."""
    try:
        return Status.model_validate_json((folder / STATUS).read_bytes())
    except (OSError, ValueError):
        return None


def newest_saved(folder: Path) -> int | None:
    """Step of the newest checkpoint that the run in this folder is known to have had."""
    status = read_status(folder)
    return status.saved if status else None


def write_status(folder: Path, status: Status) -> None:
    """Replaces the status, secrets masked; the newest checkpoint stays known. A full disk is only warned about: it must
    not hide what is recorded."""
    saved = status.saved if status.saved is not None else newest_saved(folder)
    written = status.model_copy(update={"written": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "saved": saved})
    try:
        write_json(folder / STATUS, env.masked(written.model_dump()))
    except OSError as error:
        warn(f"{folder / STATUS} cannot be written: {error.strerror}")


# ------------------------------------------------------------------------------------------- restart budget
def count_attempt(folder: Path, step: int, config: Mapping[str, Any]) -> int:
    """Counts an attempt that starts from ``step`` -> how many there were, this one included.

    An attempt that ends cleanly calls ``forget_attempts``; one that is killed does not get to, which is the point.
    Another configuration starts a new count.

    Raises:
        NoProgress: The run has already started ``MAX_ATTEMPTS`` times from this step and never got beyond it.
    """
    count = attempts_from(folder, step, config) + 1
    if count > MAX_ATTEMPTS:
        raise no_progress(folder, step)
    write_json(folder / ATTEMPTS, {"config": _digest(config), "steps": {str(step): count}})
    return count


def attempts_from(folder: Path, step: int, config: Mapping[str, Any]) -> int:
    """Attempts that started from ``step`` with this configuration and did not end cleanly."""
    try:
        stored = json.loads((folder / ATTEMPTS).read_bytes())
        return int(stored["steps"].get(str(step), 0)) if stored["config"] == _digest(config) else 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def refuse_if_stuck(folder: Path, config: Mapping[str, Any]) -> None:
    """Ends a start that has no attempt left before torch is loaded and the ranks look for each other. All of them find
    the same in the folder, since rank 0 counts an attempt only after they have met.

    Raises:
        NoProgress: There is no attempt left; rank 0 has written it down.
    """
    found = (folder / CHECKPOINTS).glob("step_*")
    step = max((int(path.name[5:]) for path in found if path.name[5:].isdecimal()), default=0)
    owner = lock.owner_of(folder / lock.NAME)
    if attempts_from(folder, step, config) < MAX_ATTEMPTS or not (owner is None or lock.is_gone(owner)):
        return
    error = no_progress(folder, step)
    if env.rank() == 0:
        write_status(folder, failed(error, step=step, rank=0, attempt=lock.identity(), folder=folder))
    raise error


def record_failed_start(folder: Path, error: BaseException) -> None:
    """Writes down an end that came before the run had its folder: ranks that did not meet, a machine without GPUs.

    Only rank 0 does, where the folder is there already, nobody else uses it, and the end is not recorded yet.
    """
    status, owner = read_status(folder), lock.owner_of(folder / lock.NAME)
    free = owner is None or lock.is_gone(owner)
    if env.rank() == 0 and folder.is_dir() and free and (status is None or status.attempt != lock.identity()):
        write_status(folder, failed(error, step=None, rank=0, attempt=lock.identity(), folder=folder))


def forget_attempts(folder: Path) -> None:
    """The run is done, or was asked to stop."""
    (folder / ATTEMPTS).unlink(missing_ok=True)


def no_progress(folder: Path, step: int) -> NoProgress:
    """The error of a run that has no attempt left; it tells how the last one ended."""
    last = first_end(folder)
    told = f"; the last one: exit code {last.exit_code}, {last.message.partition(chr(10))[0]}" if last else ""
    return NoProgress(
        f"{MAX_ATTEMPTS} attempts from step {step} failed before the next checkpoint",
        why=f"the same failure would most likely come again{told}",
        fix=f"read {folder / STATUS} and the logs, mend the cause, then delete {folder / ATTEMPTS} to try again",
    )


def first_end(folder: Path) -> Status | None:
    """The end of the last attempt that really tried: refusals for lack of progress are looked through."""
    status = read_status(folder)
    if status is None or status.exit_code is None:
        return None
    if status.exit_code != NoProgress.exit_code:
        return status
    return status.earlier


def failed(error: BaseException, *, step: int | None, rank: int, attempt: str, folder: Path) -> Status:
    """The status of an attempt that ends with an error raised on ``rank``.

    Args:
        error: An ``EpmoeError`` knows its exit code and, when it began on another rank, which; others have code 1.
        folder: Of the run; a lack of progress keeps the end that is recorded there.
    """
    known = error if isinstance(error, EpmoeError) else None
    return Status(
        state="failed",
        attempt=attempt,
        exit_code=known.exit_code if known else 1,
        step=step,
        rank=known.rank if known and known.rank is not None else rank,
        message=f"{type(error).__name__}: {error}",
        earlier=first_end(folder) if isinstance(error, NoProgress) else None,
    )


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


# ------------------------------------------------------------------------------------------- for the launcher above
RUN_NOTE = "run.json"


def note_run(folder: Path, attempt: str) -> None:
    """Tells ``epmoe launch``, if it started this process, which attempt of which run it takes part in."""
    if notes := env.launch_notes():
        write_json(Path(notes) / RUN_NOTE, {"out": str(folder.resolve()), "attempt": attempt})


def note_exit(code: int) -> None:
    """Tells ``epmoe launch``, which started this process, how it ends."""
    (Path(env.launch_notes()) / f"{os.getpid()}.exit").write_text(str(code))


def noted_exit(notes: Path) -> int | None:
    """The exit code of the attempt that left the notes: what its run folder says, else what its processes on this node
    say; None when all of them were killed before they could."""
    try:
        run = json.loads((notes / RUN_NOTE).read_bytes())
        status = read_status(Path(run["out"]))
        if status is not None and status.attempt == run["attempt"] and status.exit_code is not None:
            return status.exit_code
    except OSError:
        pass  # they ended before they had a run folder
    codes = {int(file.read_text() or 1) for file in notes.glob("*.exit")}
    return min(codes - {0}, default=0 if codes else None)
