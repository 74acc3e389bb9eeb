"""Philox4x32-10 in Python integers (Salmon, Moraes, Dror, Shaw 2011), and epmoe's numbering of the draws."""

from __future__ import annotations

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[int, int, int, int]


def philox4x32_10(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds: four 32-bit counter words and two key words -> four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(MULTIPLIERS[0] * c0, 1 << 32)
        high1, low1 = divmod(MULTIPLIERS[1] * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def draw(seed: int, stream: int, layer: int, sample: int, position: int, lane: int) -> float:
    """The uniform number in [0, 1) with 24 random bits that belongs to these six counters."""
    counter = (
        lane // 4,
        position,
        sample & MASK,
        (stream << 24) + (layer << 8) + ((sample >> 32) & 0xFF),
    )
    words = philox4x32_10(counter, (seed & MASK, (seed >> 32) & MASK))
    return (words[lane % 4] >> 8) / (1 << 24)
