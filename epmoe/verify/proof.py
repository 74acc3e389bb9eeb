"""The proof on one rank: references, cells of every world size, checkpoints; and what all ranks found together."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from epmoe.parallel.mesh import ExpertMesh, build_mesh
from epmoe.process.runtime import Runtime, gather_text, require_equal
from epmoe.verify.cases import Cell, Plan, cell_config, deepspeed_cells, layouts, reference_of, usable_cells
from epmoe.verify.checkpoint_resize import Saved, bit_violations, resume_in, uninterrupted, write
from epmoe.verify.compare import Comparison, Violation, compare
from epmoe.verify.measure import Measurement, measure
from epmoe.verify.router_checks import router_violations
from epmoe.verify.small_config import Subject
from epmoe.verify.subjobs import Ranks, world
from epmoe.verify.verdict import Verdict, agree

MARGIN = 1e-4
"""Routers decide more clearly than this, so that float32 and float64 route alike."""
SEEDS = 20
"""So many are tried,"""
FEW_TOKENS = 4096
"""unless a step has more tokens than this, of which some will always be near a tie."""
Progress = Callable[[str, float, bool], None]
"""Told of everything that is done: its name, its seconds, and whether this rank found nothing wrong."""


@dataclass(slots=True, kw_only=True)
class Proof:
    """What one rank collects."""

    seed: int = 0
    margin: float = 0.0
    references: dict[Cell, Measurement] = field(default_factory=dict)
    checkpoints: dict[str, Saved] = field(default_factory=dict)
    """By precision."""
    comparisons: list[Comparison] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    """Of everything that is not a cell."""
    notes: list[str] = field(default_factory=list)


def prove(ranks: Ranks, subject: Subject, plan: Plan, progress: Progress, *, shared: Path | None) -> Verdict:
    """Runs a plan. A collective of all ranks.

    Args:
        shared: A folder that all ranks see, for a checkpoint in a folder of its own; None = the machine's for
            temporary files.

    Returns:
        What all ranks found, the same on every rank.
    """
    with ExitStack() as stack:
        return _prove(ranks, subject, plan, progress, lambda: stack.enter_context(_temporary(shared)))


def _temporary(shared: Path | None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=".verify-", dir=shared, ignore_cleanup_errors=True)


def _prove(
    ranks: Ranks, subject: Subject, plan: Plan, progress: Progress, make_folder: Callable[[], str]
) -> Verdict:
    started = time.monotonic()
    proof = Proof()
    alone = replace(reference_of(subject, plan.cells[0]), accumulation=1, precision="fp64", scenario="parity")
    with world(ranks, 1) as place:
        mesh = build_mesh(place, 1)  # what is plain needs no exchange
        cells = _choose_data(proof, subject, place, mesh, plan.cells)
        for wanted in dict.fromkeys(reference_of(subject, cell) for cell in cells):
            begun = time.monotonic()
            proof.references[wanted] = measure(wanted, subject, place, mesh, seed=proof.seed)
            progress(f"reference {wanted.label}", time.monotonic() - begun, True)
        proof.violations += router_violations(proof.references)
        expected = None
        if reference_of(subject, replace(alone, world_size=subject.world_size)).accumulation == 1:
            expected = uninterrupted(alone, subject, place, mesh, proof.seed)
        else:
            proof.notes.append(
                "a capacity or loss looks at each rank's micro-batch: what a resize does to gradients "
                "is meant, so only bits and the order of the data are compared"
            )
    if not any(cell.engine == "deepspeed" for cell in cells):
        reason = f": {subject.no_deepspeed}" if subject.no_deepspeed else ""
        proof.notes.append(f"nothing is said of engine: deepspeed, of which no cell was run{reason}")
    with world(ranks, subject.world_size) as place:
        require_equal("choice of data", str(proof.seed))
        for cell in resize_cells(subject, *max(layouts(subject)), cells):
            folder = Path(gather_text(make_folder() if place.rank == 0 else "")[0])
            mesh = mesh_of(cell, subject, place, {})
            proof.checkpoints[cell.precision] = write(cell, subject, place, mesh, proof.seed, folder)
    with world(ranks, 1) as place:
        mesh = build_mesh(place, 1)
        for precision, saved in proof.checkpoints.items():
            one = replace(alone, precision=saved.cell.precision)
            saved.expected = expected if precision == "fp64" else None
            whole = resume_in(one, subject, place, mesh, proof.seed, saved)
            proof.violations += [*whole.violations, *bit_violations(saved.cell, saved.tensors, whole.tensors)]
            saved.tensors = whole.tensors
    sizes = sorted({world_size for world_size, _ in layouts(subject)})
    for size in sizes:
        with world(ranks, size) as place:
            meshes: dict[str, ExpertMesh] = {}
            for cell in (cell for cell in cells if cell.world_size == size):
                begun = time.monotonic()
                mesh = mesh_of(cell, subject, place, meshes)
                got = measure(cell, subject, place, mesh, seed=proof.seed)
                comparison = compare(cell, got, proof.references[reference_of(subject, cell)])
                proof.comparisons.append(comparison)
                progress(cell.label, time.monotonic() - begun, not comparison.violations)
            for world_size, ep_size in layouts(subject):
                if world_size == size > 1:
                    for cell in resize_cells(subject, size, ep_size, cells):
                        mesh = mesh_of(cell, subject, place, meshes)
                        _read(proof, cell, subject, place, mesh, progress)
            if size == sizes[-1]:
                return agree(
                    proof.comparisons,
                    proof.violations,
                    notes=proof.notes,
                    seed=proof.seed,
                    margin=proof.margin,
                    seconds=time.monotonic() - started,
                )
    raise AssertionError("there is no world")


def _read(
    proof: Proof, cell: Cell, subject: Subject, place: Runtime, mesh: ExpertMesh, progress: Progress
) -> None:
    """Continues from the checkpoint of a cell's precision."""
    begun, saved = time.monotonic(), proof.checkpoints[cell.precision]
    loaded = resume_in(cell, subject, place, mesh, proof.seed, saved)
    found = [*loaded.violations, *bit_violations(cell, loaded.tensors, saved.tensors)]
    proof.violations += found
    source = (saved.cell.world_size, saved.cell.ep_size)
    progress(f"resize {source} -> {cell.label}", time.monotonic() - begun, not found)


def mesh_of(cell: Cell, subject: Subject, place: Runtime, made: dict[str, ExpertMesh]) -> ExpertMesh:
    """The groups of a cell, made once for all cells of a world with the same. A collective."""
    parallel = cell_config(subject, cell).parallel
    key = parallel.model_dump_json()
    if key not in made:
        made[key] = build_mesh(place, cell.ep_size, parallel)
    return made[key]


def resize_cells(subject: Subject, world_size: int, ep_size: int, cells: Sequence[Cell]) -> list[Cell]:
    """How a layout writes or reads checkpoints: one in float64, where engines take turns over the layouts; and one in
    float32 by DeepSpeed, where its stages do, if it is among the cells."""
    by_engine = {cell.engine: cell for cell in reversed(usable_cells(subject, world_size, ep_size))}
    engines = sorted(by_engine, key=str, reverse=True)
    number = layouts(subject).index((world_size, ep_size))
    chosen = [by_engine[engines[number % len(engines)]]]
    if any(cell.engine == "deepspeed" for cell in cells):
        stages = deepspeed_cells(subject, world_size, ep_size)
        chosen.append(stages[number % len(stages)])
    return chosen


def _choose_data(
    proof: Proof, subject: Subject, place: Runtime, mesh: ExpertMesh, cells: Sequence[Cell]
) -> list[Cell]:
    """Sets the seed of data on which routers decide clearly -> the cells that can be compared with it."""
    single = [cell for cell in cells if cell.precision == "fp32"]
    kinds = list({cell.scenario: cell for cell in single}.values())
    train, data = subject.config.train, subject.config.data
    tries = SEEDS if train.global_batch_size * data.seq_len <= FEW_TOKENS else 1
    for seed in range(tries if single else 0):
        proof.seed = seed
        pairs = [
            [measure(one, subject, place, mesh, seed=seed, margins=True) for one in _pair(subject, cell)]
            for cell in kinds
        ]
        proof.margin = min(found.margin for pair in pairs for found in pair)
        if proof.margin > MARGIN and all(
            (narrow.demand, narrow.kept) == (wide.demand, wide.kept) for narrow, wide in pairs
        ):
            return list(cells)
    if not single:
        return list(cells)
    proof.notes.append(
        f"{len(single)} float32 cells are left out: some token is nearer to a tie ({proof.margin:.1e}) than "
        f"{MARGIN:g}, so float32 and float64 may route it to different experts"
    )
    return [cell for cell in cells if cell.precision != "fp32"]


def _pair(subject: Subject, cell: Cell) -> tuple[Cell, Cell]:
    """A float32 cell's reference, and the same in float64."""
    narrow = reference_of(subject, cell)
    return narrow, replace(narrow, precision="fp64")
