"""How many slots an expert has in a group, and who gets them."""

from __future__ import annotations

from fractions import Fraction

from .routing import Assignment


def capacity(
    factor: float,
    *,
    group_size: int,
    num_experts: int,
    k: int,
    unit: str,
    minimum: int = 0,
    multiple: int = 1,
) -> int:
    """ceil(factor * [k] * S / E) as an exact fraction, at least ``minimum``, at most S, then rounded up."""
    share = Fraction(str(factor)) * Fraction(group_size, num_experts)
    if unit == "per_assignment":
        share *= k
    slots = -((-share.numerator) // share.denominator)
    slots = min(group_size, max(minimum, slots))
    while slots % multiple:
        slots += 1
    return slots


def assign_slots(
    assignments: list[Assignment], group_of: list[int], slots: int | None
) -> dict[tuple[int, int], int]:
    """(token, choice) -> slot, for the assignments that are kept; ``slots=None`` keeps all (dropless)."""
    taken: dict[tuple[int, int], int] = {}
    kept = {}
    for a in assignments:
        place = taken.get((group_of[a.token], a.expert), 0)
        taken[group_of[a.token], a.expert] = place + 1
        if slots is None or place < slots:
            kept[a.token, a.choice] = place
    return kept


def demand(assignments: list[Assignment], group_of: list[int], groups: int, experts: int) -> list[list[int]]:
    """Wishes per group and expert before capacity."""
    counts = [[0] * experts for _ in range(groups)]
    for a in assignments:
        counts[group_of[a.token]][a.expert] += 1
    return counts
