"""Training speed of a sparse model and of the dense model of equal active compute, in one run.

    python benchmarks/bench_step.py [--config configs/quickstart.yaml] [--pairs 15]
    torchrun --nproc-per-node 2 benchmarks/bench_step.py ...

Both models are trained in turns, one optimizer step each, on the same samples; so whatever else the machine does
falls on both. Prints medians and spread, and writes them as JSON with hardware, versions, commit and command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from epmoe.config import Config, choose_ep_size
from epmoe.config_file import check_layout, load_config
from epmoe.data.loader import TrainData
from epmoe.data.prepare import prepare
from epmoe.models.sizes import count_parameters, flops_per_token
from epmoe.parallel import runtime
from epmoe.parallel.mesh import build_mesh
from epmoe.train.loop import Trainer
from epmoe.train.run_folder import hardware, software_versions
from epmoe.train.setup import build_model
from epmoe.train.signals import StopFlag


def make_trainer(config: Config, place: runtime.Runtime) -> Trainer:
    """A trainer for the configuration on this rank."""
    prepared = prepare(config.data)
    data = TrainData(prepared, config.data, config.seed)
    num_experts = config.moe.num_experts if config.moe else place.world_size
    mesh = build_mesh(place, choose_ep_size(config.parallel.ep_size, place.world_size, num_experts))
    model = build_model(config, prepared.padded_vocab_size, device=place.device, mesh=mesh)
    return Trainer(config, place, mesh, model=model, data=data, stop=StopFlag())


def timed_step(trainer: Trainer) -> float:
    """Seconds of one optimizer step, device work included."""
    start = time.perf_counter()
    trainer.step()
    if trainer.runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def describe(name: str, config: Config, trainer: Trainer, seconds: list[float]) -> dict[str, Any]:
    """One row of the table."""
    vocab_size = trainer.model.vocab_size
    counts = count_parameters(config.model, config.moe, vocab_size)
    tokens = config.train.global_batch_size * config.data.seq_len
    flops = flops_per_token(config.model, config.moe, vocab_size, config.data.seq_len)
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4)
    return {
        "model": name,
        "parameters": counts.total,
        "active": counts.active,
        "mflop_per_token": flops / 1e6,
        "tokens_per_second": tokens / median,
        "gflops": tokens * flops / median / 1e9,
        "median_s": median,
        "quartiles_s": [quartiles[0], quartiles[2]],
    }


def main() -> None:
    """Runs the benchmark on every rank; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--pairs", type=int, default=15, help="timed steps of each model")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the result")
    arguments = parser.parse_args()
    place = runtime.start("auto", 600.0)
    sparse = load_config(arguments.config)
    dense = sparse.model_copy(update={"moe": None})
    check_layout(sparse, place.world_size)
    models = {
        name: (config, make_trainer(config, place)) for name, config in (("sparse", sparse), ("dense", dense))
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for pair in range(arguments.pairs + 3):
        for name, (_, trainer) in models.items():
            spent = timed_step(trainer)
            if pair >= 3:  # the first ones warm up
                seconds[name].append(spent)
        if place.rank == 0:
            print(f"\rpair {pair + 1} of {arguments.pairs + 3}", end="", file=sys.stderr, flush=True)
    if place.rank == 0:
        print(file=sys.stderr)
        rows = [describe(name, config, trainer, seconds[name]) for name, (config, trainer) in models.items()]
        ratio = statistics.median(d / s for s, d in zip(seconds["sparse"], seconds["dense"], strict=True))
        report(rows, ratio, place, arguments.out)
    runtime.stop(place)


def report(rows: list[dict[str, Any]], ratio: float, place: runtime.Runtime, out: Path | None) -> None:
    """Prints the table and writes the JSON."""
    print("| model | parameters | active | MFLOP/token | tokens/s | GFLOP/s | step, median (quartiles) |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["quartiles_s"]
        print(
            f"| {row['model']} | {row['parameters']:,} | {row['active']:,} | {row['mflop_per_token']:.1f} | "
            f"{row['tokens_per_second']:,.0f} | {row['gflops']:.1f} | "
            f"{row['median_s'] * 1e3:.0f} ms ({low * 1e3:.0f} to {high * 1e3:.0f}) |"
        )
    print(
        f"sparse runs at {ratio:.0%} of the speed of dense (median of paired steps), {place.world_size} rank(s)"
    )
    if out is None:
        return
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    result = {
        "rows": rows,
        "sparse_over_dense": ratio,
        "ranks": place.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "hardware": {key: value for key, value in hardware().items() if key != "host"},
        "versions": software_versions(),
        "commit": commit or None,
        "command": sys.argv,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
