"""What the benchmarks share: where they ran, interleaved timing, poisoned memory, tables and result files."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from epmoe import env
from epmoe.ops import kernel_status
from epmoe.train.run_folder import hardware, software_versions

RESULTS = Path(__file__).parent / "results"
PEERS = ("deepspeed", "transformers", "sonic-moe", "scattermoe", "transformer-engine")
"""Distributions whose versions belong to a result."""
CHANGED = ("--porcelain", "--untracked-files=no", "--", ":/", ":!results")
"""Words of ``git status``: what is not committed, but for the results of other benchmarks."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ------------------------------------------------------------------------------------------ command line
def arguments_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: as torch decides")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, seconds: only shows that it runs")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON file; the picture lies beside it, as .svg"
    )
    return parser


def start(arguments: argparse.Namespace) -> torch.device:
    """Seeds, sets the threads, chooses the device, and keeps freed memory as a training process does."""
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        env.keep_freed_memory()
    return torch.device(name)


def progress() -> Progress:
    """A bar on stderr, so that the tables on stdout can be piped; how long it took, how long it will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("done,"),
        TimeRemainingColumn(),
        TextColumn("to go"),
        console=Console(stderr=True),
    )


# ------------------------------------------------------------------------------------------------ timing
@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median and quartiles of samples."""

    median: float
    low: float
    high: float

    def text(self, factor: float = 1.0, digits: int = 2) -> str:
        """``median (low to high)``, multiplied by ``factor``."""
        median, low, high = (f"{value * factor:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} ({low} to {high})"


def spread(samples: Sequence[float]) -> Spread:
    """Median and quartiles; of a single sample, that sample."""
    if len(samples) == 1:
        return Spread(median=samples[0], low=samples[0], high=samples[0])
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median=statistics.median(samples), low=low, high=high)


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the ratios of samples that were taken one after the other."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def interleave(
    samplers: Mapping[str, Callable[[], float]], rounds: int, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """One sample of each in turn, ``rounds`` times: whatever else the machine does falls on all of them."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            samples[name].append(sample())
        tick()
    return samples


def sampler(
    function: Callable[[], object], device: torch.device, *, seconds: float = 0.01
) -> Callable[[], float]:
    """Something that measures seconds per call, repeating the call often enough to last about ``seconds``.

    On CUDA it is the device time of the replay of a graph of these calls; a function that waits for the device cannot
    be captured and is timed with events around plain calls.
    """
    for _ in range(2):
        function()
    if device.type == "cuda":
        return _cuda_sampler(function, seconds)
    begin = time.perf_counter()
    function()
    repeats = max(1, min(1000, round(seconds / max(time.perf_counter() - begin, 1e-7))))

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - begin) / repeats

    return sample


def _cuda_sampler(function: Callable[[], object], seconds: float) -> Callable[[], float]:
    def between_events(work: Callable[[], object], calls: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / calls

    once = between_events(function, 1)
    repeats = max(1, min(100, round(seconds / max(once, 1e-6))))

    def calls() -> None:
        for _ in range(repeats):
            function()

    if _waits_for_device(function):
        return lambda: between_events(calls, repeats)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return lambda: between_events(graph.replay, repeats)


def _waits_for_device(function: Callable[[], object]) -> bool:
    """Whether a call copies something to the host. Asked before a capture is begun: one that fails halfway leaves the
    stream and the random numbers of the process unusable."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


# ------------------------------------------------------------------------------------------- correctness
@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that an operator asks for comes filled with NaN (integers: their largest value), so that what it does not
    write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # torch fills new memory in this mode, unless torch.utils.deterministic.fill_uninitialized_memory is turned off.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude; inf where anything is not finite."""
    difference = (actual.double() - expected.double()).abs().max() if actual.numel() else torch.zeros(())
    scale = expected.double().abs().max().clamp(min=1e-30) if expected.numel() else torch.ones(())
    value = float(difference / scale)
    return value if value == value else float("inf")


# --------------------------------------------------------------------------------------------- reporting
def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def where(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and command: what a result is worth nothing without."""
    versions = software_versions()
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device.type,
        "threads_per_rank": torch.get_num_threads(),
        "kernels": ": ".join(kernel_status()),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "hardware": {key: value for key, value in hardware().items() if key != "host"},
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len((_git("status", *CHANGED) or "").splitlines()),
        "large_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "freed_memory_kept": device.type == "cpu" and env.keep_freed_memory(),  # asked again, for the answer
        "command": sys.argv,
    }


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine(device: torch.device) -> str:
    """A short name for file names: ``cpu-2cores``, ``nvidia-h100-80gb-hbm3``."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"cpu-{len(os.sched_getaffinity(0))}cores"


def write_results(
    name: str,
    result: Mapping[str, Any],
    picture: str,
    *,
    device: torch.device,
    arguments: argparse.Namespace,
) -> None:
    """Writes ``results/<name>-<machine>.json`` and ``.svg``, or where ``--out`` says; a quick run only there."""
    path = arguments.out
    if path is None and arguments.quick:
        return
    path = path or RESULTS / f"{name}-{machine(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, default=plain) + "\n", encoding="utf-8")
    path.with_suffix(".svg").write_text(picture, encoding="utf-8")
    print(f"written: {path.name}, {path.with_suffix('.svg').name} in {path.parent.name}/", file=sys.stderr)


def plain(value: Any) -> Any:
    """What JSON cannot hold by itself: a spread as a mapping, a dtype by its name."""
    if isinstance(value, Spread):
        return asdict(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise TypeError(f"no JSON form of {type(value).__name__}")
