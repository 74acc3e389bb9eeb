"""What one process tells about a router: whether the task trains it, and whether its balance loss sees a skew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from epmoe.verify.cases import Cell
from epmoe.verify.compare import Violation
from epmoe.verify.measure import Measurement


def router_violations(references: Mapping[Cell, Measurement]) -> Iterator[Violation]:
    """Looks at the references in which auxiliary losses are off, and in which all tokens are the same."""
    by_scenario = {
        cell.scenario: (cell, found) for cell, found in references.items() if cell.precision == "fp64"
    }
    if "task_only" in by_scenario:
        yield from _dead_routers(*by_scenario["task_only"])
    if "one_token" in by_scenario and "parity" in by_scenario:
        yield from _constant_balance(*by_scenario["one_token"], by_scenario["parity"][1])


def _dead_routers(cell: Cell, found: Measurement) -> Iterator[Violation]:
    for name, part in found.gradients.items():
        if name.endswith("router.weight") and not part.local.any():
            yield Violation(
                item="liveness",
                where=cell.label,
                what="the task loss alone gives the router no gradient",
                tensor=name,
                meaning="the weights that combine the experts' outputs are constants: cut off from the graph, or "
                "normalised over a single choice",
            )


def _constant_balance(cell: Cell, skewed: Measurement, even: Measurement) -> Iterator[Violation]:
    if "balance" not in even.auxiliary or _skew(skewed) <= 1.2 * _skew(even):
        return  # nothing to see a skew with, or a router that lets none arise
    low, high = even.auxiliary["balance"][0], skewed.auxiliary["balance"][0]
    if not high > low:
        yield Violation(
            item="balance",
            where=cell.label,
            what=f"the balance loss is {high:.6g} per token where all tokens are alike, and {low:.6g} where they are "
            f"not, though demand is {_skew(skewed):.2f} times an even share at most there, and {_skew(even):.2f} here",
            meaning="the loss does not see an imbalance: softmax taken twice, or counts that do not enter",
        )


def _skew(found: Measurement) -> float:
    """Largest demand for an expert relative to an even share, mean over layers, in the first step."""
    demands = [steps[0] for steps in found.demand]
    return sum(max(demand) * len(demand) / max(sum(demand), 1.0) for demand in demands) / len(demands)
