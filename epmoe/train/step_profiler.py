"""Chrome traces of a few steps with torch.profiler."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from epmoe.config import profiled_steps


class StepProfiler:
    """Traces the steps ``profile.steps`` names into ``trace_rank<r>.json``; open it in Perfetto or chrome://tracing.

    Args:
        steps: ``first-last`` (counted from 1), or None for no trace.
        folder: Where the trace goes.
        rank: This rank.
    """

    def __init__(self, steps: str | None, folder: Path, rank: int) -> None:
        self._path = folder / f"trace_rank{rank}.json"
        self._first, self._last = (profiled_steps(steps) if steps else None) or (0, 0)
        self._profile: profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        """Writes a trace that the end of training cut short."""
        self._write()

    def before_step(self, step: int) -> None:
        """Starts the trace before its first step."""
        if step == self._first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def after_step(self, step: int) -> None:
        """Writes the trace after its last step."""
        if step == self._last:
            self._write()

    def _write(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path))
            self._profile = None
