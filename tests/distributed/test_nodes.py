"""Several nodes for real: network namespaces, links of a known rate, torchrun with static rendezvous on each node."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import namespaces
from benchmarks.namespaces import Node
from epmoe.config_file import dump_config
from tests.distributed.nodes_worker import CAPACITY, NUM_EXPERTS, STEPS, WIDTH
from tests.distributed.runs import history, make_config

pytestmark = pytest.mark.slow
NUM_NODES, RANKS_PER_NODE, LAYERS = 2, 2, 2
RANKS = NUM_NODES * RANKS_PER_NODE
RATE_MBIT = 1000.0
FLOAT64, INT64 = 8, 8
SEQUENCES = 2
"""Of a rank and step."""
TRIPS = 4
"""Of rows, for a layer and step: there and home, forward and backward."""
EXPERTS_PER_RANK = NUM_EXPERTS // RANKS
BLOCK = EXPERTS_PER_RANK * SEQUENCES * CAPACITY * WIDTH * FLOAT64
"""Bytes that padded dispatch sends to another rank at once: the smallest message of rows on the link."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def where() -> Iterator[list[Node]]:
    """Two nodes."""
    if reason := namespaces.why_not():
        pytest.skip(f"no network namespaces here: {reason}")
    with namespaces.nodes(NUM_NODES, rate_mbit=RATE_MBIT, burst_bytes=BLOCK // 8) as made:
        yield made


def launch(where: list[Node], logs: Path, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    namespaces.torchrun(
        where, arguments, python=sys.executable, ranks_per_node=RANKS_PER_NODE, environment=environment,
        logs=logs, timeout_s=110,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ranks(where: list[Node], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank of one job found."""
    folder = tmp_path_factory.mktemp("nodes")
    launch(where, folder, "-m", "tests.distributed.nodes_worker", str(folder))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def to_other_node(rank: int, per_peer: dict[str, int]) -> dict[int, int]:
    node = rank // RANKS_PER_NODE
    return {int(peer): n for peer, n in per_peer.items() if int(peer) // RANKS_PER_NODE != node}


def total(ranks: list[dict[str, Any]], kind: str, what: str) -> int:
    """Over all ranks, what went from node to node."""
    return sum(sum(to_other_node(r, found[kind][what]).values()) for r, found in enumerate(ranks))


def test_every_exchange_trains_the_same_model(ranks: list[dict[str, Any]]) -> None:
    wanted = ranks[0]["flat all_to_all"]["losses"]
    assert len(wanted) == STEPS
    assert wanted[-1] < wanted[0]
    for found in ranks:
        for kind, result in found.items():
            assert result["losses"] == pytest.approx(wanted, rel=1e-12), kind


@pytest.mark.parametrize("dispatcher", ["all_to_all", "padded"])
def test_messages_on_the_link(ranks: list[dict[str, Any]], dispatcher: str) -> None:
    """Hierarchical: one message to each other node instead of one to each of its ranks."""
    rounds = LAYERS * STEPS * (TRIPS + (1 if dispatcher == "all_to_all" else 0))  # ragged: and one of counts
    for rank, found in enumerate(ranks):
        flat, steps = (
            to_other_node(rank, found[f"{kind} {dispatcher}"]["messages"])
            for kind in ("flat", "hierarchical")
        )
        others = [peer for peer in range(RANKS) if peer // RANKS_PER_NODE != rank // RANKS_PER_NODE]
        assert flat == dict.fromkeys(others, rounds)
        partner = (rank + RANKS_PER_NODE) % RANKS
        assert steps == {partner: rounds}


def of_node(rank: int) -> range:
    first = rank // RANKS_PER_NODE * RANKS_PER_NODE
    return range(first, first + RANKS_PER_NODE)


def test_bytes_of_padded_dispatch(ranks: list[dict[str, Any]]) -> None:
    """The capacity of every expert over there, for every trip."""
    away = RANKS - RANKS_PER_NODE
    for rank, found in enumerate(ranks):
        for kind, receivers in (("flat", away), ("hierarchical", NUM_NODES - 1)):
            per_peer = to_other_node(rank, found[f"{kind} padded"]["bytes"])
            assert set(per_peer.values()) == {LAYERS * STEPS * TRIPS * BLOCK * away // receivers}, kind


@pytest.mark.parametrize("exchange", ["flat", "hierarchical"])
def test_bytes_of_ragged_dispatch(ranks: list[dict[str, Any]], exchange: str) -> None:
    """The rows that are kept, and the counts. Every row goes there and home, forward and backward; in two steps it
    crosses between the ranks that have the same place on their nodes, with those of everybody beside them."""

    def kept(sender: int, holder: int) -> int:
        rows = ranks[sender][f"{exchange} all_to_all"]["kept"]
        return sum(rows[holder * EXPERTS_PER_RANK :][:EXPERTS_PER_RANK])

    together = exchange == "hierarchical"
    for rank, found in enumerate(ranks):
        for peer, num_bytes in to_other_node(rank, found[f"{exchange} all_to_all"]["bytes"]).items():
            mates = of_node(rank) if together else [rank]
            others = of_node(peer) if together else [peer]
            rows = sum(kept(mate, peer) for mate in mates) + sum(kept(other, rank) for other in others)
            counts = LAYERS * STEPS * EXPERTS_PER_RANK * len(mates) * INT64
            assert num_bytes == TRIPS // 2 * rows * WIDTH * FLOAT64 + counts


def test_times_on_the_link(ranks: list[dict[str, Any]], where: list[Node], capsys: Any) -> None:
    """The link carried at least the payload; times are for reading."""
    payload = sum(total(ranks, kind, "bytes") for kind in ranks[0])
    assert sum(node.sent_bytes() for node in where) > payload
    with capsys.disabled():
        print(f"\n{NUM_NODES} nodes x {RANKS_PER_NODE} ranks, {RATE_MBIT:g} Mbit/s: milliseconds of a step")
        for kind, result in ranks[0].items():
            num_bytes, messages = (total(ranks, kind, what) // STEPS for what in ("bytes", "messages"))
            print(
                f"  {kind:24} {1e3 * min(result['seconds'][1:]):7.1f}   {num_bytes:9,} bytes in {messages} messages"
            )


def test_a_run_over_nodes(where: list[Node], tmp_path: Path) -> None:
    """``epmoe train`` finds the nodes from its launcher; the run is that of one node."""
    losses = {}
    for exchange in ("flat", "hierarchical"):
        config = make_config(tmp_path, exchange, "train.steps=4", f"parallel.exchange={exchange}")
        (tmp_path / f"{exchange}.yaml").write_text(dump_config(config))
        logs = tmp_path / f"{exchange}-logs"
        logs.mkdir()
        launch(where, logs, "-m", "epmoe", "train", str(tmp_path / f"{exchange}.yaml"))
        losses[exchange] = [step["loss"] for step in history(Path(config.out))]
        assert "flat instead of hierarchical" not in (logs / "node0.log").read_text()
    assert len(losses["flat"]) >= 4
    assert losses["flat"] == pytest.approx(losses["hierarchical"], rel=1e-5)
