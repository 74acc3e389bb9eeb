"""What is known about a step: plain numbers, already summed over ranks. No tensors, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerHealth:
    """What the router of one MoE layer did with the tokens of one or more steps."""

    demand_E: tuple[int, ...]
    """Assignments each expert was asked for, before capacity."""
    kept_E: tuple[int, ...]
    """Assignments each expert computed."""
    assignments: int
    """Sum of the demand."""
    kept: int
    """Sum of the kept ones."""
    overflow_tokens: int
    """Valid tokens of which no assignment was kept: only the residual carries them on."""
    valid_tokens: int
    nonfinite_tokens: int
    """Tokens treated as padding because a router logit was not finite."""
    entropy: float
    """Mean over valid tokens of the entropy of the router's probabilities, nats; log(E) when it cannot decide."""

    @property
    def drop_rate(self) -> float:
        """Dropped assignments / assignments."""
        return 1.0 - self.kept / self.assignments if self.assignments else 0.0

    @property
    def overflow_rate(self) -> float:
        """Tokens without any expert / valid tokens."""
        return self.overflow_tokens / self.valid_tokens if self.valid_tokens else 0.0

    @property
    def share_E(self) -> tuple[float, ...]:
        """Each expert's part of the demand; an even spread is 1/E each."""
        total = sum(self.demand_E)
        return tuple(n / total if total else 0.0 for n in self.demand_E)

    @property
    def max_over_mean(self) -> float:
        """Demand of the busiest expert relative to an even spread; 1 is perfect, E is collapse."""
        return max(self.share_E, default=0.0) * len(self.demand_E)

    @property
    def load_cv(self) -> float:
        """Coefficient of variation of the demand: standard deviation / mean; 0 is perfect."""
        mean = sum(self.demand_E) / len(self.demand_E) if self.demand_E else 0.0
        variance = sum((n - mean) ** 2 for n in self.demand_E) / len(self.demand_E) if self.demand_E else 0.0
        return math.sqrt(variance) / mean if mean else 0.0

    @property
    def dead_experts(self) -> tuple[int, ...]:
        """Experts that no token asked for; none when there were no assignments at all."""
        return tuple(e for e, n in enumerate(self.demand_E) if n == 0) if sum(self.demand_E) else ()


def merge_health(first: LayerHealth, second: LayerHealth) -> LayerHealth:
    """The two taken as one: counts add, entropies average by valid tokens."""
    tokens = first.valid_tokens + second.valid_tokens
    weighted = first.entropy * first.valid_tokens + second.entropy * second.valid_tokens
    return LayerHealth(
        demand_E=tuple(a + b for a, b in zip(first.demand_E, second.demand_E, strict=True)),
        kept_E=tuple(a + b for a, b in zip(first.kept_E, second.kept_E, strict=True)),
        assignments=first.assignments + second.assignments,
        kept=first.kept + second.kept,
        overflow_tokens=first.overflow_tokens + second.overflow_tokens,
        valid_tokens=tokens,
        nonfinite_tokens=first.nonfinite_tokens + second.nonfinite_tokens,
        entropy=weighted / tokens if tokens else 0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One line of metrics.jsonl. Sums over all ranks; counters run from the first step of the whole run."""

    step: int
    tokens: int
    """Tokens that counted in the loss so far."""
    samples: int
    """Sequences trained on so far."""
    loss: float
    """Cross-entropy, nats per token that counts, without auxiliary losses; NaN where no token did."""
    loss_tokens: int | None = None
    """Tokens it is the mean of; None in records that do not say."""
    source_loss: dict[str, float] = field(default_factory=dict)
    """The same by source, where there are several; NaN for one without tokens in these steps."""
    aux: dict[str, float] = field(default_factory=dict)
    """Auxiliary losses per routed token and without coefficients, by name."""
    lr: float
    grad_norm: float
    """Global norm before clipping."""
    clip: float = 1.0
    """What the gradient was multiplied by; 1 = not clipped."""
    tokens_per_second: float
    """Processed tokens: all but padding, whether they count in the loss or not."""
    flops_per_second: float
    """Of the arithmetic the active parameters need, over all ranks."""
    seconds_per_step: float = math.nan
    mfu: float | None = None
    """Part of the devices' peak; None where the peak is not known."""
    memory_gib: float
    seconds: float
    """Training time so far, over all restarts."""
    skipped_steps: int = 0
    """Updates left out so far because a loss or gradient was not finite."""
    overflowed_steps: int = 0
    """Updates left out so far because gradients overflowed and the loss scale was halved."""
    empty_steps: int = 0
    """Steps so far without an update because no token counted in the loss."""
    loss_scale: float | None = None
    """What the loss is multiplied by; None where gradients need no scale."""
    layers: dict[int, LayerHealth] = field(default_factory=dict)
    """By number of the layer; MoE layers only."""
    val: dict[str, float] = field(default_factory=dict)
    """Validation loss, nats per token, by source, on the steps that evaluate."""

    @property
    def drop_rate(self) -> float:
        """Dropped assignments / assignments over all layers."""
        assignments = sum(layer.assignments for layer in self.layers.values())
        kept = sum(layer.kept for layer in self.layers.values())
        return 1.0 - kept / assignments if assignments else 0.0


def record_to_json(record: StepRecord) -> str:
    """One line of standard JSON; numbers that are not finite become null."""
    return json.dumps(_finite(asdict(record)), separators=(",", ":"), allow_nan=False)


def record_from_json(line: str) -> StepRecord:
    """The record of one line; null stands for NaN, except where None means something.

    Raises:
        ValueError: The line is not a whole record.
    """
    try:
        values = json.loads(line)
        layers = {
            int(number): LayerHealth(**_plain(LayerHealth, layer))
            for number, layer in values["layers"].items()
        }
        return StepRecord(**{**_plain(StepRecord, values), "layers": layers})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a metrics record: {line[:80]!r}") from error


def read_records(path: Path) -> Iterator[StepRecord]:
    """The records of a metrics.jsonl in order; lines that a crash tore are left out, no file means no records."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                yield record_from_json(line)
            except ValueError:
                continue


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a dataclass: the fields it knows, null as NaN, lists as tuples."""
    arguments: dict[str, Any] = {}
    for known in fields(cls):
        if known.name not in values:
            continue
        value = values[known.name]
        if isinstance(value, dict):
            value = {key: math.nan if child is None else child for key, child in value.items()}
        elif isinstance(value, list):
            value = tuple(value)
        elif value is None and known.name not in ("mfu", "loss_scale", "loss_tokens"):
            value = math.nan
        arguments[known.name] = value
    return arguments
