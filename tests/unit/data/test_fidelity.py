"""Bits per byte stand where tokens are the text, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers

from epmoe.data.encoding import encode_text
from epmoe.data.fidelity import RoundTrip, decoded_parts, gives_text_back
from epmoe.data.indexed import open_indexed
from epmoe.data.loader import validation_sets
from epmoe.data.prepare import prepare
from epmoe.data.prepared import text_warning
from epmoe.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, json_tokenizer, train_bpe
from epmoe.data.yardsticks import yardsticks
from tests.unit.data.helpers import config, text, write_jsonl, write_pair
from tests.unit.data.tokenizers_made import byte_fallback, byte_level, unigram, word_level, word_piece

KEEPING = {"byte": ByteTokenizer, "bpe": lambda: train_bpe([text(0, 300)], 300), "fallback": byte_fallback}
LOSING = {
    "unigram": unigram,
    "NFKC": lambda: unigram(normalizer=normalizers.NFKC()),
    "word level": word_level,
    "word piece": word_piece,
}
TEXTS = ["The OLD price, ½ of it.", "the old price", " é 漢字", "", "a"] * 8


@pytest.mark.parametrize("kind", [*KEEPING, *LOSING])
def test_a_tokenizer_gives_text_back_or_not(kind: str) -> None:
    assert gives_text_back((KEEPING | LOSING)[kind]()) == (kind in KEEPING)


def test_a_tokenizer_that_folds_case_does_not_give_text_back() -> None:
    spec = json.loads(byte_level(special=True).source)
    spec["normalizer"] = {"type": "Lowercase"}
    assert not gives_text_back(json_tokenizer(json.dumps(spec).encode(), name="t"))


@pytest.mark.parametrize(
    ("value", "lost"),
    [("the old", 0), ("The old", 1), ("the é漢 old", 2), ("a" * 200, 0), ("  the", 1), ("BAD", 3)],
)
def test_lost_characters_are_counted(value: str, lost: int) -> None:
    tokenizer = unigram()
    [part] = encode_text(tokenizer, [value])
    assert RoundTrip(tokenizer).lost(part) == lost


@pytest.mark.parametrize("kind", KEEPING)
def test_parts_of_a_long_text_come_back_as_well(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epmoe.data.encoding.PART_CHARS", 300)
    monkeypatch.setattr("epmoe.data.encoding.OVERLAP_CHARS", 64)
    tokenizer, value = KEEPING[kind](), text(2, 900)
    parts = list(encode_text(tokenizer, [value]))
    trip = RoundTrip(tokenizer)
    assert len(parts) > 3
    assert [trip.lost(part) for part in parts] == [0] * len(parts)


@pytest.mark.parametrize("kind", [*KEEPING, *LOSING])
def test_a_long_document_is_decoded_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epmoe.data.fidelity.PART_TOKENS", 5)
    tokenizer = (KEEPING | LOSING)[kind]()
    ids = np.array(tokenizer.encode(text(2, 200) + "👩‍👩‍👧"))
    parts = list(decoded_parts(tokenizer, ids))
    assert len(parts) > 5
    assert "".join(parts) == tokenizer.decode(ids.tolist())


def saved(tokenizer: Tokenizer, folder: Path) -> str:
    tokenizer.save(folder)
    return "byte" if tokenizer.name == "byte" else str(folder)


@pytest.mark.parametrize("kind", [*KEEPING, *LOSING])
@pytest.mark.parametrize("indexed", [False, True])
def test_bits_per_byte_only_where_the_tokens_are_the_text(tmp_path: Path, kind: str, indexed: bool) -> None:
    tokenizer: Tokenizer = (KEEPING | LOSING)[kind]()
    records = [{"text": value} for value in TEXTS]
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "the old price " * 20}])
    val = write_jsonl(tmp_path / "val.jsonl", records)
    name = saved(tokenizer, tmp_path / "tokenizer")
    cfg = config(tmp_path, train, tokenizer=name, source={"val_path": str(val)})
    from_text = prepare(cfg)
    [source] = from_text.sources
    assert source.val is not None
    if indexed:
        pairs = []
        for split in (source.train, source.val):
            pair, offsets = open_indexed(split.prefix), open_indexed(split.prefix).document_offsets
            documents = [pair.tokens[offsets[i] : offsets[i + 1]].tolist() for i in range(pair.num_documents)]
            pairs.append(write_pair(tmp_path / split.prefix.name, documents, tokenizer.size))
        cfg = config(tmp_path, pairs[0], tokenizer=name, source={"val_path": str(pairs[1])})
    prepared = prepare(cfg)
    [data] = validation_sets(prepared, cfg)
    sticks = yardsticks(prepared, "s0")
    if kind in KEEPING:
        assert data.bits_left_out is None
        assert data.utf8_bytes == sum(len(value.encode()) for value in TEXTS)
        assert text_warning(prepared) is None
        assert sticks.unigram is not None
        assert sticks.xz is not None
        return
    assert "come back" in str(data.bits_left_out) or "give every text back" in str(data.bits_left_out)
    assert (sticks.unigram, sticks.xz) == (None, None)
    assert str(data.bits_left_out) in str(text_warning(prepared))
    if not indexed:
        share = source.val.facts.lost_share
        assert share is not None
        assert f"{share:.2%}" in str(text_warning(prepared))


@pytest.mark.parametrize("made", [ByteTokenizer, lambda: byte_level(special=False), byte_fallback])
def test_documents_cut_inside_characters_have_exact_bytes(tmp_path: Path, made: type[JsonTokenizer]) -> None:
    tokenizer = made()
    value = "漢字é" * 9 + " the old"
    ids = tokenizer.encode(value)
    documents = [[*ids[i : i + 4], tokenizer.eos_id] for i in range(0, len(ids), 4)]
    name = saved(tokenizer, tmp_path / "tokenizer")
    pair = write_pair(tmp_path / "pair", documents, tokenizer.size)
    cfg = config(tmp_path, pair, tokenizer=name, source={"val_path": str(pair)})
    [data] = validation_sets(prepare(cfg), cfg)
    assert data.utf8_bytes == len(value.encode())
    assert data.bits_left_out is None
