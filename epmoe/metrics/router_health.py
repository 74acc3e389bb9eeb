"""The history of a run in bounded memory, and what it says about every router."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from epmoe.metrics.step_record import LayerHealth, StepRecord, merge_health, read_records

OVERLOAD = 3.0
MAX_BINS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Some successive records taken as one."""

    first_step: int
    last_step: int
    records: int
    loss: float
    """Mean of the finite losses; NaN when none was."""
    losses: int
    """How many losses were finite."""
    layers: dict[int, LayerHealth] = field(default_factory=dict)
    val: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By source: step and value of the last evaluation in this bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """One router over the last part of the run."""

    layer: int
    health: LayerHealth
    """The steps of the window taken as one."""

    @property
    def overloaded_experts(self) -> tuple[int, ...]:
        """Experts with more than 3/E of the assignments, three times an even share, on average over the window."""
        limit = OVERLOAD / len(self.health.demand_E) if self.health.demand_E else 1.0
        return tuple(e for e, share in enumerate(self.health.share_E) if share > limit)

    @property
    def flagged(self) -> bool:
        """Whether an expert holds too much or nothing at all."""
        return bool(self.overloaded_experts or self.health.dead_experts)

    def sentence(self) -> str:
        """What a person should know about this router, on one line."""
        health = self.health
        parts = [
            f"layer {self.layer}: busiest expert {health.max_over_mean:.2f}x an even share",
            f"drops {health.drop_rate:.1%}",
            f"tokens without an expert {health.overflow_rate:.1%}",
            f"entropy {health.entropy:.2f} nats of at most {math.log(max(len(health.demand_E), 1)):.2f}",
        ]
        if self.overloaded_experts:
            parts.append(f"OVERLOADED experts {_listed(self.overloaded_experts)}")
        if health.dead_experts:
            parts.append(f"DEAD experts {_listed(health.dead_experts)}")
        return ", ".join(parts)


class RouterHistory:
    """Collects records into at most 200 bins; when they are full, neighbours merge and bins become twice as wide.

    The bins depend only on the sequence of records, so a history rebuilt from metrics.jsonl equals one that was
    never interrupted.
    """

    def __init__(self) -> None:
        self._bins: list[Bin] = []
        self._width = 1

    @staticmethod
    def from_jsonl(path: Path) -> RouterHistory:
        """The history a metrics.jsonl holds; empty when there is no such file."""
        history = RouterHistory()
        for record in read_records(path):
            history.add(record)
        return history

    @property
    def bins(self) -> tuple[Bin, ...]:
        """The bins, oldest first."""
        return tuple(self._bins)

    def add(self, record: StepRecord) -> None:
        """Takes in one record; steps come in ascending order."""
        new = _bin(record)
        if self._bins and self._bins[-1].records < self._width:
            self._bins[-1] = _merge(self._bins[-1], new)
            return
        self._bins.append(new)
        if len(self._bins) > MAX_BINS:
            self._width *= 2
            pairs = [self._bins[i : i + 2] for i in range(0, len(self._bins), 2)]
            self._bins = [_merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]

    def summary(self, last: float = 0.2) -> tuple[LayerSummary, ...]:
        """Every router over the ``last`` part of the steps, in order of the layers; empty for a dense model."""
        if not self._bins:
            return ()
        cut = self._bins[-1].last_step * (1 - last)
        window: dict[int, LayerHealth] = {}
        for part in self._bins:
            if part.last_step <= cut:
                continue
            window = _merge_layers(window, part.layers)
        return tuple(LayerSummary(layer=layer, health=window[layer]) for layer in sorted(window))


def _bin(record: StepRecord) -> Bin:
    finite = math.isfinite(record.loss)
    return Bin(
        first_step=record.step,
        last_step=record.step,
        records=1,
        loss=record.loss if finite else math.nan,
        losses=int(finite),
        layers=record.layers,
        val={name: (record.step, value) for name, value in record.val.items()},
    )


def _merge(first: Bin, second: Bin) -> Bin:
    losses = first.losses + second.losses
    total = sum(part.loss * part.losses for part in (first, second) if part.losses)
    return Bin(
        first_step=first.first_step,
        last_step=second.last_step,
        records=first.records + second.records,
        loss=total / losses if losses else math.nan,
        losses=losses,
        layers=_merge_layers(first.layers, second.layers),
        val=first.val | second.val,
    )


def _merge_layers(first: dict[int, LayerHealth], second: dict[int, LayerHealth]) -> dict[int, LayerHealth]:
    """Layer by layer; where the number of experts changed, what came later stands alone."""
    merged = first | second
    for layer in first.keys() & second.keys():
        if len(first[layer].demand_E) == len(second[layer].demand_E):
            merged[layer] = merge_health(first[layer], second[layer])
    return merged


def _listed(experts: tuple[int, ...]) -> str:
    shown = ", ".join(str(e) for e in experts[:8])
    return shown if len(experts) <= 8 else f"{shown} and {len(experts) - 8} more"
