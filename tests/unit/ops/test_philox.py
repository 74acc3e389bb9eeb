"""Random numbers: the published vectors, the counter layout, and independence of the batch they are drawn in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe.ops import philox
from tests.oracle.noisy import box_muller
from tests.oracle.philox import draw, philox4x32_10

# Random123's published known answers: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
U32 = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert philox4x32_10(counter, key) == words
    tensors = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in tensors) == words


@settings(max_examples=50, deadline=None)
@given(counter=st.tuples(U32, U32, U32, U32), key=st.tuples(U32, U32))
def test_words_equal_the_integer_oracle(counter, key):
    tensors = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in tensors) == philox4x32_10(counter, key)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 4),
    layer=st.integers(0, 2**16 - 1),
    samples=st.lists(st.integers(0, 2**40 - 1), min_size=0, max_size=3),
    position=st.integers(0, 2**20),
    lanes=st.integers(1, 9),
)
def test_uniform_equals_the_oracle(seed, stream, layer, samples, position, lanes):
    positions = [position + i for i in range(len(samples))]
    drawn = philox.uniform(
        seed, stream, layer, torch.tensor(samples, dtype=torch.int64), torch.tensor(positions).long(), lanes
    )
    assert drawn.dtype == torch.float32
    assert drawn.shape == (len(samples), lanes)
    expected = [
        [draw(seed, stream, layer, sample, place, lane) for lane in range(lanes)]
        for sample, place in zip(samples, positions, strict=True)
    ]
    assert drawn.tolist() == expected


def test_streams_are_the_agreed_numbers():
    assert (philox.SECOND_EXPERT, philox.JITTER, philox.NOISE, philox.GUMBEL, philox.DROPOUT) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert (philox.PRIORITY, philox.SMOOTHING, philox.PROBE) == (5, 6, 7)


@pytest.mark.parametrize(
    "changed", ["seed", "high_seed", "stream", "layer", "sample", "high_sample", "position"]
)
def test_every_counter_matters(changed):
    def numbers(**bump):
        return philox.uniform(
            5 + bump.get("seed", 0) + (bump.get("high_seed", 0) << 32),
            bump.get("stream", 0),
            bump.get("layer", 0),
            torch.arange(8) + bump.get("sample", 0) * 100 + (bump.get("high_sample", 0) << 33),
            torch.arange(8) + bump.get("position", 0) * 100,
            4,
        )

    assert not set(numbers().flatten().tolist()) & set(numbers(**{changed: 1}).flatten().tolist())


def test_draws_do_not_depend_on_the_batch_they_are_drawn_in():
    sample, position = torch.tensor([7, 7, 2**35 + 1, 3]), torch.tensor([0, 9, 4, 4])
    together = philox.uniform(3, philox.JITTER, 2, sample, position, 6)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(
        philox.uniform(3, philox.JITTER, 2, sample[order], position[order], 6), together[order]
    )
    one = philox.uniform(3, philox.JITTER, 2, sample[2:3], position[2:3], 3)
    assert torch.equal(one, together[2:3, :3])


def test_draws_look_uniform():
    drawn = philox.uniform(0, philox.DROPOUT, 1, torch.zeros(2000).long(), torch.arange(2000), 10).double()
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert abs(drawn.mean() - 0.5) < 0.01  # five standard errors of 20,000 draws
    assert abs(drawn.var() - 1 / 12) < 0.004
    counts = torch.histc(drawn, 10, 0.0, 1.0)
    assert (counts - 2000).abs().max() < 250


def test_layer_out_of_range_is_refused():
    with pytest.raises(ValueError, match="65536"):
        philox.uniform(0, 0, 2**16, torch.tensor([0]), torch.tensor([0]), 1)


def test_normal_draws_are_box_muller_of_the_uniform_ones():
    sample_T, position_T = torch.tensor([3, 2**35 + 1]), torch.tensor([7, 0])
    for lanes in (1, 2, 5):
        got = philox.normal(11, philox.NOISE, 4, sample_T, position_T, lanes)
        assert got.dtype == torch.float64
        for token, (sample, position) in enumerate(zip(sample_T.tolist(), position_T.tolist(), strict=True)):
            u = [draw(11, philox.NOISE, 4, sample, position, lane) for lane in range(6)]
            pairs = [z for pair in zip(u[::2], u[1::2], strict=True) for z in box_muller(pair)]
            assert got[token].tolist() == pytest.approx(pairs[:lanes], rel=1e-12)


def test_normal_and_gumbel_draws_have_their_moments():
    sample_T = torch.arange(4000)
    normal = philox.normal(5, philox.NOISE, 0, sample_T, sample_T % 7, 6)
    assert normal.mean().item() == pytest.approx(0.0, abs=0.02)
    assert normal.std().item() == pytest.approx(1.0, abs=0.02)
    assert (normal.T @ normal / 4000 - torch.eye(6, dtype=torch.float64)).abs().max() < 0.07, (
        "lanes are independent"
    )
    gumbel = philox.gumbel(philox.uniform(5, philox.GUMBEL, 0, sample_T, sample_T % 7, 6))
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, abs=0.06)
    assert philox.gumbel(torch.tensor([0.0, 1 - 2.0**-24])).isfinite().all()
