"""Where records go: metrics.jsonl and TensorBoard. A tracker that fails is switched off; the run goes on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from epmoe.data.files import write_atomically
from epmoe.errors import warn
from epmoe.metrics.step_record import StepRecord, read_records, record_from_json, record_to_json


class Tracker(Protocol):
    """Somewhere a record can go."""

    def log(self, record: StepRecord) -> None:
        """Takes one record; steps ascend, and the last step may come again with its validation."""
        ...

    def close(self) -> None:
        """Writes what is left and lets go of files and screens."""
        ...


class JsonlTracker:
    """Appends one JSON line per record and flushes it, so that a crash loses at most the line it is in."""

    def __init__(self, path: Path, start_step: int) -> None:
        """Opens the file; lines of steps after ``start_step``, and torn ones, are dropped first.

        Args:
            path: The metrics.jsonl.
            start_step: The step the run continues from, 0 for a new run.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_later_lines(path, start_step)
        self._path = path
        self._last_step = max((record.step for record in read_records(path)), default=0)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, record: StepRecord) -> None:
        """Writes one line; a second record of the last step (with its validation) replaces the first."""
        if record.step == self._last_step:
            self._file.close()
            _drop_later_lines(self._path, record.step - 1)
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._last_step = record.step
        self._file.write(record_to_json(record) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _drop_later_lines(path: Path, start_step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= start_step]
    if len(kept) < len(lines) or path.is_symlink():  # nothing is ever appended to a link's target
        write_atomically(path, "".join(kept).encode())


def _step_of(line: str) -> float:
    try:
        return record_from_json(line).step
    except ValueError:
        return float("inf")


class TensorBoardTracker:
    """Scalars for TensorBoard; on resume, later steps of an earlier attempt are hidden."""

    def __init__(self, folder: Path, start_step: int) -> None:
        """Opens an event file; ``start_step`` is the step the run continues from, 0 for a new run."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)
        self._last_step = start_step

    def log(self, record: StepRecord) -> None:
        """Writes every number of the record under ``train/``, ``speed/``, ``val/`` and ``layer_N/``; of a second
        record of the same step only the validation, which is what is new in it."""
        for name, value in scalars(record).items():
            if record.step > self._last_step or name.startswith("val/"):
                self._writer.add_scalar(name, value, record.step)
        self._last_step = record.step

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def scalars(record: StepRecord) -> dict[str, float]:
    """The numbers of a record by the names trackers show them under."""
    values: dict[str, float] = {
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/clip": record.clip,
        "train/skipped_steps": record.skipped_steps,
        "train/empty_steps": record.empty_steps,
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/flops_per_second": record.flops_per_second,
        "speed/memory_gib": record.memory_gib,
    }
    if record.loss_tokens == 0:
        del values["train/loss"]
    if record.loss_scale is not None:
        values["train/loss_scale"] = record.loss_scale
        values["train/overflowed_steps"] = record.overflowed_steps
    if record.mfu is not None:
        values["speed/mfu"] = record.mfu
    values |= {f"loss/{name}": value for name, value in record.source_loss.items() if math.isfinite(value)}
    values |= {f"aux/{name}": value for name, value in record.aux.items()}
    values |= {f"val/{name}": value for name, value in record.val.items()}
    for number, layer in record.layers.items():
        values |= {
            f"layer_{number}/drop_rate": layer.drop_rate,
            f"layer_{number}/overflow_rate": layer.overflow_rate,
            f"layer_{number}/max_over_mean": layer.max_over_mean,
            f"layer_{number}/load_cv": layer.load_cv,
            f"layer_{number}/entropy": layer.entropy,
            f"layer_{number}/dead_experts": len(layer.dead_experts),
            f"layer_{number}/nonfinite_tokens": layer.nonfinite_tokens,
        }
    return values


class Trackers:
    """Hands every record to all trackers; one that raises is named once on stderr and left out from then on."""

    def __init__(self, make: Sequence[Callable[[], Tracker]]) -> None:
        """Opens the trackers; one that cannot be opened is left out with the same warning."""
        self._trackers: list[Tracker] = []
        for build in make:
            try:
                self._trackers.append(build())
            except Exception as error:
                _warn(
                    f"a tracker could not start ({type(error).__name__}: {error}); the run goes on without it"
                )

    def log(self, record: StepRecord) -> None:
        """Hands one record to every tracker that still works."""
        for tracker in tuple(self._trackers):
            try:
                tracker.log(record)
            except Exception as error:
                self._trackers.remove(tracker)
                name, why = type(tracker).__name__, f"{type(error).__name__}: {error}"
                _warn(f"{name} failed at step {record.step} ({why}); the run goes on without it")
                with contextlib.suppress(Exception):
                    tracker.close()

    def close(self) -> None:
        """Closes every tracker, whatever the others do."""
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                _warn(f"{type(tracker).__name__} could not be closed ({type(error).__name__}: {error})")
        self._trackers.clear()


def _warn(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be gone too
        warn(text)
