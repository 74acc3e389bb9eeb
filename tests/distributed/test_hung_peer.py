"""A rank that stops answering: all others end with code 7 and its name, a second after the time-out at most."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest

from epmoe.config import Config
from epmoe.errors import EpmoeError
from epmoe.train.status import read_status
from tests.distributed.harness import rank_outcomes
from tests.distributed.runs import free_port, launched, make_config

RANKS, LIMIT_S, SLACK_S = 4, 3.0, 1.0
HIERARCHICAL = ("parallel.exchange=hierarchical", "parallel.ranks_per_node=2", "parallel.ep_size=4")
EXCHANGES = {
    "flat": ("parallel.ep_size=2",),
    "flat over all": ("parallel.ep_size=4",),
    "hierarchical": HIERARCHICAL,
}
POINTS = ("dispatch.exchange", "train.after_backward", "train.step_start")
CELLS = list(
    itertools.product(
        EXCHANGES, (1, 2), ("all_to_all", "padded"), ("stop", "hang"), POINTS
    )  # 3 x 2 x 2 x 2 x 3 = 72
)
QUICK = [
    ("flat", 2, "all_to_all", "stop", "dispatch.exchange"),
    ("hierarchical", 2, "padded", "hang", "train.after_backward"),
]


def _until_lost(rank: int, config: Config, fault: str, port: int) -> None:
    """A run that is expected to fail; leaves its exit code, its words and the time."""
    try:
        launched(rank, config, fault, port, RANKS)
    except EpmoeError as error:
        end = {"code": error.exit_code, "text": str(error), "at": time.time()}
        Path(f"{config.out}-{rank}.json").write_text(json.dumps(end))
        raise


def _hang(base: Path, number: int, cell: tuple[str, int, str, str, str]) -> None:
    exchange, chunks, dispatcher, action, point = cell
    victim = 1 + number % (RANKS - 1)
    config = make_config(
        base,
        f"hung-{number}",
        *(
            f"parallel.timeout_s={LIMIT_S}",
            "checkpoint.every=0",
            f"moe.dispatcher={dispatcher}",
            "moe.num_experts=8",
        ),
        *(f"parallel.overlap_chunks={chunks}", *EXCHANGES[exchange]),
    )
    fault = f"point={point},rank={victim},action={action}" + (
        "" if point == "dispatch.exchange" else ",step=3"
    )
    rank_outcomes(
        RANKS, _until_lost, base, config, fault, free_port(), join_group=False, grace=2 * SLACK_S, timeout=30
    )
    ends = {
        rank: json.loads(Path(f"{config.out}-{rank}.json").read_text())
        for rank in range(RANKS)
        if rank != victim
    }
    for end in ends.values():
        assert end["code"] == 7, end
        assert f"[{victim}]" in end["text"].partition("\n")[0], end
    status = read_status(Path(config.out))
    assert status is not None
    assert (status.exit_code, status.rank) == (7, victim)
    # The latest moment at which everybody was well: rank 0 wrote a record, or the state.
    well = (
        Path(config.out, "metrics.jsonl" if point != "dispatch.exchange" else "config.yaml").stat().st_mtime
    )
    assert (
        max(end["at"] for end in ends.values()) - well < LIMIT_S + SLACK_S + 0.5
    )  # and half a second of steps


@pytest.mark.parametrize("cell", QUICK, ids=lambda cell: " ".join(map(str, cell)))
def test_a_hung_rank_is_named(base: Path, cell: tuple[str, int, str, str, str]) -> None:
    _hang(base, 100 + QUICK.index(cell), cell)


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(CELLS)))
def test_a_hung_rank_is_named_in_every_exchange(base: Path, number: int) -> None:
    _hang(base, number, CELLS[number])
