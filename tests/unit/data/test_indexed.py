"""Megatron's .bin/.idx format: exact bytes, exact round trip, and every kind of damage found at open."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe.data.indexed import HEADER, IndexedWriter, bin_path, idx_path, open_indexed, pair_prefix
from epmoe.errors import DataError
from tests.unit.data.helpers import hand_built, write_pair

DOCUMENTS = [[5, 6, 7], [], [256], [1, 2]]


def read_documents(prefix: Path) -> list[list[int]]:
    pair = open_indexed(prefix)
    offsets = pair.document_offsets
    return [pair.tokens[offsets[i] : offsets[i + 1]].tolist() for i in range(pair.num_documents)]


def test_bytes_of_a_written_pair(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "p", DOCUMENTS)
    assert bin_path(prefix).read_bytes() == struct.pack("<6H", 5, 6, 7, 256, 1, 2)
    assert idx_path(prefix).read_bytes() == hand_built([3, 0, 1, 2], [0, 6, 6, 8], [0, 1, 2, 3, 4])
    assert HEADER.size == 34


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_reads_every_integer_dtype_and_documents_of_several_sequences(
    tmp_path: Path, code: int, letter: str
) -> None:
    size = struct.calcsize(letter)
    (tmp_path / "p.bin").write_bytes(struct.pack(f"<6{letter}", 1, 2, 3, 4, 5, 6))
    (tmp_path / "p.idx").write_bytes(hand_built([2, 1, 3], [0, 2 * size, 3 * size], [0, 2, 2, 3], code))
    assert read_documents(tmp_path / "p") == [[1, 2, 3], [], [4, 5, 6]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 69999), max_size=5), max_size=8), st.sampled_from([60000, 70000]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab: int) -> None:
    documents = [[token % vocab for token in document] for document in documents]
    prefix = write_pair(tmp_path_factory.mktemp("pair") / "p", documents, vocab)
    assert read_documents(prefix) == documents


def test_mask_beside_the_tokens(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "p", np.dtype("<u2"), with_mask=True)
    writer.add(np.array([1, 2, 3]), np.array([3]), np.array([0, 1, 1]))
    writer.add(np.array([4]), np.array([1]), np.array([1]))
    writer.finish()
    mask = open_indexed(tmp_path / "p").mask
    assert mask is not None
    assert mask.tolist() == [0, 1, 1, 1]
    (tmp_path / "p.mask").write_bytes(b"\1\1")
    with pytest.raises(DataError, match=r"p\.mask has 2 bytes, expected 4"):
        open_indexed(tmp_path / "p")


def test_prefix_may_be_typed_with_its_ending(tmp_path: Path) -> None:
    for ending in ("", ".bin", ".idx"):
        assert pair_prefix(f"{tmp_path}/a.train{ending}") == tmp_path / "a.train"


def damaged(good: bytes, position: int, layout: str, value: int) -> bytes:
    return good[:position] + struct.pack(layout, value) + good[position + struct.calcsize(layout) :]


GOOD = hand_built([3, 0, 1, 2], [0, 6, 6, 8], [0, 1, 2, 3, 4])
DAMAGED = {
    "magic": (b"X" + GOOD[1:], "begins with b'XMIDIDX"),
    "version": (damaged(GOOD, 9, "<Q", 2), "version 2, expected .* version 1"),
    "float": (damaged(GOOD, 17, "<B", 7), "code 7 is floats"),
    "code": (damaged(GOOD, 17, "<B", 9), "code 9 is unknown"),
    "wider": (damaged(GOOD, 17, "<B", 4), r"p\.bin has 12 bytes, expected 24"),
    "header": (GOOD[:20], "has 20 bytes, expected at least 34"),
    "empty": (b"", "has 0 bytes"),
    "cut": (GOOD[:-8], f"has {len(GOOD) - 8} bytes, expected {len(GOOD)}"),
    "long": (GOOD + b"\0", f"has {len(GOOD) + 1} bytes, expected {len(GOOD)}"),
    # 2**62 * 12 is 0 modulo 2**64: a product in 64 bits would agree with a file without sequences.
    "overflow": (
        damaged(damaged(GOOD[:34], 18, "<Q", 2**62), 26, "<Q", 0),
        rf"has 34 bytes, expected {34 + 2**62 * 12}",
    ),
    "index overflow": (damaged(GOOD, 26, "<Q", 2**61 + 5), rf"expected {34 + 48 + (2**61 + 5) * 8}"),
    "no documents": (hand_built([], [], []), "0 sequences and 0 document indices"),
    "longer than bin": (hand_built([3, 0, 1, 3], [0, 6, 6, 8], [0, 1, 2, 3, 4]), "has 12 bytes, expected 14"),
    "shorter than bin": (
        hand_built([3, 0, 1, 1], [0, 6, 6, 8], [0, 1, 2, 3, 4]),
        "has 12 bytes, expected 10",
    ),
    "pointer": (
        hand_built([3, 0, 1, 2], [0, 6, 4, 8], [0, 1, 2, 3, 4]),
        "sequence 2 points to byte 4, expected 6",
    ),
    "wild pointer": (hand_built([3, 0, 1, 2], [0, 6, 6, -(2**63)], [0, 1, 2, 3, 4]), "sequence 3 points to"),
    "negative length": (hand_built([3, -1, 2, 2], [0, 6, 4, 8], [0, 1, 2, 3, 4]), "sequence 1 has length -1"),
    "document start": (
        hand_built([3, 0, 1, 2], [0, 6, 6, 8], [1, 1, 2, 3, 4]),
        "run from 1 to 4, expected 0 to 4",
    ),
    "document end": (hand_built([3, 0, 1, 2], [0, 6, 6, 8], [0, 1, 2, 3, 9]), "run from 0 to 9"),
    "document order": (hand_built([3, 0, 1, 2], [0, 6, 6, 8], [0, 3, 2, 3, 4]), "in order"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_found_at_open(tmp_path: Path, name: str) -> None:
    index, message = DAMAGED[name]
    prefix = write_pair(tmp_path / "p", DOCUMENTS)
    idx_path(prefix).write_bytes(index)
    started = time.perf_counter()
    with pytest.raises(DataError, match=message):
        open_indexed(prefix)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("keep", [0, 1, 11])
def test_truncated_tokens(tmp_path: Path, keep: int) -> None:
    prefix = write_pair(tmp_path / "p", DOCUMENTS)
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"p\.bin has {keep} bytes, expected 12"):
        open_indexed(prefix)


def test_missing_half(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "p", DOCUMENTS)
    bin_path(prefix).unlink()
    with pytest.raises(DataError, match=r"p\.bin is missing"):
        open_indexed(prefix)


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_pairs_without_tokens(tmp_path: Path, documents: list[list[int]]) -> None:
    assert read_documents(write_pair(tmp_path / "p", documents)) == documents
