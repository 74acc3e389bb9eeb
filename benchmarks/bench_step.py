"""Training speed of a sparse model and of the dense model of equal active compute, in one run.

    python benchmarks/bench_step.py [--config configs/quickstart.yaml] [--pairs 15]
    torchrun --nproc-per-node 2 benchmarks/bench_step.py ...

The dense model is the bound: the same arithmetic for every token, nothing routed, nothing moved. Both models are
trained in turns, one optimizer step each, on the same samples; so whatever else the machine does falls on both. Then a
few steps of each run under the profiler for the share of every part of a step and the memory of its tensors. Prints
medians, spread and shares, and writes them as JSON with hardware, versions, commit and command, and a picture.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import arguments_parser, table, where, write_results
from parts import (
    ACTIVATION,
    ANY,
    EXCHANGE,
    GEMM,
    LOSSES,
    MOE_RULES,
    MOVES,
    REST,
    ROUTING,
    Label,
    moe_labels,
    part_times,
    peak_bytes,
)
from plot import Bar, bar_chart

from epmoe.config import Config, choose_ep_size
from epmoe.config_file import check_layout, load_config
from epmoe.data.loader import TrainData
from epmoe.data.prepare import prepare
from epmoe.data.prepared import PreparedData
from epmoe.models.decoder import Block, Decoder
from epmoe.models.sizes import count_parameters, flops_per_token
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from epmoe.process.stop_signals import StopFlag
from epmoe.train.build import build_model
from epmoe.train.trainer import Trainer

DECODER, HEAD = "norms, embedding, residuals", "head and loss"
ATTENTION, DENSE, OPTIMIZER, GRADIENTS, DATA = (
    "attention",
    "dense FFN",
    "optimizer",
    "gradients and their norm",
    "data",
)
PARTS = (
    ROUTING,
    MOVES,
    EXCHANGE,
    GEMM,
    ACTIVATION,
    LOSSES,
    ATTENTION,
    DENSE,
    HEAD,
    OPTIMIZER,
    GRADIENTS,
    DATA,
    DECODER,
    REST,
)
RULES = {
    **MOE_RULES,
    (DECODER, "aten::linear"): HEAD,
    (ANY, "aten::cross_entropy_loss"): HEAD,
    (ANY, "torch::autograd::AccumulateGrad"): GRADIENTS,
}
"""The one product outside attention and feed-forward blocks is the head."""


def make_trainer(config: Config, place: runtime.Runtime, prepared: PreparedData) -> Trainer:
    """A trainer for the configuration on this rank."""
    data = TrainData(prepared, config.data, config.seed)
    num_experts = config.moe.num_experts if config.moe else place.world_size
    ep_size = choose_ep_size(config.parallel.ep_size, place.world_size, num_experts)
    mesh = build_mesh(place, ep_size, config.parallel)
    model = build_model(config, prepared.padded_vocab_size, device=place.device, mesh=mesh)
    return Trainer(config, place, mesh, model=model, data=data, stop=StopFlag())


def step_labels(trainer: Trainer) -> list[Label]:
    """The parts of an optimizer step."""
    model: Decoder = trainer.model
    labels: list[Label] = [
        (model, "forward", DECODER),
        (trainer.engine, "step", OPTIMIZER),
        (trainer.engine, "zero", GRADIENTS),
        (trainer.engine, "reduce", GRADIENTS),
        (trainer.engine, "norm", GRADIENTS),
        (trainer.data, "batch", DATA),
    ]
    for block in model.blocks:
        assert isinstance(block, Block)
        labels.append((block.attention, "forward", ATTENTION))
        labels += [(ffn, "forward", DENSE) for ffn in (block.ffn, block.shared) if ffn is not None]
        if block.moe is not None:
            labels += moe_labels(block.moe)
    return labels


def shares(trainer: Trainer, repeats: int) -> dict[str, float]:
    """Seconds of a step on this rank, by part. A collective: every rank runs the same steps."""
    times = part_times(
        trainer.step, step_labels(trainer), RULES, repeats=repeats, device=trainer.runtime.device
    )
    return {part: times.get(part, 0.0) for part in PARTS}


def timed_step(trainer: Trainer) -> float:
    """Seconds of one optimizer step, device work included."""
    start = time.perf_counter()
    trainer.step()
    if trainer.runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def describe(name: str, config: Config, trainer: Trainer, seconds: list[float], peak: int) -> dict[str, Any]:
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
        "peak_bytes": peak,
    }


def main() -> None:
    """Runs the benchmark on every rank; rank 0 prints and writes."""
    parser = arguments_parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--pairs", type=int, default=None, help="timed steps of each model; default 15")
    arguments = parser.parse_args()
    place = runtime.start(arguments.device, 600.0)
    if arguments.threads:  # not before: joining decides how many there are
        torch.set_num_threads(arguments.threads)
    sparse = load_config(arguments.config)
    if arguments.quick:
        sparse = tiny(sparse, place.world_size)
    pairs = arguments.pairs or (2 if arguments.quick else 15)
    check_layout(sparse, place.world_size)
    prepared = prepare(sparse.data)
    models = {
        name: (config, make_trainer(config, place, prepared))
        for name, config in (("sparse", sparse), ("dense", sparse.model_copy(update={"moe": None})))
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for pair in range(pairs + 3):
        for name, (_, trainer) in models.items():
            spent = timed_step(trainer)
            if pair >= 3:  # the first ones warm up
                seconds[name].append(spent)
        if place.rank == 0:
            print(f"\rpair {pair + 1} of {pairs + 3}", end="", file=sys.stderr, flush=True)
    times = {name: shares(trainer, min(pairs, 5)) for name, (_, trainer) in models.items()}
    peaks = {name: peak_bytes(trainer.step, place.device) for name, (_, trainer) in models.items()}
    if place.rank == 0:
        print(file=sys.stderr)
        rows = [
            describe(name, config, trainer, seconds[name], peaks[name])
            for name, (config, trainer) in models.items()
        ]
        for row in rows:
            total = sum(times[row["model"]].values())
            row["shares"] = {part: spent / total for part, spent in times[row["model"]].items()}
        ratio = statistics.median(d / s for s, d in zip(seconds["sparse"], seconds["dense"], strict=True))
        report(rows, ratio, place)
        facts = where(place.device)
        result = {"rows": rows, "sparse_over_dense": ratio, "ranks": place.world_size, **facts}
        write_results("step", result, picture(rows, facts), device=place.device, arguments=arguments)
    runtime.stop(place)


def tiny(config: Config, world_size: int) -> Config:
    """The same model, a fraction of its size."""
    data = config.data.model_copy(update={"seq_len": 32, "tokenizer": "byte"})
    model = config.model.model_copy(update={"d_model": 32, "num_layers": 2, "d_ff": 64})
    moe = config.moe.model_copy(update={"d_ff": 32}) if config.moe else None
    train = config.train.model_copy(update={"global_batch_size": 2 * world_size})
    return config.model_copy(update={"data": data, "model": model, "moe": moe, "train": train})


def report(rows: list[dict[str, Any]], ratio: float, place: runtime.Runtime) -> None:
    """Prints the tables."""
    print(
        "| model | parameters | active | MFLOP/token | tokens/s | GFLOP/s | step, median (quartiles) | peak, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["quartiles_s"]
        print(
            f"| {row['model']} | {row['parameters']:,} | {row['active']:,} | {row['mflop_per_token']:.1f} | "
            f"{row['tokens_per_second']:,.0f} | {row['gflops']:.1f} | "
            f"{row['median_s'] * 1e3:.0f} ms ({low * 1e3:.0f} to {high * 1e3:.0f}) | "
            f"{row['peak_bytes'] / 2**20:.0f} |"
        )
    print(
        f"sparse runs at {ratio:.0%} of the speed of dense (median of paired steps), {place.world_size} rank(s)"
    )
    print("\nShare of a step on rank 0:\n")
    lines = [
        [part, *(f"{row['shares'][part]:.1%}" for row in rows)]
        for part in PARTS
        if any(row["shares"][part] for row in rows)
    ]
    print(table(["part", *(row["model"] for row in rows)], lines))


def picture(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The shares as bars."""
    groups = [
        (
            f"{row['model']}, {row['median_s'] * 1e3:.0f} ms per step",
            [
                Bar(label=part, value=share * 100, text=f"{share:.1%}", ours=part in (ROUTING, MOVES))
                for part, share in row["shares"].items()
                if share
            ],
        )
        for row in rows
    ]
    return bar_chart(
        "Where an optimizer step spends its time",
        f"torch {facts['versions']['torch']}, {facts['device']}, {facts['threads_per_rank']} threads per rank, kernels "
        f"{facts['kernels'].split(':')[0]}",
        groups,
        axis="percent of the step",
        mark=None,
    )


if __name__ == "__main__":
    main()
