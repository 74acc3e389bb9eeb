"""What all ranks found together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from epmoe.process.runtime import gather_text
from epmoe.verify.compare import ITEM_OF, Comparison, Violation, item_of

Json = dict[str, Any]
ABOUT = {**ITEM_OF, "task_only": "liveness"}
"""Scenario -> the item it is there for, also where activations are recomputed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The same on every rank."""

    rows: tuple[Json, ...]
    """One per cell: the cell's fields, worst errors of all ranks, what was equal on all of them, collectives."""
    violations: tuple[Json, ...]
    """Fields of ``Violation`` and the ranks that saw it."""
    notes: tuple[str, ...]
    seed: int
    margin: float
    seconds: float

    @property
    def tested(self) -> set[str]:
        """Items about which there was something to test."""
        always = {"norm", "resize", "collectives"}
        scenarios = {row["scenario"] for row in self.rows}
        about = {item for scenario, item in ABOUT.items() if scenario in scenarios}
        return always | about | {row["item"] for row in self.rows}

    @property
    def items(self) -> list[str]:
        """Items with a violation, each once."""
        return list(dict.fromkeys(violation["item"] for violation in self.violations))


def agree(
    comparisons: Sequence[Comparison],
    violations: Sequence[Violation],
    *,
    notes: Sequence[str],
    seed: int,
    margin: float,
    seconds: float,
) -> Verdict:
    """Every rank's findings put together. A collective of all ranks."""
    mine = {"cells": [_row(one) for one in comparisons], "violations": [asdict(one) for one in violations]}
    found = [json.loads(text) for text in gather_text(json.dumps(mine))]
    rows = [_together(rows) for rows in zip(*(rank["cells"] for rank in found), strict=True)]
    seen = [(rank, one) for rank, part in enumerate(found) for one in _all_violations(part)]
    seen += [(0, one) for one in _between_ranks(rows)] + [(0, one) for one in _between_cells(rows)]
    merged: dict[str, Json] = {}
    for rank, one in seen:
        key = json.dumps([one["item"], one["where"], one["tensor"]])
        merged.setdefault(key, {**one, "ranks": []})["ranks"].append(rank)
    return Verdict(
        rows=tuple(rows),
        violations=tuple(merged.values()),
        notes=tuple(notes),
        seed=seed,
        margin=margin,
        seconds=seconds,
    )


def _row(one: Comparison) -> Json:
    row = asdict(one)
    cell = row.pop("cell")
    return {
        **cell,
        "settings": dict(one.cell.settings),
        "how": one.cell.how,
        "item": item_of(one.cell),
        "label": one.cell.label,
        **row,
    }


def _all_violations(part: Json) -> Iterator[Json]:
    for row in part["cells"]:
        yield from row["violations"]
    yield from part["violations"]


def _together(ranks: Sequence[Json]) -> Json:
    """One row from those of all ranks."""
    first = dict(ranks[0])
    for name in ("dense", "expert", "weights"):
        errors = [rank[name] for rank in ranks if rank[name] is not None]
        first[name] = max(errors, key=lambda error: float(error["error"]), default=None)
    first["loss_error"] = max(rank["loss_error"] for rank in ranks)
    first["norm_equal"] = all(rank["norms"] == first["norms"] for rank in ranks)
    first["clip_equal"] = all(rank["clips"] == first["clips"] for rank in ranks)
    first["collectives_equal"] = all(
        rank[name] == first[name] for rank in ranks for name in ("micro_collectives", "end_collectives")
    )
    first["norms"] = [float.fromhex(value) for value in first["norms"]]
    first["clips"] = [float.fromhex(value) for value in first["clips"]]
    first["ok"] = not any(rank["violations"] for rank in ranks)
    del first["violations"]
    return first


def _between_ranks(rows: Sequence[Json]) -> Iterator[Json]:
    reasons = {
        "norm_equal": ("norm", "the gradient norm is not the same bits on all ranks"),
        "clip_equal": ("norm", "the clip coefficient is not the same bits on all ranks"),
        "collectives_equal": ("collectives", "the ranks do not call the same collectives"),
    }
    for row in rows:
        for name, (item, what) in reasons.items():
            if not row[name]:
                row["ok"] = False
                yield asdict(Violation(item=item, where=row["label"], what=what))


def _between_cells(rows: Sequence[Json]) -> Iterator[Json]:
    """Accumulation must not change what a micro-batch, or the end of a step, costs."""
    seen: dict[str, Json] = {}
    for row in rows:
        key = json.dumps([row["world_size"], row["ep_size"], row["settings"], row["scenario"] == "overflow"])
        other = seen.setdefault(key, row)
        for name in ("micro_collectives", "end_collectives"):
            mine, theirs = (_first(one[name]) for one in (row, other))
            if mine != theirs and row["ok"] and row["scenario"] == other["scenario"]:
                row["ok"] = False
                what = f"{name.removesuffix('_collectives')} collectives {mine} with accumulation "
                what += f"{row['accumulation']}, {theirs} with {other['accumulation']}"
                yield asdict(Violation(item="collectives", where=row["label"], what=what))


def _first(collectives: Any) -> Any:
    return collectives[0] if isinstance(collectives, list) else collectives
