"""Process start-up, agreement between ranks, and the guard around everything that communicates.

Text travels between ranks as UTF-8 in tensors; torch's object collectives would unpickle what peers send.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from epmoe import env, errors
from epmoe.errors import CommError, ConfigError, EpmoeError, Preempted
from epmoe.process.lost_peers import Cause, Responder, comm_error, exit_code_of, is_comm_failure
from epmoe.process.rendezvous import join

MAX_KEYS = 10
"""Keys that are named when configurations differ."""
SAME_COMMAND = "start every node with the same file and the same overrides"
MIN_PATIENCE_S = 2.0
"""Nobody is named for a shorter wait, however short the time-out: every rank says where it is four times in it."""
PATIENCE_S = 5.0
"""How long a rank that is asked to stop waits for rank 0 to leave what it is busy with."""


class Agreed(Exception):
    """Base of what all ranks raise at the same point because they agreed on it: nobody will be missed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """This process's place in the job."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    """``gloo``, or ``cpu:gloo,cuda:nccl``: tensors on the CPU always have a backend."""
    timeout_s: float
    """A collective that takes longer ends the job."""
    world_group: dist.ProcessGroup
    owns_group: bool
    """False when the process group was there before ``start``; ``stop`` then leaves it."""
    responder: Responder
    """Answers when a peer that lost contact asks who is still there."""


def start(device: str, timeout_s: float) -> Runtime:
    """Joins the job a launcher describes, or makes one of a single rank when there is no launcher.

    A process group that is already initialised is adopted. Sets the number of threads of this process
    and, on a CPU, lets it keep the memory that it frees.

    Args:
        device: ``cpu`` | ``cuda`` | ``auto``.
        timeout_s: Limit for start-up and for every collective, in seconds.

    Raises:
        ConfigError: Launcher variables are missing, or there is no GPU for this rank.
        CommError: The ranks did not find each other: port in use, unknown master, missing peers.
    """
    place = pick_device(device)
    if not env.threads_chosen():
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // env.local_world_size()))
    if place.type == "cpu":
        env.keep_freed_memory()
    adopted = dist.is_initialized()
    if adopted and "gloo" not in dist.get_backend_config():
        raise ConfigError(
            f"the process group in place has the backends {dist.get_backend_config()}",
            why="small agreements between ranks travel as CPU tensors",
            fix='init_process_group("cpu:gloo,cuda:nccl")',
        )
    if not adopted:
        join("gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl", timeout_s)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = _get_default_store()
    responder = Responder(
        rank=rank, world_size=world_size, store=store, patience_s=max(MIN_PATIENCE_S, timeout_s / 10)
    )
    responder.start()
    return Runtime(
        rank=rank,
        world_size=world_size,
        local_rank=env.local_rank(),
        device=place,
        backend=dist.get_backend_config(),
        timeout_s=timeout_s,
        world_group=_world(),
        owns_group=not adopted,
        responder=responder,
    )


QUIET_S = 0.3
"""What the threads of the process group get to let go of the last tensors. One that does so while the interpreter ends
takes the process with it: SIGABRT, on a busy machine in one of five exits right after the end of a group."""


def stop(runtime: Runtime) -> None:
    """Leaves the process group, if ``start`` made it."""
    runtime.responder.stop()
    if runtime.owns_group and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(QUIET_S)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        raise AssertionError("the process group is not initialised")
    return group


def pick_device(device: str) -> torch.device:
    """``cpu`` | ``cuda`` | ``auto`` (the GPU of this local rank when there is one) -> device.

    Raises:
        ConfigError: There is no GPU for this rank.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "train.device=cuda, but torch sees no GPU",
            why=f"torch {torch.__version__} was built {'for' if torch.version.cuda else 'without'} CUDA",
            fix="train.device=cpu, or install a CUDA build of torch and check `nvidia-smi`",
        )
    count = torch.cuda.device_count()
    if env.local_rank() >= count:
        raise ConfigError(
            f"local rank {env.local_rank()} has no GPU: this node shows {count}",
            fix=f"torchrun --nproc-per-node {count}, or more CUDA_VISIBLE_DEVICES",
        )
    place = torch.device("cuda", env.local_rank())
    torch.cuda.set_device(place)
    return place


# ------------------------------------------------------------------------------------------- agreement
def gather_text(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """One text per rank, in rank order, on every rank. A collective; a single process gets its own back."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [text]
    device = "cpu" if "gloo" in dist.get_backend_config(group) else "cuda"
    world_size = dist.get_world_size(group)
    raw = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8).to(device)
    lengths = raw.new_empty(world_size, 1, dtype=torch.int64)
    dist.all_gather(list(lengths), torch.tensor([raw.numel()], device=device), group=group)
    sizes = lengths.flatten().tolist()
    padded = raw.new_zeros(max(sizes))
    padded[: raw.numel()] = raw
    parts = raw.new_empty(world_size, max(sizes))
    dist.all_gather(list(parts), padded, group=group)
    return [
        part[: size - 1].numpy().tobytes().decode() for part, size in zip(parts.cpu(), sizes, strict=True)
    ]


def raise_together(error: EpmoeError | None) -> None:
    """Raises the error of the lowest failing rank on every rank, or on none. A collective.

    A rank that raised alone would leave the others waiting for it until the time-out.
    """
    mine = "" if error is None else json.dumps([type(error).__name__, error.what, error.why, error.fix])
    for rank, text in enumerate(gather_text(mine)):
        if not text:
            continue
        if error is not None and text == mine:
            raise error
        name, what, why, fix = json.loads(text)
        kind: type[EpmoeError] = getattr(errors, name, EpmoeError)
        theirs = kind(f"rank {rank}: {what}", why=why, fix=fix)
        theirs.rank = rank
        raise theirs


def on_rank_zero(action: Callable[[], object], kind: type[EpmoeError]) -> None:
    """Rank 0 does something, the others wait; if it fails, all ranks raise. A collective.

    Args:
        action: Its EpmoeErrors are passed on, an OSError becomes ``kind``.
    """
    error: EpmoeError | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except EpmoeError as caught:
            error = caught
        except OSError as caught:
            error = kind(f"{caught.filename or 'a file'} cannot be used: {caught.strerror}")
    raise_together(error)


def require_equal(name: str, text: str, *, fix: str = SAME_COMMAND) -> None:
    """Checks that every rank was given the same text, for example the resolved configuration. A collective.

    Args:
        fix: What to do where they differ.

    Raises:
        ConfigError: On every rank, naming the ranks that differ from rank 0, and of JSON objects the keys.
    """
    digests = gather_text(hashlib.sha256(text.encode()).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        texts = gather_text(text)
        keys = _different_keys(texts[0], texts[different[0]])
        more = [f"... and {len(keys) - MAX_KEYS} more"] if len(keys) > MAX_KEYS else []
        raise ConfigError(
            f"the {name} of rank(s) {different} differs from rank 0's",
            why="; ".join([f"rank 0 and rank {different[0]}: {keys[0]}", *keys[1:MAX_KEYS], *more])
            if keys
            else f"{len(digests)} ranks, {len(set(digests))} different versions (compared by sha256)",
            fix=fix,
        )


def _different_keys(one: str, other: str) -> list[str]:
    """``key: value, other value`` of every key that differs in two JSON objects; nothing of other texts."""
    try:
        left, right = _flat(json.loads(one)), _flat(json.loads(other))
    except ValueError:
        return []
    keys = sorted(key for key in left.keys() | right.keys() if key and left.get(key) != right.get(key))
    return [f"{key} is {left.get(key)}, and {right.get(key)}" for key in keys]


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Dotted keys of a JSON object; a list is one value."""
    if not isinstance(value, dict):
        return {prefix[:-1]: json.dumps(value)}
    return {
        key: leaf for name, child in value.items() for key, leaf in _flat(child, f"{prefix}{name}.").items()
    }


@contextlib.contextmanager
def rank_zero_first(
    runtime: Runtime, what: str, should_stop: Callable[[], bool]
) -> Iterator[Callable[[], bool]]:
    """Rank 0 runs the block; the others enter it when rank 0 has left it, however long that takes.

    Yields:
        The stop flag for the block: on rank 0 it also goes up when a rank that waits is asked to stop.

    Raises:
        CommError: On the other ranks, when rank 0 failed, or has not looked at its stop flag for the time-out.
        Preempted: On the other ranks, when rank 0 was asked to stop, or does not answer their own wish to.
    """
    store, key = _get_default_store(), f"epmoe/first/{what}"
    if runtime.rank == 0:
        try:
            yield _or_asked(store, f"{key}/stop", should_stop)
        except BaseException as error:
            store.set(key, "stopped" if isinstance(error, Preempted) else "failed")
            raise
        store.set(key, "done")
        return
    asked_at: float | None = None
    beat, beat_at = b"", time.monotonic()
    while not store.check([key]):
        if store.check([f"{key}/beat"]) and (latest := store.get(f"{key}/beat")) != beat:
            beat, beat_at = latest, time.monotonic()
        if time.monotonic() > beat_at + runtime.timeout_s:
            raise CommError(
                f"rank 0 has shown no sign of life for {runtime.timeout_s:g} s: {what}",
                why="it is dead, stopped or hanging",
                fix="look at the log of rank 0; parallel.timeout_s is the limit",
            )
        if should_stop():
            asked_at = asked_at or time.monotonic()
            store.set(f"{key}/stop", "")
            if time.monotonic() > asked_at + PATIENCE_S:
                raise Preempted(f"rank {runtime.rank} was asked to stop; rank 0 is busy or dead: {what}")
        time.sleep(0.1)
    outcome = store.get(key)
    if outcome == b"stopped":
        raise Preempted(f"rank 0 was asked to stop: {what}")
    if outcome == b"failed":
        raise CommError(f"rank 0 failed: {what}", fix="the log of rank 0 has the cause")
    yield should_stop


def _or_asked(store: Store, key: str, should_stop: Callable[[], bool]) -> Callable[[], bool]:
    """The flag, or the key in the store; five times a second at most the store is looked at and told of us."""
    asked, looked_at = False, 0.0

    def flag() -> bool:
        nonlocal asked, looked_at
        if not asked and time.monotonic() > looked_at + 0.2:
            asked, looked_at = store.check([key]), time.monotonic()
            store.set(f"{key.removesuffix('/stop')}/beat", str(looked_at))
        return asked or should_stop()

    return flag


# ------------------------------------------------------------------------------------------- failures
@contextlib.contextmanager
def watching(runtime: Runtime, *, step: int, phase: str) -> Iterator[None]:
    """Turns a failed collective inside the block into a CommError that names the missing ranks.

    Any other exception passes through, after a note for the peers, who will only see a closed connection; what the
    ranks agreed on needs none.

    Raises:
        CommError: A collective failed or timed out. The stacks of this process are on stderr by then.
    """
    where = f"step {step}, phase {phase}"
    runtime.responder.place = where
    try:
        yield
    except (CommError, Agreed):
        raise
    except Exception as error:
        if is_comm_failure(error):
            layer = [note for note in getattr(error, "__notes__", ()) if note.startswith("layer ")]
            where = ", ".join([where, *layer])
            raise comm_error(runtime.responder, where, error, runtime.timeout_s) from error
        cause = Cause(exit_code=exit_code_of(error), text=f"{where}: {type(error).__name__}: {error}")
        runtime.responder.leave_note(cause)
        raise
