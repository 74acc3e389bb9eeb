"""Which window of which source is global sample n: arithmetic on integers, no state, no giant index.

    n  --mixture-->  source, k-th sample of that source  --epoch, permutation-->  window

World size, rank and micro-batch do not appear, so the order survives any change of them, and a checkpoint keeps one
number. Every epoch visits every window of a source exactly once, in an order of its own: a Feistel network over the
smallest power of four that holds the windows, walked along its cycle until it lands on a window (Black and Rogaway,
Ciphers with Arbitrary Finite Domains, 2002).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from epmoe.errors import ConfigError

PATTERN, MAX_PATTERN = 1000, 100_000
"""Longest interleaving pattern, as a rule and where a source's share needs a longer one; shares are rounded to it."""
ROUNDS = 8
_MASK64 = 2**64 - 1


def num_windows(stream_tokens: int, seq_len: int) -> int:
    """Windows of S+1 tokens, neighbours sharing one, that predict every token but the first exactly once."""
    return max(0, -(-(stream_tokens - 1) // seq_len))


def permute(position: int, size: int, keys: Sequence[int]) -> int:
    """A keyed permutation of ``range(size)``: O(1) memory, at most about four network passes on average."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        position = left << half | right
        if position < size:
            return position


def epoch_keys(seed: int, epoch: int, source: str) -> tuple[int, ...]:
    """Round keys of one epoch of one source."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{source}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def window_of(sample_number: int, *, windows: int, seed: int, source: str) -> int:
    """Window of the ``sample_number``-th sample of a source with that many windows."""
    epoch, position = divmod(sample_number, windows)
    return permute(position, windows, epoch_keys(seed, epoch, source))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The interleaving of the sources: a pattern of source numbers, repeated for ever."""

    pattern: tuple[int, ...]
    rank: tuple[int, ...]
    """How often the entry's source stands earlier in the pattern."""
    counts: tuple[int, ...]
    """Entries of each source."""

    def locate(self, sample_number: int) -> tuple[int, int]:
        """Global sample number -> (source, number among the samples of that source)."""
        turn, entry = divmod(sample_number, len(self.pattern))
        source = self.pattern[entry]
        return source, turn * self.counts[source] + self.rank[entry]


def mixture(weights: Sequence[float]) -> Mixture:
    """Interleaves sources by weight: exact when the decimal weights allow a pattern of 1000 entries or fewer.

    The pattern is a hundred times as long where a source would otherwise have no entry. Raises ConfigError when
    a weight is too small for that as well: its source would never be seen.
    """
    shares = [Fraction(str(weight)) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    length = lcm(*(share.denominator for share in shares))
    counts = [int(share * length) for share in shares]
    if length > PATTERN:
        length, counts = PATTERN, _rounded(shares, PATTERN)
    if 0 in counts:
        length, counts = MAX_PATTERN, _rounded(shares, MAX_PATTERN)
    if 0 in counts:
        unseen = counts.index(0)
        raise ConfigError(
            f"data.sources[{unseen}].weight={weights[unseen]} is {float(shares[unseen]):.2g} of the total, "
            f"the smallest share is 1/{length}",
            fix="raise the weight or leave the source out",
        )
    pattern, rank = _spread(counts)
    return Mixture(pattern=tuple(pattern), rank=tuple(rank), counts=tuple(counts))


def _rounded(shares: Sequence[Fraction], length: int) -> list[int]:
    """Entries of each source in a pattern of this length, the largest remainders rounded up."""
    counts = [int(share * length) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i] * length, i))
    for source in by_remainder[: length - sum(counts)]:
        counts[source] += 1
    return counts


def _spread(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Error diffusion: every entry goes to the source that is furthest behind its share."""
    length, credit, used = sum(counts), [0] * len(counts), [0] * len(counts)
    pattern, rank = [], []
    for _ in range(length):
        credit = [owed + count for owed, count in zip(credit, counts, strict=True)]
        source = max(range(len(counts)), key=lambda i: (credit[i], -i))
        credit[source] -= length
        pattern.append(source)
        rank.append(used[source])
        used[source] += 1
    return pattern, rank


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: every input bit reaches every output bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
