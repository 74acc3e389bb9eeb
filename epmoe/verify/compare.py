"""What a rank measured against one process: errors, and what a wrong factor usually means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from epmoe.engines.protocol import ParameterRows
from epmoe.parallel.mesh import is_expert
from epmoe.verify.cases import Cell
from epmoe.verify.measure import KNOWN_NORM, Measurement

GRADIENT_LIMIT = {"fp64": 1e-9, "fp32": 1e-5}
"""Of max|g - ref| / max|ref|, per tensor."""
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Of the largest value of all tensors: below that there is only rounding."""
LOSS_LIMIT = {"fp64": 1e-12, "fp32": 2e-6}
"""Relative."""
ITEMS = {
    "gradients": "gradients, losses and the next step's weights equal one process",
    "norm": "one gradient norm and clip coefficient on all ranks",
    "balance": "auxiliary losses and their router gradient do not depend on the layout, and tell skewed from even",
    "liveness": "the task loss alone trains the router",
    "edge": "ranks without tokens, experts without or with all tokens, capacity overflow everywhere",
    "recompute": "recomputed activations change nothing",
    "resize": "a checkpoint of one layout continues in every other",
    "collectives": "the same collectives on every rank, a fixed number per micro-batch and step",
}
ITEM_OF = {"balance": "balance", "half_empty": "edge", "one_token": "edge", "overflow": "edge"}
"""Scenario -> item; the others are about gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """Something that is not as it must be."""

    item: str
    where: str
    """Label of the cell."""
    what: str
    tensor: str | None = None
    meaning: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """One tensor against its reference."""

    name: str
    error: float
    """max|got - wanted| / max|wanted|; infinite where zeros were wanted and something else is there."""
    factor: float | None
    """got / wanted, where that is one number everywhere."""


def tensor_errors(
    got: Mapping[str, ParameterRows], wanted: Mapping[str, ParameterRows]
) -> Iterator[TensorError]:
    """Every tensor, in the order of the model; one that is missing or has another shape counts as infinitely wrong.

    A tensor so small beside the model's largest that it is nothing but rounding must be as small everywhere.
    """
    largest = max((_size(whole.local) for whole in wanted.values()), default=0.0)
    for name, whole in wanted.items():
        part = got.get(name)
        if part is None or part.shape != whole.shape:
            yield TensorError(name=name, error=math.inf, factor=None)
            continue
        rows = part.local.shape[0] if part.local.ndim else 0
        mine = (
            whole.local[part.first_row : part.first_row + rows]
            if rows != len_of(whole.local)
            else whole.local
        )
        noise = ROUNDING.get(whole.local.dtype, 0.0) * largest
        yield _tensor_error(name, part.local.double(), mine.double(), scale=_size(whole.local), noise=noise)


def len_of(tensor: Tensor) -> int:
    """Rows of dim 0; 0 for a number."""
    return tensor.shape[0] if tensor.ndim else 0


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _tensor_error(name: str, got: Tensor, wanted: Tensor, *, scale: float, noise: float) -> TensorError:
    if not got.numel():  # fewer rows than ranks
        return TensorError(name=name, error=0.0, factor=None)
    difference = _size(got - wanted)
    if scale <= noise or not math.isfinite(difference):
        return TensorError(name=name, error=0.0 if difference <= noise else math.inf, factor=None)
    square = float((wanted * wanted).sum())
    factor = float((got * wanted).sum()) / square if square else None
    if factor is not None and _size(got - factor * wanted) > 1e-4 * abs(factor) * scale:
        factor = None
    return TensorError(name=name, error=difference / scale, factor=factor)


def meaning_of(error: TensorError, cell: Cell) -> str:
    """What a wrong gradient usually comes from."""
    if error.factor is None:
        return "not a common factor: contributions of some ranks or tokens are missing, doubled, or of other weights"
    ep, edp, world = cell.ep_size, cell.world_size // cell.ep_size, cell.world_size
    known = [
        (float(world), f"world size {world}: summed where it was a sum already"),
        (1 / world, f"1 / world size {world}: averaged over all ranks instead of summed"),
        (1 / cell.accumulation, f"1 / {cell.accumulation} micro-batches: averaged over the accumulation"),
        (0.0, "nothing arrived"),
    ]
    if is_expert(error.name):
        known = [
            (float(ep), f"ep_size {ep}: expert gradients were also summed over the expert-parallel group"),
            (
                1 / edp,
                f"1 / edp_size {edp}: expert gradients were averaged over the ranks with the same experts",
            ),
            (1 / ep, f"1 / ep_size {ep}: expert gradients were divided by the ranks that share the experts"),
            (
                float(edp),
                f"edp_size {edp}: expert gradients were summed twice over the ranks with the same experts",
            ),
            *known,
        ]
    close = [text for value, text in known if abs(error.factor - value) <= 1e-3 * max(value, 1e-3)]
    reason = f" = {close[0]}" if close else ": a loss or gradient is weighted or divided by something else"
    return f"{error.factor:.4g}x everywhere{reason}"


# ------------------------------------------------------------------------------------------- one cell
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One rank's verdict on a cell. Numbers that must be equal on all ranks travel as text."""

    cell: Cell
    loss_error: float
    dense: TensorError | None
    expert: TensorError | None
    """The worst gradients."""
    weights: TensorError | None
    """The worst weight after the first step."""
    norms: list[str]
    clips: list[str]
    micro_collectives: list[dict[str, int]]
    end_collectives: dict[str, int]
    violations: list[Violation]


def compare(cell: Cell, got: Measurement, wanted: Measurement) -> Comparison:
    """Everything of a cell that one rank can tell."""
    limit = GRADIENT_LIMIT[cell.precision]
    gradients = list(tensor_errors(got.gradients, wanted.gradients))
    weights = list(tensor_errors(got.weights, wanted.weights))
    loss_error = _relative(got.losses, wanted.losses)
    found = [
        *_gradient_violations(gradients, cell, limit),
        *_value_violations(cell, got, wanted),
        *_norm_violations(cell, got, wanted, limit),
        *_next_step_violations(cell, got, wanted, weights, limit),
    ]
    if any(counts != got.micro_collectives[0] for counts in got.micro_collectives):
        what = f"micro-batches of one step differ in their collectives: {got.micro_collectives}"
        found.append(_violation(cell, "collectives", what))
    return Comparison(
        cell=cell,
        loss_error=loss_error,
        dense=_worst(e for e in gradients if not is_expert(e.name)),
        expert=_worst(e for e in gradients if is_expert(e.name)),
        weights=_worst(weights),
        norms=[value.hex() for value in got.norms],
        clips=[value.hex() for value in got.clips],
        micro_collectives=got.micro_collectives,
        end_collectives=got.end_collectives,
        violations=found,
    )


def _violation(
    cell: Cell, item: str, what: str, *, tensor: str | None = None, meaning: str | None = None
) -> Violation:
    return Violation(item=item, where=cell.label, what=what, tensor=tensor, meaning=meaning)


def item_of(cell: Cell) -> str:
    """What a wrong number of a cell is a violation of."""
    if dict(cell.settings).get("train.recompute", "none") != "none":
        return "recompute"
    return ITEM_OF.get(cell.scenario, "gradients")


def _gradient_violations(errors: list[TensorError], cell: Cell, limit: float) -> Iterator[Violation]:
    wrong = [error for error in errors if not error.error <= limit]
    if wrong:
        first = wrong[0]
        what = f"gradient is off by {first.error:.2e} (limit {limit:g}); {len(wrong)} of {len(errors)} tensors are"
        yield _violation(cell, item_of(cell), what, tensor=first.name, meaning=meaning_of(first, cell))


def _value_violations(cell: Cell, got: Measurement, wanted: Measurement) -> Iterator[Violation]:
    """Of the first step: loss, auxiliary losses, assignments."""
    limit = LOSS_LIMIT[cell.precision]
    if not (error := _relative(got.losses[:1], wanted.losses[:1])) <= limit:
        what = f"loss {got.losses[0]:.12g} instead of {wanted.losses[0]:.12g}, off by {error:.2e} (limit {limit:g})"
        yield _violation(cell, item_of(cell), what)
    for name, values in wanted.auxiliary.items():
        value = got.auxiliary[name][0]
        if not _relative([value], values[:1]) <= 10 * limit:
            what = f"auxiliary loss {name} is {value:.6g} instead of {values[0]:.6g}"
            yield _violation(cell, "balance", what)
    if not (error := _relative(got.objectives[:1], got.meant[:1])) <= 10 * limit:
        what = f"what is differentiated is {got.objectives[0]:.9g}, but mean loss and auxiliary losses with their "
        what += f"coefficients are {got.meant[0]:.9g}, off by {error:.2e}"
        meaning = "a mean over other tokens than those that count in the loss, or for auxiliary losses the routed ones"
        yield _violation(cell, "balance", what, meaning=meaning)
    for what, found, right in (("demand", got.demand, wanted.demand), ("kept", got.kept, wanted.kept)):
        for layer, (ours, theirs) in enumerate(zip(found, right, strict=True)):
            if ours[0] != theirs[0]:
                told = f"{what} of MoE layer {layer} is {ours[0]} instead of {theirs[0]}: other assignments"
                yield _violation(cell, item_of(cell), told)
                return


def _next_step_violations(
    cell: Cell, got: Measurement, wanted: Measurement, weights: list[TensorError], limit: float
) -> Iterator[Violation]:
    wrong = next((error for error in weights if not error.error <= limit), None)
    if wrong is not None:
        what = f"weight after the next step is off by {wrong.error:.2e} (limit {limit:g})"
        yield _violation(cell, item_of(cell), what, tensor=wrong.name)
    loss_limit = LOSS_LIMIT[cell.precision]
    if not (error := _relative(got.losses[1:], wanted.losses[1:])) <= loss_limit:
        what = f"loss of the second step is off by {error:.2e} (limit {loss_limit:g})"
        yield _violation(cell, item_of(cell), what)


def _norm_violations(cell: Cell, got: Measurement, wanted: Measurement, limit: float) -> Iterator[Violation]:
    if not (error := _relative(got.norms[:1], wanted.norms[:1])) <= limit:
        what = f"gradient norm {got.norms[0]:.9g} instead of {wanted.norms[0]:.9g}, off by {error:.2e}"
        yield _violation(cell, "norm", what)
    if got.known_norm is not None and abs(got.known_norm - KNOWN_NORM) > 1e-6:
        what = f"four gradients 2, 4, 6, 8 over all ranks have the norm {got.known_norm:.6f}, not {KNOWN_NORM:.6f}"
        yield _violation(cell, "norm", what)
    elif got.clipped_norm is not None and abs(got.clipped_norm - 1.0) > 1e-6:
        yield _violation(cell, "norm", f"clipping to norm 1 leaves a norm of {got.clipped_norm:.6f}")
    if not got.clips[0] < 1.0:
        yield _violation(cell, "norm", "the clip was not active, so nothing is known about it")


def _relative(got: list[float], wanted: list[float]) -> float:
    """Largest relative difference; NaN and infinity where it has none."""
    pairs = list(zip(got, wanted, strict=True))
    if not all(map(math.isfinite, got)):
        return math.inf
    return max(abs(a - b) / abs(b) if b else (0.0 if a == b else math.inf) for a, b in pairs)


def _worst(errors: Iterator[TensorError] | list[TensorError]) -> TensorError | None:
    return max(errors, key=lambda error: error.error, default=None)
