"""Exchanges between nodes: flat against hierarchical, and how much of the way overlap hides.

    python benchmarks/bench_links.py [--rate 1000] [--rounds 9]

Nodes are network namespaces joined by links of a known rate (needs Linux, iproute2 and the right to make namespaces;
elsewhere it says so and ends well). Two jobs, each under torchrun with an agent on every node:

1. Two nodes of two ranks: rows to all other ranks and back with both exchanges, for blocks of a few bytes to a
   megabyte: messages and bytes between the nodes as counted, milliseconds as measured, in turns.
2. Two nodes of one rank: a layer's forward and backward pass with its exchange in 1, 2 and 4 parts. What is saved is
   told as a share of the smaller of computing and travelling, the most that overlap can hide.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Spread, arguments_parser, interleave, paired, spread, table, where, write_results
from namespaces import nodes, torchrun, why_not
from plot import Bar, bar_chart
from torch import Tensor

from epmoe import TokenContext, build_moe_layer, shard_experts
from epmoe.comm.exchange import Exchange, Trip, exchange_rows
from epmoe.config import MoEConfig, ParallelConfig
from epmoe.moe.dispatch import PaddedDispatcher
from epmoe.parallel.layers import take_over
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime

WIDTH = 256
ROW_BYTES = 4 * WIDTH
RATE_MBIT = {"exchange": 1000.0, "overlap": 500.0}
BLOCK_ROWS = (1, 4, 16, 64, 256, 1024)
"""Rows that a rank has for each other rank; a row is 1 KiB."""
PARTS = (1, 2, 4)
LIMIT_S = 400.0


# ------------------------------------------------------------------------------------------- on a rank
def timed(rank_work: Callable[[], object]) -> Callable[[], float]:
    """Milliseconds of the slowest rank."""

    def sample() -> float:
        runtime.gather_text("")  # all begin together
        begin = time.perf_counter()
        rank_work()
        return max(map(float, runtime.gather_text(str((time.perf_counter() - begin) * 1e3))))

    return sample


def counted(exchange: Exchange, work: Callable[[Exchange], object], rank: int) -> tuple[int, int]:
    """Messages and bytes that a rank sends to the other node."""
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    seen: list[int] = []

    def observe(peer: int, num_bytes: int) -> None:
        if peer // per_node != rank // per_node:
            seen.append(num_bytes)

    work(replace(exchange, observe=observe))
    return len(seen), sum(seen)


def exchanges(place: runtime.Runtime, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """Rows to all ranks and home again, with both exchanges, by the size of a block."""
    kinds = ("flat", "hierarchical")
    made = {
        kind: build_mesh(place, place.world_size, ParallelConfig(exchange=kind)).exchange for kind in kinds
    }
    found = []
    for block_rows in BLOCK_ROWS[:2] if quick else BLOCK_ROWS:
        rows_ND = torch.randn(block_rows * place.world_size, WIDTH)

        def go(exchange: Exchange, rows_ND: Tensor = rows_ND) -> None:
            [part] = PaddedDispatcher(exchange).parts(exchange.num_ranks, rows_ND)
            trip = Trip(exchange=exchange, splits=part.splits)
            exchange_rows(replace(trip, home=True), exchange_rows(trip, rows_ND))

        works = {kind: timed(lambda go=go, kind=kind: go(made[kind])) for kind in kinds}  # type: ignore[misc]
        for sample in works.values():
            sample()
        samples = interleave(works, rounds)
        for kind in kinds:
            messages, num_bytes = counted(made[kind], go, place.rank)
            found.append({"block_bytes": block_rows * ROW_BYTES, "exchange": kind, "messages": messages,
                          "bytes": num_bytes, "ms": spread(samples[kind]),
                          "speedup": paired(samples["flat"], samples[kind])})  # fmt: skip
    return found


def way_of(layer: Any, step: Callable[[], None]) -> Any:
    """The splits with which the rows of a step travel."""
    plans: list[Any] = []
    plan = layer.dispatcher.plan

    def watched(*values: Any) -> Any:
        plans.append(plan(*values))
        return plans[-1]

    layer.dispatcher.plan = watched
    step()
    del layer.dispatcher.plan  # the class's own method shows again
    return plans[0].parts[0].splits


def overlap(place: runtime.Runtime, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """A layer in parts, and its trips alone."""
    num_experts, num_tokens, d_ff = (8, 64, 32) if quick else (16, 2048, 256)
    found = []
    for dispatcher in ("padded", "all_to_all"):
        moe = MoEConfig.model_validate(
            {"num_experts": num_experts, "router": "topk", "top_k": 2, "dispatcher": dispatcher,
             "capacity_factor": 1.0 if dispatcher == "padded" else None, "losses": {}}
        )  # fmt: skip
        x_BSD = torch.randn(4, num_tokens // 4, WIDTH, generator=torch.Generator().manual_seed(place.rank))
        context = TokenContext(sample_B=torch.arange(4) + 4 * place.rank)
        works: dict[str, Callable[[], float]] = {}
        for parts in PARTS:
            mesh = build_mesh(place, place.world_size, ParallelConfig(overlap_chunks=parts))
            layer = build_moe_layer(moe, d_model=WIDTH, d_ff=d_ff)
            shard_experts(layer, mesh)
            take_over(layer, "benchmark")

            def step(layer: Any = layer, x_BSD: Tensor = x_BSD, context: Any = context) -> None:
                x = x_BSD.clone().requires_grad_()
                y_BSD, _ = layer(x, context)
                y_BSD.backward(torch.ones_like(y_BSD))

            works[f"n={parts}"] = timed(step)
            if parts == 1:
                way, exchange = way_of(layer, step), mesh.exchange

        def travel(way: Any = way, exchange: Exchange = exchange) -> None:
            rows_ND = torch.ones(sum(way[0]), WIDTH, requires_grad=True)
            trip = Trip(exchange=exchange, splits=way)
            exchange_rows(replace(trip, home=True), exchange_rows(trip, rows_ND)).sum().backward()

        works["travelling"] = timed(travel)
        for sample in works.values():
            sample()
        samples = interleave(works, rounds)
        found.append({"dispatcher": dispatcher, **{name: spread(values) for name, values in samples.items()}})
    return found


def on_a_rank(kind: str, rounds: int, quick: bool, out: Path) -> None:
    """The part of one rank; rank 0 writes what was found."""
    torch.set_num_threads(1)
    place = runtime.start("cpu", 120.0)
    try:
        found = (exchanges if kind == "exchange" else overlap)(place, rounds, quick)
        if place.rank == 0:
            out.write_text(json.dumps(found, default=lambda s: [s.median, s.low, s.high]))
    finally:
        runtime.stop(place)


# ------------------------------------------------------------------------------------------- the launcher
def job(kind: str, rate_mbit: float, rounds: int, quick: bool) -> Any:
    """Runs one job on two nodes -> what its rank 0 found."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    with nodes(2, rate_mbit=rate_mbit, burst_bytes=8192) as made, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = [__file__, "--job", kind, "--rounds", str(rounds), "--out", str(out)]
        torchrun(
            made, words + ["--quick"] * quick, python=sys.executable, environment=environment, timeout_s=LIMIT_S,
            ranks_per_node=2 if kind == "exchange" else 1, logs=Path(folder),
        )  # fmt: skip
        return json.loads(out.read_text())


def as_spread(values: list[float]) -> Spread:
    """From the three numbers of a rank's file."""
    return Spread(median=values[0], low=values[1], high=values[2])


def overlap_row(case: dict[str, Any]) -> dict[str, Any]:
    """Computing time and what each number of parts saves."""
    one, travelling = case["n=1"].median, case["travelling"].median
    smaller = min(one - travelling, travelling)
    saved = {parts: (one - case[f"n={parts}"].median) / smaller for parts in PARTS[1:]}
    return case | {"computing": one - travelling, "travelling_share": travelling / one, "saved": saved}


def main() -> None:
    """Measures, prints tables, writes the result."""
    parser = arguments_parser(__doc__)
    parser.add_argument(
        "--rate", type=float, default=None, help="Mbit/s of every link, instead of both jobs' own"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--job", choices=tuple(RATE_MBIT), help="what the ranks are started with")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    if arguments.job:
        on_a_rank(arguments.job, rounds, arguments.quick, arguments.out)
        return
    if reason := why_not():
        print(f"no network namespaces here, nothing is measured: {reason}")
        return
    rates = {kind: arguments.rate or rate for kind, rate in RATE_MBIT.items()}
    rows = job("exchange", rates["exchange"], rounds, arguments.quick)
    for row in rows:
        row["ms"], row["speedup"] = as_spread(row["ms"]), as_spread(row["speedup"])
    print(f"\n### Rows to all ranks and home, 2 nodes x 2 ranks, {rates['exchange']:g} Mbit/s\n")
    headers = (
        "block, KiB",
        "exchange",
        "messages between nodes",
        "bytes between nodes",
        "ms (quartiles)",
        "flat / this (quartiles)",
    )
    lines = [
        [row["block_bytes"] // 1024, row["exchange"], row["messages"], f"{row['bytes']:,}", row["ms"].text(1, 1),
         row["speedup"].text()]
        for row in rows
    ]  # fmt: skip
    print(table(headers, lines))
    cases = [
        overlap_row({name: as_spread(v) if isinstance(v, list) else v for name, v in case.items()})
        for case in job("overlap", rates["overlap"], rounds, arguments.quick)
    ]
    print(
        f"\n### A layer over 2 nodes x 1 rank, {rates['overlap']:g} Mbit/s, milliseconds of forward and backward\n"
    )
    headers = ("dispatch", "computing", "travelling", *(f"n = {n}" for n in PARTS), "saved of the smaller")
    lines = [
        [case["dispatcher"], f"{case['computing']:.0f}",
         f"{case['travelling'].median:.0f} ({case['travelling_share']:.0%})",
         *(case[f"n={n}"].text(1, 0) for n in PARTS),
         ", ".join(f"{share:.0%} (n = {n})" for n, share in case["saved"].items())]
        for case in cases
    ]  # fmt: skip
    print(table(headers, lines))
    device = torch.device("cpu")
    facts = where(device)
    bars = [
        Bar(
            label=f"{row['block_bytes'] // 1024} KiB",
            value=row["speedup"].median,
            text=f"{row['speedup'].median:.2f}x",
            low=row["speedup"].low,
            high=row["speedup"].high,
            ours=True,
        )
        for row in rows
        if row["exchange"] == "hierarchical"
    ]
    picture = bar_chart(
        "Hierarchical against flat exchange, by the size of a block",
        f"rows to all ranks and home, 2 nodes x 2 ranks, {rates['exchange']:g} Mbit/s; above 1: hierarchical is faster",
        [("a rank's rows for each other rank", bars)],
        axis="time of flat / time of hierarchical",
        mark=1.0,
    )
    write_results("links", {"where": facts, "rates_mbit": rates, "exchange": rows, "overlap": cases}, picture,
                  device=device, arguments=arguments)  # fmt: skip


if __name__ == "__main__":
    main()
