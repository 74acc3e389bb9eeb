"""Ranks of one attempt find each other, and not what an earlier attempt left in the store they share."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from epmoe.process.rendezvous import name_attempt
from epmoe.process.runtime import gather_text, start
from tests.distributed.harness import rank_outcomes


def _restarted(rank: int, port: int, attempt: str, late: int | None) -> list[str]:
    """As under torchrun, whose agent keeps the store; ``late`` comes half a second after the others."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    if rank == late:
        time.sleep(0.5)
    start("cpu", 5.0)
    texts = gather_text(f"{attempt}/{rank}")
    if attempt == "first":
        os.kill(os.getpid(), signal.SIGKILL)
    return texts


@pytest.mark.parametrize("late", [0, 1])
def test_a_restart_does_not_look_for_processes_that_are_gone(late: int, tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in ("first", "second"):
        outcomes = rank_outcomes(
            2, _restarted, tmp_path, store.port, attempt, late, join_group=False, timeout=15
        )
    for outcome in outcomes:
        assert outcome.error is None
        assert outcome.result == ["second/0", "second/1"]


def _names(
    store: dist.Store, world_size: int, missing: int | None = None, timeout_s: float = 5.0
) -> list[str]:
    """What each rank calls the attempt; ``!`` when it gives up."""
    names = [""] * world_size

    def ask(rank: int) -> None:
        time.sleep(0.02 * (world_size - rank))  # rank 0 last
        try:
            names[rank] = name_attempt(store, rank, world_size, timeout_s)
        except RuntimeError as error:
            names[rank] = f"! {error}"

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(world_size) if rank != missing]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_all_ranks_give_an_attempt_the_same_name_and_every_attempt_another() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    names = [_names(store, 4) for _ in range(3)]
    assert all(len(set(attempt)) == 1 for attempt in names)
    assert len({attempt[0] for attempt in names}) == 3


def test_a_rank_of_an_earlier_attempt_does_not_stand_in_for_a_missing_one() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    _names(store, 3)
    zero, one, two = _names(store, 3, missing=2, timeout_s=0.3)
    assert zero == "! rank(s) [2] did not come"
    assert two == ""
    assert one.isalnum()


def test_one_rank_needs_nobody() -> None:
    assert len(_names(dist.HashStore(), 1)[0]) == 32  # type: ignore[attr-defined]
