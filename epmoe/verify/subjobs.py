"""Jobs of several sizes out of the same processes, and processes on one machine where there is no launcher."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from epmoe import env
from epmoe.errors import ConfigError
from epmoe.parallel.deepspeed import load_deepspeed
from epmoe.process import runtime
from epmoe.process.runtime import Runtime

GRACE_S = 5.0
"""How long the other ranks may go on after one has failed."""


@dataclass(slots=True, kw_only=True)
class Ranks:
    """All processes at hand, with no process group: ``world`` makes those."""

    rank: int
    world_size: int
    backend: str
    device: str
    timeout_s: float
    store: Store
    worlds_made: int = 0


def assemble(device: str, timeout_s: float, *, same: str) -> Ranks:
    """All ranks of the job. A collective; the process group in place, if there is one, is taken down.

    Args:
        device: As for ``runtime.start``.
        timeout_s: Limit of every collective.
        same: What all ranks must have been given alike, as JSON.

    Raises:
        ConfigError: The ranks were given different configurations; the keys are named.
    """
    place = runtime.start(device, timeout_s)
    try:
        runtime.require_equal("configuration", same)
        store = _get_default_store()
    finally:
        runtime.stop(place)
    if dist.is_initialized():
        dist.destroy_process_group()
    return Ranks(
        rank=place.rank,
        world_size=place.world_size,
        backend="gloo" if place.device.type == "cpu" else place.backend,
        device=device,
        timeout_s=timeout_s,
        store=store,
    )


@contextmanager
def world(ranks: Ranks, size: int) -> Iterator[Runtime]:
    """Every ``size`` consecutive ranks are a job of their own inside the block; all of these do the same. Collective.

    So the code under test needs to know nothing of it: its default process group is the small job.
    """
    ranks.worlds_made += 1
    name = f"epmoe/verify/{ranks.worlds_made}/{ranks.rank // size}"
    dist.init_process_group(
        ranks.backend,
        store=PrefixStore(name, ranks.store),
        rank=ranks.rank % size,
        world_size=size,
        timeout=timedelta(seconds=ranks.timeout_s),
    )
    place = runtime.start(ranks.device, ranks.timeout_s)
    try:
        with runtime.watching(place, step=0, phase=f"verify with {size} rank(s)"):
            yield place
    finally:
        runtime.stop(place)
        dist.destroy_process_group()


def why_no_deepspeed(ranks: Ranks) -> str | None:
    """Why engine deepspeed cannot run on one of the ranks; None: it can on all. A collective."""
    with world(ranks, ranks.world_size) as place:
        reason = ""
        try:
            load_deepspeed(place.device.type)
        except ConfigError as error:
            reason = error.why or error.what
        return next(filter(None, runtime.gather_text(reason)), None)


# ------------------------------------------------------------------------------------------- without a launcher
def run_here(num_ranks: int, work: Callable[[], int], timeout_s: float) -> int:
    """``work`` on so many forked CPU ranks of this machine -> the first exit code that is not 0, or 0.

    A rank that dies takes the others with it after a few seconds.
    """
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="epmoe-verify-") as folder:
        rendezvous = Path(folder) / "rendezvous"
        processes = [
            context.Process(target=_rank, args=(rank, num_ranks, rendezvous, work, timeout_s), daemon=True)
            for rank in range(num_ranks)
        ]
        try:
            for process in processes:
                process.start()
            deadline = float("inf")
            while alive := [process for process in processes if process.is_alive()]:
                wait([process.sentinel for process in alive], timeout=0.5)
                if any(process.exitcode for process in processes):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                if time.monotonic() > deadline:
                    break
            failed = [process.exitcode for process in processes if process.exitcode]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return 0 if not failed else failed[0] if failed[0] > 0 else 1


def _rank(rank: int, num_ranks: int, rendezvous: Path, work: Callable[[], int], timeout_s: float) -> None:
    torch.set_num_threads(1)  # first of all: the parent's thread pool does not exist here
    env.take_place(rank, num_ranks)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(rendezvous), num_ranks),  # type: ignore[attr-defined]
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    sys.exit(work())
