"""Texts become ids and come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    json_tokenizer,
    load_tokenizer,
    padded_vocab_size,
    train_bpe,
)
from epmoe.errors import ConfigError, DataError
from tests.unit.data.helpers import text

TEXTS = [text(seed, 300) for seed in range(20)]


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    return train_bpe(TEXTS, 300)


@given(st.text())
def test_bytes_round_trip(value: str) -> None:
    tokenizer = ByteTokenizer()
    ids, offsets = tokenizer.encode_with_offsets(value)
    assert ids == tokenizer.encode(value) == list(value.encode())
    assert tokenizer.decode([*ids, tokenizer.eos_id, 300]) == value
    assert [value[a:b].encode()[0:1] for a, b in offsets].count(b"") == 0
    assert len(offsets) == len(ids)


@settings(deadline=None)
@given(st.text())
def test_bpe_round_trip_on_text_it_was_not_trained_on(bpe: JsonTokenizer, value: str) -> None:
    ids = bpe.encode(value)
    assert bpe.decode(ids) == value
    assert bpe.eos_id not in ids
    with_offsets, offsets = bpe.encode_with_offsets(value)
    assert with_offsets == ids
    assert {i for a, b in offsets for i in range(a, b)} == set(range(len(value)))


def test_bpe_is_deterministic_and_depends_on_the_texts(bpe: JsonTokenizer) -> None:
    assert train_bpe(iter(TEXTS), 300).source == bpe.source
    assert train_bpe(TEXTS[:10], 300).sha256 != bpe.sha256
    assert bpe.size == 300
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode())


def test_end_of_text_spelled_in_a_text_is_text(bpe: JsonTokenizer) -> None:
    assert bpe.eos_id not in bpe.encode("a <|endoftext|> b")
    assert bpe.decode(bpe.encode("a <|endoftext|> b")) == "a <|endoftext|> b"
    assert bpe.decode([*bpe.encode("a"), bpe.eos_id, *bpe.encode("b"), 310]) == "ab"


def test_save_and_load(bpe: JsonTokenizer, tmp_path: Path) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        folder = tmp_path / tokenizer.name
        tokenizer.save(folder)
        loaded = load_tokenizer(folder)
        assert (loaded.sha256, loaded.name, loaded.size, loaded.eos_id) == (
            tokenizer.sha256,
            tokenizer.name,
            tokenizer.size,
            tokenizer.eos_id,
        )
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert load_tokenizer("byte").sha256 == ByteTokenizer().sha256 != bpe.sha256


def test_saved_folder_that_is_damaged(bpe: JsonTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "epmoe_tokenizer.json").write_text('{"kind": "other"}')
    with pytest.raises(DataError, match="does not describe a tokenizer"):
        load_tokenizer(tmp_path)


def test_bpe_needs_room_for_the_bytes() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=256 is too small(.|\n)*257 or more"):
        train_bpe(["text"], 256)


def renamed(bpe: JsonTokenizer, name: str, **changes: object) -> bytes:
    return json.dumps(json.loads(bpe.source.replace(b"<|endoftext|>", name.encode())) | changes).encode()


def test_any_tokenizer_json(bpe: JsonTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(renamed(bpe, "</s>"))
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(where)
        assert loaded.eos_id == bpe.eos_id
        assert loaded.decode(loaded.encode(TEXTS[0])) == TEXTS[0]


def test_tokenizer_json_without_a_known_end_of_text(bpe: JsonTokenizer) -> None:
    source = renamed(bpe, "<fin>")
    with pytest.raises(DataError, match=r"looked for <\|endoftext\|>(.|\n)*special tokens are <fin>"):
        json_tokenizer(source, name="t")
    assert json_tokenizer(source, name="t", eos_token="<fin>").eos_id == bpe.eos_id
    with pytest.raises(DataError, match="looked for <end>"):
        json_tokenizer(source, name="t", eos_token="<end>")


def test_truncation_of_a_tokenizer_json_is_ignored(bpe: JsonTokenizer) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    cut = json_tokenizer(renamed(bpe, "<|endoftext|>", truncation=truncation), name="t")
    assert cut.encode(TEXTS[0]) == bpe.encode(TEXTS[0])


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"is no tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match="neither 'byte' nor a file"):
        load_tokenizer("missing/tokenizer.json")


@pytest.mark.parametrize(
    ("size", "multiple", "padded"), [(257, 64, 320), (64, 64, 64), (1, 64, 64), (5, 1, 5)]
)
def test_padded_vocabulary(size: int, multiple: int, padded: int) -> None:
    assert padded_vocab_size(size, multiple) == padded
