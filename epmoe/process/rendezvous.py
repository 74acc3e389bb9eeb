"""How the processes of one attempt at a job find each other, and nobody else.

torchrun keeps one store for all restarts of a job, and in it lie the addresses of processes that are gone. A rank that
is quicker than the new owner of such a key connects to a dead one and waits, in gloo without a time-out. The restart
count does not tell attempts apart, because every node's agent counts its own. So rank 0 makes a name for the attempt,
and hands it to the living:

    rank r    join/r = nonce          waits for welcome/<nonce>  -> prefix       here/<prefix>/r
    rank 0    reads join/r, answers welcome/<nonce> = prefix, looks again until  here/<prefix>/r is there for all
"""

from __future__ import annotations

import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from epmoe import env
from epmoe.errors import CommError, ConfigError

TORCHRUN = "torchrun --nproc-per-node RANKS -m epmoe train CONFIG.yaml"


def join(backend: str, timeout_s: float) -> None:
    """Initialises the default process group of the job a launcher describes, or one of a single rank.

    Args:
        backend: Of torch.distributed.
        timeout_s: Limit for finding the others and for every collective, in seconds.

    Raises:
        ConfigError: Launcher variables are missing.
        CommError: The ranks did not find each other.
    """
    timeout = timedelta(seconds=timeout_s)
    env.adopt_tasks()
    if not env.launched():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    if wrong := env.wrong_launch_variable():
        raise ConfigError(
            wrong, why="a launcher sets these variables for every process", fix=f"start with `{TORCHRUN}`"
        )
    if missing := env.missing_launch_variables():
        raise ConfigError(
            f"a launcher was expected, but these variables are not set: {', '.join(missing)}",
            why="some of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are there and some are not",
            fix=f"start with `{TORCHRUN}`, or unset RANK and WORLD_SIZE to run a single process",
        )
    _await_name(timeout_s)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        prefix = name_attempt(store, rank, world_size, timeout_s)
        mine = PrefixStore(prefix, store)
        dist.init_process_group(backend, store=mine, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise _rendezvous_error(error, timeout_s) from error


def name_attempt(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A prefix for the keys of this attempt that all its ranks agree on, and no earlier attempt knew.

    Raises:
        RuntimeError: Not all ranks came within the time limit.
    """
    nonce = uuid.uuid4().hex
    if rank > 0:
        store.set(f"epmoe/join/{rank}", nonce)
        store.wait([f"epmoe/welcome/{nonce}"], timedelta(seconds=timeout_s))
        prefix: str = store.get(f"epmoe/welcome/{nonce}").decode()
        store.set(f"epmoe/here/{prefix}/{rank}", "")
        return prefix
    missing = set(range(1, world_size))
    deadline = time.monotonic() + timeout_s
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank(s) {sorted(missing)[:16]} did not come")
        for other in sorted(missing):
            if store.check([f"epmoe/here/{nonce}/{other}"]):
                missing.remove(other)
            elif store.check([f"epmoe/join/{other}"]):  # perhaps of an earlier attempt: then it is set again
                store.set(f"epmoe/welcome/{store.get(f'epmoe/join/{other}').decode()}", nonce)
        time.sleep(0.01)
    return nonce


def _await_name(timeout_s: float) -> None:
    """Waits until MASTER_ADDR has an address; a cluster's name service may be behind its pods."""
    host = env.rendezvous_address().rpartition(":")[0]
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise CommError(
                    f"rank {env.rank()} of {env.world_size()} cannot resolve MASTER_ADDR={host}",
                    why=f"{error.strerror} for {timeout_s:g} s",
                    fix=f"set MASTER_ADDR to the name or address of the first node, or start with `{TORCHRUN}`",
                ) from None
        time.sleep(min(0.5, timeout_s / 10))


def _rendezvous_error(error: Exception, timeout_s: float) -> CommError:
    """Says which of the usual start-up problems it is."""
    address = env.rendezvous_address()
    port = address.rpartition(":")[2]
    why = str(error).partition("\n")[0]
    who = f"rank {env.rank()} of {env.world_size()}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return CommError(
            f"{who} cannot listen on {address}: port {port} (MASTER_PORT) is in use",
            why="another job, or what is left of an earlier one, holds it",
            fix=f"`{TORCHRUN}` picks a free port on one node; otherwise choose another --master-port",
        )
    return CommError(
        f"{who} did not find the other ranks at {address} within {timeout_s:g} s",
        why=why,
        fix="check that every node started, reaches that address, and has the same WORLD_SIZE; "
        "parallel.timeout_s is the limit",
    )
