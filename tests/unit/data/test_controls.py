"""No text becomes a control token, whatever it spells and whatever kind of tokenizer reads it."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import models

from epmoe.data.fidelity import gives_text_back
from epmoe.data.tokenizer import json_tokenizer, train_bpe
from epmoe.errors import DataError
from tests.unit.data.tokenizers_made import (
    LETTERS,
    MADE,
    bpe_with_end_in_its_merges,
    byte_level,
    unigram,
    word_level,
)


@pytest.mark.parametrize("kind", MADE)
def test_a_text_that_spells_end_of_text_does_not_become_it(kind: str) -> None:
    tokenizer = MADE[kind]()
    end = tokenizer.eos_token
    for value in (end, f"the {end} old", f"the{end}old", f"{end}{end}", f"{end}a"):
        ids, offsets = tokenizer.encode_with_offsets(value)
        assert tokenizer.eos_id not in ids
        assert tokenizer.encode(value) == ids
        assert len(offsets) == len(ids)
        assert max(ids) < tokenizer.size


@pytest.mark.parametrize("kind", MADE)
def test_end_of_text_decodes_to_nothing(kind: str) -> None:
    tokenizer = MADE[kind]()
    ids = tokenizer.encode("the old")
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", MADE)
def test_other_texts_keep_their_ids(kind: str) -> None:
    tokenizer = MADE[kind]()
    plain = tokenizers.Tokenizer.from_buffer(tokenizer.source)
    plain.encode_special_tokens = True
    for value in ("the old price, a [x] <y>", " leading", "a</", "", "é"):
        assert tokenizer.encode(value) == plain.encode(value, add_special_tokens=False).ids


def test_every_special_token_is_out_of_reach() -> None:
    assert 0 not in unigram().encode("a <pad> b")
    assert word_level().encode("the <mask> old") == [2, 0, 3]
    with_template = json.loads(unigram(special=False).source)
    with_template["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<pad>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [0], "tokens": ["<pad>"]}},
    }
    tokenizer = json_tokenizer(json.dumps(with_template).encode(), name="t", eos_token="</s>")
    assert 0 not in tokenizer.encode("a <pad> b")


def test_merges_that_use_end_of_text_are_gone_and_nothing_else() -> None:
    tokenizer = bpe_with_end_in_its_merges()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("<eos>a<e")] == ["<eos", ">", "a", "<e"]


def test_an_end_of_text_that_is_the_unknown_token_too_ends_no_document() -> None:
    pieces = [("</s>", 0.0), *((letter, -1.0) for letter in LETTERS)]
    for model in (
        models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"),
        models.WordPiece({"</s>": 0, "a": 1}, unk_token="</s>"),
        models.Unigram(pieces, unk_id=0),
    ):
        tokenizer = json_tokenizer(tokenizers.Tokenizer(model).to_str().encode(), name="t")
        assert tokenizer.encode("a") == [1]
        assert tokenizer.encode("é") == []
        assert tokenizer.encode_with_offsets("é") == ([], [])
        assert not gives_text_back(tokenizer)
    # A byte-level BPE names one that it never needs.
    spec = json.loads(train_bpe(["some text"], 260).source)
    spec["model"]["unk_token"] = "<|endoftext|>"
    tokenizer = json_tokenizer(json.dumps(spec).encode(), name="t")
    assert tokenizer.decode(tokenizer.encode("漢字 <|endoftext|>")) == "漢字 <|endoftext|>"


def test_what_the_library_raises_is_a_message() -> None:
    missing = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = json_tokenizer(missing.to_str().encode(), name="t.json")
    with pytest.raises(DataError, match=r"t\.json cannot encode a text(.|\n)*WordLevel"):
        tokenizer.encode("b")
    spec = json.loads(byte_level(special=True).source)
    for damage in (
        {"model": None},
        {"model": {}},
        {"model": {**spec["model"], "vocab": 3}},
        {"added_tokens": [1]},
    ):
        with pytest.raises(DataError, match=r"t\.json is no tokenizer"):
            json_tokenizer(json.dumps(spec | damage).encode(), name="t.json")
    for source in (b"[]", b"3", b"", b"\xff", b"{" * 5000):
        with pytest.raises(DataError, match=r"t\.json is no tokenizer"):
            json_tokenizer(source, name="t.json")


def test_an_id_far_above_the_entries_is_refused() -> None:
    spec = json.loads(tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")).to_str())
    spec["model"]["vocab"]["b"] = 2**31 - 1
    with pytest.raises(DataError, match=r"has 3 entries with ids up to 2,147,483,647"):
        json_tokenizer(json.dumps(spec).encode(), name="t")


def test_a_panic_of_the_library_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):  # what Rust's panics are: no Exception
        pass

    def panic(*_: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr("epmoe.data.tokenizer.hide_controls", panic)
    with pytest.raises(DataError, match="index out of bounds"):
        byte_level(special=True)
