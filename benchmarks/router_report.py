"""What ``bench_routers.py`` found: the file of results, and table and picture of all that is in it."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Spread, plain, table
from plot import Line, Panel, line_chart
from router_variants import DENSE, Variant, run_key

from epmoe.data.prepared import PreparedData
from epmoe.models.sizes import count_parameters

Lines = dict[tuple[str, str], dict[str, Any]]
"""Results by part (``run`` or ``speed``) and key."""
HEALTH = ("drop_rate", "overflow_rate", "busiest_share", "dead_experts", "entropy")
HEADERS = (
    "model", "K x width", "parameters", "MFLOP/token", "bits per byte", "against dense", "dropped assignments",
    "tokens without expert", "busiest expert", "dead", "entropy", "tokens/s", "of dense",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------- store
def append_line(store: Path, line: Mapping[str, Any]) -> None:
    """Adds one result to the file; it is on the disk when this returns."""
    store.parent.mkdir(parents=True, exist_ok=True)
    torn = store.is_file() and not store.read_bytes().endswith(b"\n")
    with store.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line, default=plain) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(store: Path) -> Lines:
    """All results of a file, the last one of every key; a line that was torn by a crash counts as missing."""
    found: Lines = {}
    for text in store.read_text(encoding="utf-8").splitlines() if store.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[line["part"], line["key"]] = line
    return found


# --------------------------------------------------------------------------------------------------- rows
def make_rows(
    variants: Sequence[Variant],
    lines: Lines,
    prepared: PreparedData,
    seeds: Sequence[int],
    tokens_per_step: int,
) -> list[dict[str, Any]]:
    """What is known of every model, in the order of the variants; None and empty lists where nothing is yet."""

    def found(part: str, variant: Variant, seed: int) -> dict[str, Any] | None:
        return lines.get((part, run_key(variant.with_seed(seed), prepared.fingerprint)))

    def runs_of(variant: Variant) -> dict[int, dict[str, Any]]:
        runs = {seed: found("run", variant, seed) for seed in seeds}
        return {seed: run for seed, run in runs.items() if run is not None}

    dense, rows = runs_of(variants[0]), []
    for variant in variants:
        runs, speed = runs_of(variant), found("speed", variant, variant.config.seed)
        model, moe = variant.config.model, variant.config.moe
        bits = {seed: run["bits_per_byte"] for seed, run in runs.items()}
        step_s = speed and Spread(**speed["step_s"])
        rows.append(
            {
                "model": variant.name,
                "experts": variant.experts,
                "why": variant.why,
                "moe": None if moe is None else moe.model_dump(mode="json"),
                "parameters": count_parameters(model, moe, prepared.padded_vocab_size).total,
                "mflop_per_token": variant.flops / 1e6,
                "flops_of_dense": variant.flops / variants[0].flops,
                "bits_per_byte": bits,
                "against_dense": {s: b - dense[s]["bits_per_byte"] for s, b in bits.items() if s in dense},
                **{name: mean([run[name] for run in runs.values()]) for name in HEALTH},
                "curve": mean_curve([run["curve"] for run in runs.values()]),
                "trained": origins(runs.values()),
                "timed": origins([speed] if speed else []),
                "step_s": step_s,
                "tokens_per_second": step_s and tokens_per_step / step_s.median,
                "speed_of_dense": speed and Spread(**speed["speed_of_dense"]),
            }
        )
    return rows


def origins(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The different commits and numbers of threads that results come from."""
    found = {(line["commit"], line["threads_per_rank"]) for line in lines}
    return [{"commit": commit, "threads": threads} for commit, threads in sorted(found, key=str)]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of all runs; None where a run has no such number, or where there is no run."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Tokens and the mean loss of all runs at each point; runs see equally many tokens up to padding."""
    points = zip(*curves, strict=True)
    return [
        (round(statistics.fmean(t for t, _ in point)), statistics.fmean(v for _, v in point))
        for point in points
    ]


# ----------------------------------------------------------------------------------------- table and picture
def report(rows: Sequence[dict[str, Any]], title: str) -> str:
    """The table; differences whose range over the seeds holds 0 are marked."""
    seeds = max((len(row["bits_per_byte"]) for row in rows), default=0)
    notes = [
        f"{title}. Mean (lowest to highest) of {seeds} seed(s), each against the dense model of the same seed; "
        "~ says that the range holds 0. Drops, busiest expert (of any layer, share of its assignments), experts "
        "without a token (all layers) and entropy (nats) over the last fifth of the steps.",
    ]
    unfinished = [row["model"] for row in rows if len(row["bits_per_byte"]) < seeds or not seeds]
    if unfinished:
        notes.append(f"Not all trained yet: {', '.join(unfinished)}.")
    if any(row["step_s"] is None for row in rows):
        notes.append("Speed is not measured yet: --speed.")
    return f"{table(HEADERS, [_cells(row) for row in rows])}\n\n" + "\n".join(notes)


def _cells(row: dict[str, Any]) -> list[str]:
    against, is_dense = list(row["against_dense"].values()), row["model"] == DENSE
    unsure = against and min(against) <= 0 <= max(against)
    return [
        row["model"],
        row["experts"],
        f"{row['parameters']:,}",
        f"{row['mflop_per_token']:.2f} ({row['flops_of_dense'] - 1:+.1%})",
        _range(list(row["bits_per_byte"].values()), "{:.3f}"),
        "" if is_dense else ("~ " if unsure else "") + _range(against, "{:+.3f}"),
        _number(row["drop_rate"], "{:.1%}") if not is_dense else "",
        _number(row["overflow_rate"], "{:.1%}") if not is_dense else "",
        _number(row["busiest_share"], "{:.1%}"),
        _number(row["dead_experts"], "{:.1f}") if not is_dense else "",
        _number(row["entropy"], "{:.2f}"),
        _number(row["tokens_per_second"], "{:,.0f}"),
        "" if is_dense or row["speed_of_dense"] is None else row["speed_of_dense"].text(digits=2),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    middle, low, high = (form.format(v) for v in (statistics.fmean(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def picture(rows: Sequence[dict[str, Any]], shown: str, facts: Mapping[str, Any]) -> str:
    """Training loss against tokens and, where speed was measured, against seconds."""
    trained = [row for row in rows if row["curve"]]
    by_tokens = [_line(row, row["curve"], 1e-3) for row in trained]
    panels = [Panel(axis="thousand tokens", lines=by_tokens)]
    if all(row["step_s"] is not None for row in trained):
        by_seconds = [_line(row, row["curve"], 1.0 / row["tokens_per_second"]) for row in trained]
        panels.append(Panel(axis="seconds, by the measured time of a step", lines=by_seconds))
    return line_chart(
        "Routers at equal tokens and equal arithmetic per token",
        f"{shown}, {facts['device']}, {facts['threads_per_rank']} threads, torch {facts['versions']['torch']}",
        panels,
        axis="training loss, nats per token",
    )


def _line(row: dict[str, Any], curve: Sequence[tuple[int, float]], factor: float) -> Line:
    return Line(label=row["model"], points=[(t * factor, v) for t, v in curve], base=row["model"] == DENSE)
