"""How far a long preparation is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from epmoe.data.files import Report

LINE_EVERY_S = 3.0


@contextmanager
def console_progress(label: str = "prepare") -> Iterator[Report]:
    """Reports on standard error, which leaves standard output to results."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield plain_progress(label)
        return
    columns = (
        TextColumn(f"{label}: {{task.description}}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=None)
            bars.update(tasks[phase], completed=done, total=total or None)

        yield report


def plain_progress(label: str, *, unit: str = "MB", every_s: float = LINE_EVERY_S) -> Report:
    """Lines for log files: at most one per interval, and one at the end of a phase.

    Args:
        label: What is going on.
        unit: Of the numbers that are reported: ``MB`` (they are bytes), or the name of what is counted.
        every_s: Seconds between lines.
    """
    last = time.monotonic()

    def report(phase: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        finished = total > 0 and done >= total
        if (now - last < every_s and not finished) or sys.stderr is None:
            return
        last = now
        whole = f" of {_amount(total, unit)}" if total else ""
        print(f"{label}: {phase} {_amount(done, unit)}{whole} {unit}", file=sys.stderr, flush=True)

    return report


def _amount(count: int, unit: str) -> str:
    return f"{count / 1e6:.1f}" if unit == "MB" else f"{count:,}"
