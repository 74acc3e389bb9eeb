"""Runs a function on several forked ranks joined by gloo.

``run_ranks(world_size, fn, tmp_path, *args)`` calls ``fn(rank, *args)`` on every rank, inside an initialised process
group, and returns the ranks' results. ``rank_outcomes`` is the same for tests that kill or break ranks on purpose: it
reports how each rank ended instead of raising.

Forking takes 0.06 s where starting fresh interpreters takes 4 s. Its price: a child must set one thread before it
does anything else (the parent's thread pool does not exist in the child, which would wait for it for ever), and the
parent must not have a process group of its own.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import safetensors.torch  # noqa: F401 - see below
import torch
import torch._dynamo  # imported by the first optimizer; once here instead of 2 s in every child
import torch.distributed as dist

from tests.patience import HANGS_S

GRACE_S = 30.0
"""How long the other ranks may go on after one has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one rank ended."""

    rank: int
    result: Any = None
    error: str | None = None
    """The traceback, if the function raised."""
    exit_code: int | None = None
    """0; 1 after an exception; minus the signal for a killed rank (-9: SIGKILL, also for ranks this helper killed)."""
    ended_after_s: float = 0.0
    """Seconds from the start of all ranks to this rank's answer, or to its death."""


class RanksFailed(AssertionError):
    """At least one rank did not return; the message holds the traceback of the first one that failed."""


def run_ranks(
    world_size: int, fn: Callable[..., Any], tmp_path: Path, *args: Any, timeout: float = HANGS_S
) -> list[Any]:
    """``fn(rank, *args)`` on every rank -> the results in rank order.

    Results travel by pickle, so tensors come back as copies. Raises ``RanksFailed`` with the first failing rank's
    traceback when a rank raises, dies, or is not done after ``timeout`` seconds.
    """
    outcomes = rank_outcomes(world_size, fn, tmp_path, *args, timeout=timeout)
    failed = sorted(
        (o for o in outcomes if o.exit_code != 0), key=lambda o: (o.error is None, o.ended_after_s)
    )
    if failed:
        first = failed[0]
        others = ", ".join(f"rank {o.rank}: exit {o.exit_code}" for o in failed[1:])
        raise RanksFailed(
            f"rank {first.rank} of {world_size} failed (exit {first.exit_code}"
            f"{'; then ' + others if others else ''})\n{first.error or 'it died or hung without a traceback'}"
        )
    return [outcome.result for outcome in outcomes]


def rank_outcomes(
    world_size: int,
    fn: Callable[..., Any],
    tmp_path: Path,
    *args: Any,
    timeout: float = HANGS_S,
    join_group: bool = True,
    grace: float = GRACE_S,
) -> list[Outcome]:
    """Like ``run_ranks``, but never raises for a rank's fate: killed, stopped and failing ranks are reported.

    Args:
        timeout: Seconds until every rank that is left is killed; also the time-out of collectives.
        join_group: False = the function starts its own process group (launcher variables are not set either).
        grace: Seconds the others get after the first rank has failed.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has a process group; forked ranks would inherit its sockets")
    rendezvous = tmp_path / f"rendezvous-{uuid.uuid4().hex}" if join_group else None
    context = multiprocessing.get_context("fork")
    started = time.monotonic()
    processes: list[ForkProcess] = []
    receivers: list[Connection] = []
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            target_args = (rank, world_size, fn, args, rendezvous, timeout, sender)
            process = context.Process(target=_child, args=target_args, daemon=True)
            process.start()
            sender.close()  # the child's death must close the pipe
            processes.append(process)
            receivers.append(receiver)
        return _collect(processes, receivers, started, timeout, grace)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for receiver in receivers:
            receiver.close()


def _child(
    rank: int,
    world_size: int,
    fn: Callable[..., Any],
    args: Sequence[Any],
    rendezvous: Path | None,
    timeout: float,
    sender: Connection,
) -> None:
    torch.set_num_threads(1)  # before anything else
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive a killed pytest
    faulthandler.dump_traceback_later(max(timeout - 1.0, 0.5), exit=False, file=sys.__stderr__)
    # A container may not be able to resolve its own name; all ranks are here anyway.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        if rendezvous is not None:
            _join(rank, world_size, rendezvous, timeout)
        sender.send_bytes(pickle.dumps((fn(rank, *args), None)))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        sender.send_bytes(pickle.dumps((None, traceback.format_exc())))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # closes the sockets at once, so that peers see a lost rank and not a slow one


def _join(rank: int, world_size: int, rendezvous: Path, timeout: float) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    store = dist.FileStore(str(rendezvous), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )


def _collect(
    processes: Sequence[ForkProcess],
    receivers: Sequence[Connection],
    started: float,
    timeout: float,
    grace: float,
) -> list[Outcome]:
    answers: dict[int, tuple[Any, str | None]] = {}
    ended: dict[int, float] = {}
    waiting: dict[Connection, int] = {receiver: rank for rank, receiver in enumerate(receivers)}
    deadline = started + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for ready in wait(list(waiting), timeout=min(left, 0.1)):
            rank = waiting.pop(ready)  # type: ignore[arg-type]
            ended[rank] = time.monotonic() - started
            try:
                answers[rank] = pickle.loads(receivers[rank].recv_bytes())  # noqa: S301 - our own child
                failed = answers[rank][1] is not None
            except EOFError:
                failed = True  # it died without a word
            if failed:
                deadline = min(deadline, time.monotonic() + grace)
        if answers and all(_is_stopped(processes[rank]) for rank in waiting.values()):
            break
    outcomes = []
    for rank, process in enumerate(processes):
        if rank in ended:
            process.join(max(0.0, deadline - time.monotonic()) + 1.0)
        if process.is_alive():
            process.kill()
        process.join()
        result, error = answers.get(rank, (None, None))
        after = ended.get(rank, time.monotonic() - started)
        outcomes.append(
            Outcome(rank=rank, result=result, error=error, exit_code=process.exitcode, ended_after_s=after)
        )
    return outcomes


def _is_stopped(process: ForkProcess) -> bool:
    """Whether a rank was sent SIGSTOP; it would keep the others waiting for ever."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
