"""A long text cut in parts has the tokens of the whole."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from epmoe.data.encoding import encode_text
from epmoe.data.shards import encode_document
from epmoe.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, train_bpe, training_parts
from tests.unit.data.helpers import text
from tests.unit.data.tokenizers_made import MADE, byte_fallback, unigram

PART, OVERLAP = 300, 64


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epmoe.data.encoding.PART_CHARS", PART)
    monkeypatch.setattr("epmoe.data.encoding.OVERLAP_CHARS", OVERLAP)


def blocks(value: str, seed: int) -> Iterator[str]:
    """The text, cut anywhere."""
    draw, start = random.Random(seed), 0
    while start < len(value):
        end = start + draw.randrange(0, 2 * PART)
        yield value[start:end]
        start = end


def same_as_whole(tokenizer: Tokenizer, value: str, *, seed: int = 0) -> int:
    """Parts it took."""
    ids, offsets = tokenizer.encode_with_offsets(value)
    parts = list(encode_text(tokenizer, blocks(value, seed), spans=True))
    assert "".join(part.text for part in parts) == value
    assert [i for part in parts for i in part.ids.tolist()] == ids
    spans = [part.spans for part in parts if part.spans is not None]
    assert np.concatenate(spans).tolist() == [list(pair) for pair in offsets]
    plain = list(encode_text(tokenizer, blocks(value, seed + 1)))
    assert [i for part in plain for i in part.ids.tolist()] == ids
    assert all(part.spans is None for part in plain)
    return len(parts)


PROSE = (
    "the old price, don't the\n\nthen  a   long    gap\n" * 60,
    " ".join(
        random.Random(3).choices(("é", "漢字", "e\u0301", "\n", "\t\t", "x=1", "👩‍👩‍👧", "12345"), k=900)
    ),
    text(5, 900),
)


@pytest.mark.parametrize("value", PROSE)
@pytest.mark.parametrize("kind", ["byte", "bpe", *MADE])
def test_parts_have_the_tokens_of_the_whole(kind: str, value: str) -> None:
    made: dict[str, Tokenizer] = {"byte": ByteTokenizer(), "bpe": train_bpe([text(0, 500)], 300)}
    tokenizer = made[kind] if kind in made else MADE[kind]()
    parts = [same_as_whole(tokenizer, value, seed=seed) for seed in range(3)]
    if kind in ("byte", "bpe", "byte level", "byte fallback"):
        assert min(parts) > 3


@pytest.mark.parametrize(
    "value",
    [
        "a" * 2000,  # one word that no part sees whole
        " " * 2000,
        "ab" * 1000,
        "x" + "\n" * 1500 + "y",
        "word " * 50 + "z" * 700 + " word" * 200,
        "",
        "a" * PART,
        "a" * (PART + 1),
    ],
)
@pytest.mark.parametrize("kind", ["unigram", "byte level", "word piece", "byte fallback", "plain bpe"])
def test_where_parts_cannot_agree_they_grow(kind: str, value: str) -> None:
    same_as_whole(MADE[kind](), value)


def test_a_text_that_is_taken_apart_is_not_simply_cut() -> None:
    """What the parts would give without their overlap is not the tokens of the whole."""
    tokenizer, value = byte_fallback(), PROSE[0]
    cut = [i for start in range(0, len(value), PART) for i in tokenizer.encode(value[start : start + PART])]
    assert cut != tokenizer.encode(value)


def test_marks_of_parts_are_those_of_the_whole() -> None:
    tokenizer, value = unigram(), PROSE[0]
    ranges = ((3, 40), (290, 310), (1000, 1001))
    ids, offsets = tokenizer.encode_with_offsets(value)
    found = list(encode_document(tokenizer, blocks(value, 0), ranges))
    marks = [mark for _, part in found for mark in part.tolist()]
    assert marks == [any(a < end and start < b for start, end in ranges) for a, b in offsets]
    assert len(marks) == len(ids)
    whole = list(encode_document(ByteTokenizer(), [value], ((9, 13), (630, 640))))
    counted = [
        i for part, part_marks in whole for i, m in zip(part.ids.tolist(), part_marks, strict=True) if m
    ]
    assert bytes(counted).decode() == value[9:13] + value[630:640]


def test_parts_train_the_same_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epmoe.data.tokenizer.TRAINING_PART_CHARS", 50)
    values = [text(seed, 400) + "\u00a0 \u2003 x\n\n  y" for seed in range(5)]
    parts = [part for seed, value in enumerate(values) for part in training_parts(blocks(value, seed))]
    assert "".join(parts) == "".join(values)
    assert len(parts) > 50
    whole, cut = train_bpe(values, 400), train_bpe(parts, 400)
    assert isinstance(whole, JsonTokenizer)
    assert cut.source == whole.source
