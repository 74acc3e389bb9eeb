"""A checkpoint written in one layout continues in every other: bits, gradients and the order of the data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from epmoe.checkpoint.manifest import TrainingRecord
from epmoe.checkpoint.store import load_checkpoint, save_checkpoint, verify_checkpoint
from epmoe.config import Config
from epmoe.engines.protocol import ParameterRows
from epmoe.parallel.mesh import ExpertMesh
from epmoe.process.runtime import Runtime, gather_text
from epmoe.train.trainer import Progress, Trainer
from epmoe.verify.cases import Cell, cell_config
from epmoe.verify.compare import Violation, tensor_errors
from epmoe.verify.measure import copy_of, make_trainer, named_parts, samples_for
from epmoe.verify.small_config import Subject

LIMIT = 1e-9
ADAM_LIMIT = 1e-6
"""Of weights after steps of AdamW, which divides tiny gradients by their own size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One process that was never interrupted: the first step, and the second one's gradients."""

    weights: dict[str, ParameterRows]
    """After the first step."""
    next_gradients: dict[str, ParameterRows]
    next_weights: dict[str, ParameterRows]


def adam_trainer(cell: Cell, subject: Subject, place: Runtime, mesh: ExpertMesh, seed: int) -> Trainer:
    """The cell with AdamW, whose moments a checkpoint must carry."""
    config = cell_config(subject, cell)
    adam = config.optimizer.model_copy(update={"name": "adamw", "lr": 0.01})
    config = config.model_copy(update={"optimizer": adam})
    return make_trainer(config, subject, samples_for(subject, cell, seed), place, mesh)


def uninterrupted(cell: Cell, subject: Subject, place: Runtime, mesh: ExpertMesh, seed: int) -> Expected:
    """Two steps of one process."""
    trainer = adam_trainer(cell, subject, place, mesh, seed)
    trainer.step()
    weights = _copies(named_parts(trainer, trainer.engine.weights()))
    trainer.step()
    return Expected(
        weights=weights,
        next_gradients=_copies(trainer.engine.gradients()),
        next_weights=_copies(named_parts(trainer, trainer.engine.weights())),
    )


@dataclass(slots=True, kw_only=True)
class Saved:
    """A checkpoint that is read in every layout."""

    cell: Cell
    """That wrote it."""
    path: Path
    tensors: dict[str, ParameterRows]
    """Everything in it: this rank's part, until one process has read the whole."""
    expected: Expected | None = None
    """Of those that go on from it; None = only bits and the order of the data are compared."""


def write(cell: Cell, subject: Subject, place: Runtime, mesh: ExpertMesh, seed: int, folder: Path) -> Saved:
    """One step, then a checkpoint. A collective."""
    trainer = adam_trainer(cell, subject, place, mesh, seed)
    trainer.step()
    path = save_checkpoint(
        folder,
        model=trainer.model,
        engine=trainer.engine,
        mesh=mesh,
        record=_record(trainer.progress, trainer.config),
        keep=1,
    )
    return Saved(cell=cell, path=path, tensors=_copies(everything(trainer)))


def everything(trainer: Trainer) -> dict[str, ParameterRows]:
    """Weights and optimizer state."""
    return named_parts(trainer, {**trainer.engine.weights(), **trainer.engine.state()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A layout that went on from the checkpoint."""

    tensors: dict[str, ParameterRows]
    """Right after loading."""
    violations: list[Violation]


def resume_in(
    cell: Cell, subject: Subject, place: Runtime, mesh: ExpertMesh, seed: int, saved: Saved
) -> Loaded:
    """Loads in this layout and takes the second step, unless nothing is expected of it. A collective."""
    trainer = adam_trainer(cell, subject, place, mesh, seed)
    checked = verify_checkpoint(saved.path)
    record = load_checkpoint(checked, model=trainer.model, engine=trainer.engine, mesh=mesh)
    trainer.progress = Progress(step=record.step, samples=record.samples, tokens=record.tokens)
    tensors = _copies(everything(trainer))
    violations = [*_order_violations(cell, trainer)]
    if saved.expected is not None:
        violations += _continuation(cell, trainer, tensors, saved.expected)
    return Loaded(tensors=tensors, violations=violations)


def _continuation(
    cell: Cell, trainer: Trainer, tensors: Mapping[str, ParameterRows], expected: Expected
) -> Iterator[Violation]:
    """What was loaded, and the step that follows."""
    weights = {name: part for name, part in tensors.items() if name in expected.weights}
    yield from _errors(cell, "weight after a step of AdamW", weights, expected.weights, ADAM_LIMIT)
    trainer.step()
    gradients, what = trainer.engine.gradients(), "gradient of the step after loading"
    yield from _errors(cell, what, gradients, expected.next_gradients, LIMIT)
    after, what = named_parts(trainer, trainer.engine.weights()), "weight after the step after loading"
    yield from _errors(cell, what, after, expected.next_weights, ADAM_LIMIT)


def bit_violations(
    cell: Cell, got: Mapping[str, ParameterRows], whole: Mapping[str, ParameterRows]
) -> Iterator[Violation]:
    """Whether this rank's tensors are the same bits as their rows of the whole ones."""
    for name, part in whole.items():
        mine = got.get(name)
        rows = part.local
        if mine is not None and mine.local.ndim and mine.local.shape != rows.shape:
            rows = rows[mine.first_row : mine.first_row + mine.local.shape[0]]
        if mine is None or not torch.equal(mine.local, rows):
            yield Violation(
                item="resize",
                where=cell.label,
                what="a checkpoint loaded in this layout has other bits than in another one",
                tensor=name,
                meaning="experts or moments were lost, mixed up or rounded on the way through the checkpoint",
            )
            return


def _order_violations(cell: Cell, trainer: Trainer) -> Iterator[Violation]:
    mine = [number for micro in range(trainer.num_micro) for number in trainer.sample_numbers(micro)]
    numbers = sorted(number for text in gather_text(json.dumps(mine)) for number in json.loads(text))
    size = trainer.config.train.global_batch_size
    if numbers != list(range(size, 2 * size)):
        what = f"after loading the ranks read samples {numbers}, not {size} to {2 * size - 1}, each once"
        yield Violation(item="resize", where=cell.label, what=what)


def _errors(
    cell: Cell, name: str, got: Mapping[str, ParameterRows], wanted: Mapping[str, ParameterRows], limit: float
) -> Iterator[Violation]:
    wrong = next((error for error in tensor_errors(got, wanted) if not error.error <= limit), None)
    if wrong is not None:
        what = f"{name} is off by {wrong.error:.2e} (limit {limit:g})"
        yield Violation(item="resize", where=cell.label, what=what, tensor=wrong.name)


def _copies(parts: Mapping[str, ParameterRows]) -> dict[str, ParameterRows]:
    return {name: copy_of(part) for name, part in parts.items()}


def _record(progress: Progress, config: Config) -> TrainingRecord:
    return TrainingRecord(
        step=progress.step,
        tokens=progress.tokens,
        samples=progress.samples,
        config=config.model_dump(mode="json"),
        data_fingerprint="made up",
        tokenizer_hash="none",
        trainer={},
    )
