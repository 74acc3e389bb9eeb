"""Speed and memory: tokens and floating-point operations per second, and the largest memory use."""

from __future__ import annotations

import resource
import time

import torch

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16 peak of GPUs by a part of their name, from the makers' data sheets; the first that fits."""


def peak_of(name: str) -> float | None:
    """Peak of a GPU in FLOP/s by the name torch gives it, None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device in FLOP/s, None where it is not known (CPUs among them)."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def memory_gib(device: torch.device) -> float:
    """Largest memory this process has used on its device so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Clock:
    """Time since the last lap; evaluation and checkpoints are left out by pausing it."""

    def __init__(self) -> None:
        self._spent, self._since = 0.0, time.monotonic()

    def pause(self) -> None:
        """Stops counting."""
        self._spent += time.monotonic() - self._since

    def go_on(self) -> None:
        """Counts again."""
        self._since = time.monotonic()

    def lap(self) -> float:
        """Counted seconds since the last lap; starts the next one."""
        self.pause()
        spent, self._spent = self._spent, 0.0
        self.go_on()
        return spent
