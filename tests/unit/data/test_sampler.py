"""The order of samples: every window once per epoch, exact proportions, the same everywhere."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe.data.sampler import epoch_keys, mixture, num_windows, permute, window_of
from epmoe.errors import ConfigError

SIZES = [*range(1, 70), 97, 127, 128, 129, 251, 1000, 1021, 4096, 4097]


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_every_permutation_is_a_bijection(seed: int) -> None:
    for size in SIZES:
        keys = epoch_keys(seed, 0, "s")
        assert sorted(permute(i, size, keys) for i in range(size)) == list(range(size)), size


@given(st.integers(1, 2**40), st.integers(0, 2**70), st.integers(0, 1000), st.data())
def test_neighbours_go_to_different_windows(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    keys = epoch_keys(seed, epoch, "s")
    start = data.draw(st.integers(0, size - 1))
    found = [permute(i, size, keys) for i in range(start, min(size, start + 20))]
    assert len(set(found)) == len(found)
    assert all(0 <= window < size for window in found)


def test_the_order_is_the_same_on_every_machine() -> None:
    order = [window_of(n, windows=10, seed=7, source="stdlib") for n in range(20)]
    assert order == [0, 3, 5, 4, 2, 7, 9, 1, 8, 6, 1, 3, 8, 0, 4, 6, 7, 9, 2, 5]


def test_no_window_is_lost_or_repeated_in_an_epoch() -> None:
    windows, epochs = 53, 4
    orders = [
        [window_of(e * windows + i, windows=windows, seed=3, source="s") for i in range(windows)]
        for e in range(epochs)
    ]
    for order in orders:
        assert sorted(order) == list(range(windows))
    assert len({tuple(order) for order in orders}) == epochs


def test_seed_and_source_change_the_order() -> None:
    orders = [
        tuple(window_of(i, windows=100, seed=seed, source=source) for i in range(100))
        for seed, source in ((0, "a"), (1, "a"), (0, "b"))
    ]
    assert len(set(orders)) == 3


def test_small_permutations_are_all_reached_about_equally() -> None:
    seen = Counter(tuple(permute(i, 3, epoch_keys(seed, 0, "s")) for i in range(3)) for seed in range(1200))
    assert len(seen) == 6
    assert all(140 < count < 260 for count in seen.values())  # expectation 200, five standard deviations


def test_positions_move_without_pattern() -> None:
    windows = 1000
    order = [window_of(i, windows=windows, seed=0, source="s") for i in range(windows)]
    distance = sum(abs(window - i) for i, window in enumerate(order)) / windows
    assert abs(distance - windows / 3) < 30  # a random permutation: n/3, standard deviation about 7
    follows = sum(b == a + 1 for a, b in pairwise(order))
    assert follows < 10  # expectation 1


@pytest.mark.parametrize(
    ("tokens", "seq_len", "windows"), [(0, 4, 0), (1, 4, 0), (2, 4, 1), (5, 4, 1), (6, 4, 2), (9, 4, 2)]
)
def test_number_of_windows(tokens: int, seq_len: int, windows: int) -> None:
    assert num_windows(tokens, seq_len) == windows


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1.0], (1,)),
        ([5.0], (1,)),
        ([1.0, 3.0], (1, 3)),
        ([0.1, 0.2, 0.7], (1, 2, 7)),
        ([0.5, 0.25, 0.25], (2, 1, 1)),
        ([1.0, 1.0, 1.0], (1, 1, 1)),
        ([3.14159, 2.71828], (536, 464)),
        ([999.0, 1.0], (999, 1)),
    ],
)
def test_proportions(weights: list[float], counts: tuple[int, ...]) -> None:
    mixed = mixture(weights)
    assert mixed.counts == counts
    assert Counter(mixed.pattern) == dict(enumerate(counts))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 20, allow_nan=False), min_size=1, max_size=6))
def test_each_source_is_read_in_order_and_never_falls_behind(weights: list[float]) -> None:
    mixed = mixture(weights)
    length = len(mixed.pattern)
    assert length <= 1000
    assert sum(mixed.counts) == length
    seen = [0] * len(weights)
    for n in range(min(2 * length, 300)):
        source, number = mixed.locate(n)
        assert number == seen[source]
        seen[source] += 1
        for s, count in enumerate(mixed.counts):
            assert abs(seen[s] - (n + 1) * count / length) < len(weights)
    for s, (count, weight) in enumerate(zip(mixed.counts, weights, strict=True)):
        assert mixed.locate(5 * length + mixed.pattern.index(s)) == (s, 5 * count)
        assert abs(count / length - weight / sum(weights)) <= 1 / length


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([0.999, 0.0009, 0.0001], (99_900, 90, 10)),
        ([1.0, 0.0004], (99_960, 40)),
        ([0.99995, 0.00005], (99_995, 5)),
        ([0.99999, 0.00001], (99_999, 1)),
    ],
)
def test_a_small_source_makes_the_pattern_longer(weights: list[float], counts: tuple[int, ...]) -> None:
    mixed = mixture(weights)
    assert mixed.counts == counts
    assert Counter(mixed.pattern) == dict(enumerate(counts))


def test_a_weight_that_would_never_be_seen() -> None:
    with pytest.raises(ConfigError, match=r"sources\[1\].weight=1e-06 is 1e-06 of the total.*1/100000"):
        mixture([1.0, 0.000001])
