"""The verdict for people and for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from epmoe import env
from epmoe.verify.cases import Plan
from epmoe.verify.compare import ITEMS
from epmoe.verify.self_test import Trial
from epmoe.verify.small_config import Subject
from epmoe.verify.verdict import Json, Verdict

WIDTH = 200
"""Of tables that do not go to a terminal."""
SHORT = {
    "all_reduce": "R",
    "all_gather": "G",
    "all_gather_into_tensor": "G",
    "all_gather_single": "G",
    "reduce_scatter_tensor": "S",
    "reduce_scatter_single": "S",
    "all_to_all_single": "A",
    "broadcast": "B",
    "batch_isend_irecv": "P",
}
LEGEND = (
    "micro: micro-batches of a step; calls: of a micro-batch + at the end of a step; A all-to-all, R all-reduce, "
    "G all-gather, S reduce-scatter"
)
UNNAMED = ("blocks.", "attention.", "_proj", "moe.", "experts.", "ffn.", ".weight")
"""Left out of names in the table; the JSON has them in full."""


def console() -> Console:
    """Standard output, wide enough for a table wherever it goes."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, soft_wrap=True)


def describe_plan(subject: Subject, plan: Plan, ranks: str) -> str:
    """What will be run, and what will not."""
    lines = [f"verify: {ranks}; {len(plan.cells)} cells of {plan.num_possible} in the whole matrix (--full)"]
    lines += [f"  changed: {change}" for change in subject.changes]
    lines += [f"  left out: {count} x {reason}" for reason, count in plan.left_out.items()]
    return "\n".join(lines)


def print_verdict(verdict: Verdict) -> None:
    """A table of the cells, then the items, then everything that is wrong."""
    out = console()
    table = Table(title="cells, worst of all ranks", title_justify="left")
    table.caption, table.caption_justify = LEGEND, "left"
    names = ("ranks,ep", "how", "dtype", "scenario", "loss", "dense gradient", "expert gradient", "norm", "clip",
             "weights", "calls")  # fmt: skip
    for name in names:
        table.add_column(name, no_wrap=True)
    for row in verdict.rows:
        table.add_row(*_columns(row), style=None if row["ok"] else "red")
    out.print(table)
    for item, text in ITEMS.items():
        wrong = sum(violation["item"] == item for violation in verdict.violations)
        word = "WRONG" if wrong else "ok" if item in verdict.tested else "none"
        out.print(f"  {word:5}  {item}: {text}" + (f" ({wrong})" if wrong else ""))
    for note in verdict.notes:
        out.print(f"  note: {note}")
    for violation in verdict.violations[:20]:
        out.print(describe_violation(violation))
    if len(verdict.violations) > 20:
        out.print(f"... and {len(verdict.violations) - 20} more; --json FILE has all of them")


def describe_violation(violation: Mapping[str, Any]) -> str:
    """What, where, which tensor, and what it means."""
    tensor = f"{violation['tensor']}: " if violation["tensor"] else ""
    lines = [f"{violation['item']}: {tensor}{violation['what']}", f"  in {violation['where']}"]
    if violation["meaning"]:
        lines.append(f"  meaning: {violation['meaning']}")
    return "\n".join(lines)


def _columns(row: Json) -> list[str]:
    calls = f"{_calls(row['micro_collectives'][0])} + {_calls(row['end_collectives'])}"
    return [
        f"{row['world_size']},{row['ep_size']}",
        row["how"].replace("overlap_", "")
        + (f", micro {row['accumulation']}" if row["accumulation"] > 1 else ""),
        row["precision"],
        row["scenario"],
        f"{row['loss_error']:.0e}",
        _error(row["dense"]),
        _error(row["expert"]),
        "same" if row["norm_equal"] else "DIFFERS",
        "same" if row["clip_equal"] else "DIFFERS",
        f"{row['weights']['error']:.0e}",
        calls,
    ]


def _error(error: Json | None) -> str:
    if error is None:
        return "none"
    name = error["name"]
    for part in UNNAMED:
        name = name.replace(part, "")
    return f"{error['error']:.0e} {name}"


def _calls(counts: Mapping[str, int]) -> str:
    return " ".join(f"{number}{SHORT[name]}" for name, number in counts.items() if number) or "0"


def print_trials(trials: Sequence[Trial], seconds: float) -> None:
    """A table of the planted faults and what noticed them."""
    out = console()
    table = Table(title="planted faults", title_justify="left")
    for name in ("fault", "what it would do to a run", "noticed by", "first sign"):
        table.add_column(name, overflow="fold")
    planted = [trial for trial in trials[1:] if trial.absent is None]
    for trial in trials[1:]:
        noticed = trial.absent or ", ".join(trial.caught_by) or "NOTHING"
        first = trial.first or {"tensor": None, "what": "", "meaning": None}
        sign = first["meaning"] or first["what"]
        table.add_row(trial.fault, trial.consequence, noticed, sign, style="red" if trial.missed else None)
    out.print(table)
    caught = sum(not trial.missed for trial in planted)
    out.print(f"{caught} of {len(planted)} planted faults noticed, in {seconds:.0f} s")


def write_json(path: Path, subject: Subject, plan: Plan, verdict: Verdict) -> None:
    """Everything that is known, as one object."""
    found = asdict(verdict)
    report = {
        "ok": not verdict.violations,
        "ranks": subject.world_size,
        "changes": subject.changes,
        "cells_possible": plan.num_possible,
        "left_out": plan.left_out,
        "config": env.masked(subject.config.model_dump(mode="json")),
        **found,
    }
    path.write_text(json.dumps(_finite(report), indent=2, allow_nan=False), encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become text."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
