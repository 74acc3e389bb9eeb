"""Whether the proof would notice: every known fault is planted once."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from epmoe.errors import CheckpointError
from epmoe.verify.cases import PLAIN, Cell, Plan, Scenario, deepspeed_cells, problem, usable_cells
from epmoe.verify.faults import FAULTS, Fault
from epmoe.verify.proof import prove
from epmoe.verify.small_config import Subject
from epmoe.verify.subjobs import Ranks
from epmoe.verify.verdict import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What became of a fault. The same on every rank."""

    fault: str
    consequence: str
    caught_by: list[str]
    """Items of the proof."""
    first: Json | None
    """The first violation."""
    absent: str | None
    """Why it cannot happen here; None: it was planted."""

    @property
    def missed(self) -> bool:
        """Planted, and nothing was wrong."""
        return self.absent is None and not self.caught_by


def subject_for_faults(subject: Subject) -> Subject:
    """The smallest world of several ranks: everything that goes wrong does so there."""
    size = next(n for n in range(2, subject.world_size + 1) if subject.world_size % n == 0)
    return replace(subject, world_size=size)


def plan_for_faults(subject: Subject) -> Plan:
    """A few cells that together touch every item: plain ones, one of every other engine, one with everything that is
    not plain. In float64, but for DeepSpeed's."""
    size = subject.world_size
    ep_size = math.gcd(size, subject.num_experts)
    wanted: tuple[tuple[int, int, Scenario], ...] = (
        (1, 2, "parity"),
        (ep_size, 1, "parity"),
        (1, 1, "one_token"),
        (ep_size, 1, "balance"),
        (ep_size, 2, "task_only"),
    )
    cells: list[Cell] = []
    for ep, accumulation, scenario in wanted:
        cell = usable_cells(subject, size, ep, scenario)[0]
        if problem(subject, cell) is None:
            cells.append(replace(cell, accumulation=accumulation))
    by_engine: dict[object, list[Cell]] = {}
    for cell in usable_cells(subject, size, ep_size):
        by_engine.setdefault(cell.engine, []).append(cell)
    cells.append(by_engine.pop(PLAIN["parallel.engine"])[-1])
    cells += [plainest for plainest, *_ in by_engine.values()]
    cells += [cell for cell in deepspeed_cells(subject, size, ep_size)[-1:] if problem(subject, cell) is None]
    return Plan(cells=tuple(cells), num_possible=len(cells), left_out={})


def self_test(ranks: Ranks, subject: Subject, say: Callable[[Trial], None]) -> list[Trial]:
    """Plants every fault in turn. A collective of all ranks.

    Args:
        subject: From ``subject_for_faults``.
        say: Told of every trial.

    Returns:
        The trials; the first is the code as it is, caught by nothing if all is well.
    """
    plan = plan_for_faults(subject)
    largest_ep = math.gcd(subject.world_size, subject.num_experts)
    trials = []
    for fault in (None, *FAULTS):
        absent = None if fault is None else fault.absent(subject, largest_ep)
        trials.append(_try(fault, absent, ranks, subject, plan))
        say(trials[-1])
        if fault is None and trials[0].caught_by:
            break  # what is wrong anyway says nothing about the faults
    return trials


def _try(fault: Fault | None, absent: str | None, ranks: Ranks, subject: Subject, plan: Plan) -> Trial:
    items: list[str] = []
    first: Json | None = None
    if absent is None:
        try:
            with fault.plant() if fault is not None else nullcontext():
                verdict = prove(ranks, subject, plan, lambda *_: None, shared=None)
            items, first = verdict.items, next(iter(verdict.violations), None)
        except CheckpointError as error:  # any other error means that the proof itself broke down
            items = [f"an error: {error.what}"]
    return Trial(
        fault=fault.name if fault else "the code as it is",
        consequence=fault.consequence if fault else "",
        caught_by=items,
        first=first,
        absent=absent,
    )
