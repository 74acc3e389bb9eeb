"""The factor that keeps float16 gradients from vanishing: large, halved when they overflow, doubled again later.

arXiv:1710.03740 (mixed precision training), section 3.2, with powers of two, which change no digit of a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

START, FLOOR, CEILING = 2.0**16, 1.0, 2.0**24
GROWTH_INTERVAL = 2000
"""Finite steps after which a larger factor is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """A value that every rank computes for itself from what all of them know, so that nothing has to be agreed on."""

    factor: float = START
    """What the objective is multiplied by."""
    good_steps: int = 0
    """Finite steps since the factor last changed."""

    @property
    def can_shrink(self) -> bool:
        """False at the floor: an overflow is then no longer the factor's fault."""
        return self.factor > FLOOR

    def after_overflow(self) -> LossScale:
        """Half the factor."""
        return LossScale(factor=max(self.factor / 2, FLOOR))

    def after_update(self) -> LossScale:
        """One more finite step; after GROWTH_INTERVAL of them twice the factor."""
        if self.good_steps + 1 < GROWTH_INTERVAL:
            return replace(self, good_steps=self.good_steps + 1)
        return LossScale(factor=min(self.factor * 2, CEILING))


def new_loss_scale(precision: str) -> LossScale | None:
    """The first scale of a precision; None where gradients need none."""
    return LossScale() if precision == "fp16_autocast" else None


def scale_numbers(scale: LossScale | None) -> dict[str, float]:
    """What a checkpoint remembers of a scale."""
    return {} if scale is None else {"loss_scale": scale.factor, "loss_scale_good_steps": scale.good_steps}


def restored_scale(precision: str, numbers: dict[str, Any]) -> LossScale | None:
    """The scale to go on with. Takes its numbers, if there are any, out of ``numbers``: the run that wrote them may
    have had another precision."""
    factor, good_steps = numbers.pop("loss_scale", START), numbers.pop("loss_scale_good_steps", 0)
    if new_loss_scale(precision) is None:
        return None
    return LossScale(factor=float(factor), good_steps=int(good_steps))
