"""Every causal router and the dense model at equal tokens and equal arithmetic per token: loss, health and speed.

    python benchmarks/bench_routers.py --train           # three seeds each; goes on where it was interrupted
    python benchmarks/bench_routers.py --train --threads 1 --share 1/2 &    # the same by two processes, faster
    python benchmarks/bench_routers.py --train --threads 1 --share 2/2
    python benchmarks/bench_routers.py --speed           # minutes; only on a machine with nothing else to do

Both parts write a line per result into ``results/routers-<machine>.jsonl`` and then the table, JSON and picture of
all lines there are. A run is the real Trainer in this process, on the quickstart's model and data: the loss of every
few steps, and in the end bits per byte of the whole validation text, dropless. A run whose line is there is not
repeated; delete the file to begin anew. Speed is measured apart, one step of every model in turn, so that whatever
else the machine does falls on all of them; the loss against seconds is that of a run with the step time measured
there. Nothing is tuned for any of the models: learning rate and coefficients are the configuration's, or a paper's.
With neither part named, a few steps of tiny models only show that it runs.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_step import make_trainer, timed_step, tiny
from common import (
    RESULTS,
    arguments_parser,
    interleave,
    machine,
    paired,
    progress,
    spread,
    where,
    write_results,
)
from router_report import append_line, make_rows, mean, picture, read_lines, report
from router_variants import DENSE, Variant, describe, make_variants, run_key

from epmoe.config import Config
from epmoe.config_file import load_config
from epmoe.data.loader import validation_sets
from epmoe.data.prepare import prepare
from epmoe.data.prepared import PreparedData
from epmoe.metrics.router_health import RouterHistory
from epmoe.process import runtime
from epmoe.train.evaluate import evaluate
from epmoe.train.step_recorder import Recorder
from epmoe.train.trainer import Trainer

WARM_UP_STEPS = 3
EVAL_BATCH = 32
"""Windows of a validation pass."""
ORIGIN = ("commit", "threads_per_rank", "kernels", "load_average")
"""What every line says about where it comes from."""
HEALTH_WINDOW = 0.2
"""Part of the steps, the last one, that load and drops are taken from."""


# --------------------------------------------------------------------------------------------- one result
def train_once(
    config: Config,
    prepared: PreparedData,
    place: runtime.Runtime,
    *,
    log_every: int,
    max_windows: int | None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains and validates one model -> curve, bits per byte, and what its routers did in the last steps."""
    trainer = make_trainer(config, place, prepared)
    recorder = Recorder(config, prepared.padded_vocab_size, place.device, place.world_size, 0.0)
    history, curve = RouterHistory(), []
    recorder.clock.lap()
    for step in range(1, config.train.steps + 1):
        recorder.add(trainer.step())
        tick()
        if step % log_every == 0 or step == config.train.steps:
            record = recorder.record(trainer.progress, {})
            assert record is not None  # a step was added
            history.add(record)
            curve.append([record.tokens, record.loss])
    begin = time.perf_counter()
    bits = bits_per_byte(trainer, prepared, max_windows)
    layers = [summary.health for summary in history.summary(HEALTH_WINDOW)]
    asked = sum(layer.assignments for layer in layers)
    return {
        "bits_per_byte": bits,
        "curve": curve,
        "drop_rate": 1.0 - sum(layer.kept for layer in layers) / asked if asked else 0.0,
        "overflow_rate": mean([layer.overflow_rate for layer in layers]) or 0.0,
        "busiest_share": max((max(layer.share_E) for layer in layers), default=None),
        "dead_experts": sum(len(layer.dead_experts) for layer in layers),
        "entropy": sum(layer.entropy for layer in layers) / len(layers) if layers else None,
        "skipped_steps": trainer.progress.skipped,
        "train_seconds": recorder.seconds,
        "validation_seconds": time.perf_counter() - begin,
    }


def bits_per_byte(trainer: Trainer, prepared: PreparedData, max_windows: int | None) -> float:
    """Of the validation text of all sources, or, from so many windows of each, about that."""
    bits, num_bytes, config = 0.0, 0, trainer.config
    for data in validation_sets(prepared, config.data):
        found = evaluate(
            trainer.model,
            data,
            rank=0,
            world_size=1,
            batch_size=EVAL_BATCH,
            precision=config.train.precision,
            device=trainer.runtime.device,
            max_windows=max_windows,
        )
        part = min(1.0, (max_windows or data.num_windows) / data.num_windows)
        bits += found.loss * found.num_tokens / math.log(2) / part
        num_bytes += data.utf8_bytes
    return bits / num_bytes


def train_missing(
    variants: Sequence[Variant],
    prepared: PreparedData,
    place: runtime.Runtime,
    store: Path,
    arguments: argparse.Namespace,
) -> None:
    """Trains what has no line yet, seed after seed, as long as the time lasts."""
    done = read_lines(store)
    part, parts = map(int, arguments.share.split("/"))
    wanted = [(variant, seed) for seed in range(arguments.seeds) for variant in variants][part - 1 :: parts]
    missing = [
        (v, s) for v, s in wanted if ("run", run_key(v.with_seed(s), prepared.fingerprint)) not in done
    ]
    begin = time.monotonic()
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there already", file=sys.stderr)
    with progress() as bar:
        task = bar.add_task("training", total=sum(v.config.train.steps for v, _ in missing))
        for count, (variant, seed) in enumerate(missing):
            if time.monotonic() - begin > 60 * arguments.minutes:
                bar.console.print(
                    f"{arguments.minutes:g} minutes are over; the same command trains the other {len(missing) - count}"
                )
                return
            bar.update(task, description=f"{variant.name}, seed {seed}")
            config = variant.with_seed(seed)
            result = train_once(
                config,
                prepared,
                place,
                log_every=arguments.log_every,
                max_windows=EVAL_BATCH if arguments.quick else None,
                tick=partial(bar.advance, task),
            )
            line = {"part": "run", "key": run_key(config, prepared.fingerprint), "variant": variant.name}
            append_line(store, {**line, "seed": seed, **result, **_origin(place)})
            spent = time.monotonic() - begin
            bar.console.print(
                f"{count + 1} of {len(missing)}: {variant.name}, seed {seed}: {result['bits_per_byte']:.4f} bits per "
                f"byte, {result['train_seconds']:.0f} + {result['validation_seconds']:.0f} s, about "
                f"{spent / (count + 1) * (len(missing) - count - 1) / 60:.0f} min to go"
            )


def measure_speed(
    variants: Sequence[Variant],
    prepared: PreparedData,
    place: runtime.Runtime,
    store: Path,
    arguments: argparse.Namespace,
) -> None:
    """Times one step of every model in turn; a line for each, which replaces an older one."""
    trainers = {v.name: make_trainer(v.config, place, prepared) for v in variants}
    steps = {name: partial(timed_step, trainer) for name, trainer in trainers.items()}
    with progress() as bar:
        task = bar.add_task("a step of each", total=WARM_UP_STEPS + arguments.rounds)
        interleave(steps, WARM_UP_STEPS, tick=partial(bar.advance, task))
        samples = interleave(steps, arguments.rounds, tick=partial(bar.advance, task))
    for variant in variants:
        seconds = samples[variant.name]
        line = {
            "part": "speed",
            "key": run_key(variant.config, prepared.fingerprint),
            "variant": variant.name,
            "rounds": arguments.rounds,
            "step_s": spread(seconds),
            "speed_of_dense": paired(samples[DENSE], seconds),
            **_origin(place),
        }
        append_line(store, line)


def _origin(place: runtime.Runtime) -> dict[str, Any]:
    facts = where(place.device)
    return {key: facts[key] for key in ORIGIN}


# ------------------------------------------------------------------------------------------- command line
def main() -> None:
    """Trains, measures, reports."""
    parser = arguments_parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--train", action="store_true", help="train what has not been trained yet")
    parser.add_argument("--speed", action="store_true", help="measure the time of a step")
    parser.add_argument("--steps", type=int, default=90, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--log-every", type=int, default=9, help="steps that share a point of the curve")
    parser.add_argument(
        "--share", default="1/1", help="2/3: the second third, for processes that share the work"
    )
    parser.add_argument("--minutes", type=float, default=45.0, help="no further run is begun after these")
    parser.add_argument("--rounds", type=int, default=45, help="timed steps of each model")
    arguments = parser.parse_args()
    if not (arguments.train or arguments.speed):
        arguments.quick = True
    base = load_config(arguments.config)
    if arguments.quick:
        base = tiny(base, 1)
        arguments.train = arguments.speed = True
        arguments.steps, arguments.seeds, arguments.log_every, arguments.rounds = 4, 1, 2, 2
    place = runtime.start(arguments.device, 600.0)
    if arguments.threads:  # not before: joining decides how many there are
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        compare(shortened(base, arguments.steps), place, Path(scratch), arguments)
    runtime.stop(place)


def shortened(base: Config, steps: int) -> Config:
    """The same run with so many steps, of which the same part warms up."""
    warm_up = round(base.optimizer.warmup_steps * steps / base.train.steps)
    train = base.train.model_copy(update={"steps": steps})
    optimizer = base.optimizer.model_copy(update={"warmup_steps": warm_up})
    return base.model_copy(update={"train": train, "optimizer": optimizer})


def compare(base: Config, place: runtime.Runtime, scratch: Path, arguments: argparse.Namespace) -> None:
    """Does the parts that were asked for, then reports all there is."""
    prepared = prepare(base.data)
    variants = make_variants(base, prepared)
    folder = scratch if arguments.quick else RESULTS
    store = arguments.out or folder / f"routers-{machine(place.device)}.json"
    store = store.with_suffix(".jsonl")
    if arguments.train:
        train_missing(variants, prepared, place, store, arguments)
    if arguments.speed:
        measure_speed(variants, prepared, place, store, arguments)
    tokens_per_step = base.train.global_batch_size * base.data.seq_len
    rows = make_rows(variants, read_lines(store), prepared, range(arguments.seeds), tokens_per_step)
    facts = where(place.device)
    shown = f"{base.train.steps} steps of {tokens_per_step} tokens"
    print(report(rows, shown))
    print(f"\n{describe(variants)}")
    result = {"steps": base.train.steps, "tokens_per_step": tokens_per_step, "rows": rows, **facts}
    write_results("routers", result, picture(rows, shown, facts), device=place.device, arguments=arguments)


if __name__ == "__main__":
    main()
