"""Records to test with."""

from __future__ import annotations

from typing import Any

from epmoe.metrics.step_record import LayerHealth, StepRecord


def health(
    *demand: int, kept: tuple[int, ...] | None = None, tokens: int = 10, entropy: float = 1.0
) -> LayerHealth:
    """A layer with this demand per expert."""
    kept = demand if kept is None else kept
    return LayerHealth(
        demand_E=demand,
        kept_E=kept,
        assignments=sum(demand),
        kept=sum(kept),
        overflow_tokens=1,
        valid_tokens=tokens,
        nonfinite_tokens=0,
        entropy=entropy,
    )


def record(step: int, **changes: Any) -> StepRecord:
    """A plausible record of a step."""
    values: dict[str, Any] = {
        "step": step,
        "tokens": 1000 * step,
        "samples": 4 * step,
        "loss": 4.0,
        "aux": {"balance": 1.1},
        "lr": 1e-3,
        "grad_norm": 0.5,
        "clip": 1.0,
        "tokens_per_second": 500.0,
        "flops_per_second": 2.5e9,
        "seconds_per_step": 2.0,
        "memory_gib": 1.5,
        "seconds": 2.0 * step,
        "layers": {1: health(4, 3, 2, 1)},
    }
    return StepRecord(**{**values, **changes})
