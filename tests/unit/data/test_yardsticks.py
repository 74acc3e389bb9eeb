"""Yardsticks against a direct computation, and against each other."""

from __future__ import annotations

import json
import lzma
import math
from collections import Counter
from pathlib import Path

import pytest

from epmoe.data.corpora import scan
from epmoe.data.prepare import prepare
from epmoe.data.yardsticks import yardsticks
from epmoe.errors import DataError, Preempted
from tests.unit.data.helpers import config, documents, write_folder, write_jsonl, write_pair


def xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def test_against_direct_computation(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 60), tokenizer="bpe", vocab_size=300)
    prepared = prepare(cfg)
    corpus = scan(cfg.sources[0])
    texts: dict[str, list[str]] = {"train": [], "val": []}
    for document in documents(corpus):
        texts[document.split].append(document.text)
    train, val = ("".join(texts[split]).encode() for split in ("train", "val"))
    ids = {
        split: [i for t in texts[split] for i in [*prepared.tokenizer.encode(t), prepared.tokenizer.eos_id]]
        for split in texts
    }
    counts, total = Counter(ids["train"]), len(ids["train"]) + prepared.tokenizer.size
    bits = sum(-math.log2((counts[i] + 1) / total) for i in ids["val"][1:])

    found = yardsticks(prepared, "s0")
    assert found.unigram == pytest.approx(bits / len(val), rel=1e-12)
    assert found.xz == 8 * xz(val) / len(val)
    assert found.xz_after_train == 8 * (xz(train + val) - xz(train)) / len(val)
    assert found.xz_after_train < found.xz


def test_kept_beside_the_data_until_the_data_changes(tmp_path: Path) -> None:
    prepared = prepare(config(tmp_path, write_folder(tmp_path / "texts", 60)))
    first = yardsticks(prepared, "s0")
    cache = prepared.folder / "s0.yardsticks.json"
    kept = json.loads(cache.read_text())
    cache.write_text(json.dumps(kept | {"unigram": 1.0}))
    assert yardsticks(prepared, "s0").unigram == 1.0
    for damage in (json.dumps(kept | {"fingerprint": "other"}), json.dumps(kept | {"more": 1})):
        cache.write_text(damage)
        assert yardsticks(prepared, "s0") == first


def test_only_what_counts_in_the_loss_is_measured_by_the_unigram(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "x.jsonl", [{"text": "abcabc", "loss": [[3, 6]]}, {"text": "b", "loss": [[0, 1]]}]
    )
    cfg = config(tmp_path, path, seq_len=4, source={"loss_field": "loss", "val_path": str(path)})
    # Counted: a b c EOS b EOS, six tokens among 257 + 6.
    bits = sum(-math.log2(n / 263) for n in (2, 3, 2, 3, 3, 3))
    assert yardsticks(prepare(cfg), "s0").unigram == pytest.approx(bits / 4)


def test_text_that_cannot_be_rebuilt_is_not_compressed(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 60), tokenizer="bpe", vocab_size=300)
    source = prepare(cfg).tokenizer
    # A tokenizer that folds case gives back another text than it was given.
    folding = json.loads((prepare(cfg).folder / "tokenizer" / "tokenizer.json").read_text())
    folding["normalizer"] = {"type": "Replace", "pattern": {"String": "router"}, "content": "r"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(folding))
    found = yardsticks(prepare(cfg.model_copy(update={"tokenizer": str(tmp_path / "tokenizer.json")})), "s0")
    assert source.size == 300
    assert (found.unigram, found.xz, found.xz_after_train) == (None, None, None)
    assert found.xz_left_out == "its tokens do not give the text back exactly"


def test_long_text_is_not_compressed_and_a_full_disk_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare(config(tmp_path, write_folder(tmp_path / "texts", 60)))
    [source] = prepared.sources
    assert source.val is not None
    size = source.val.facts.utf8_bytes
    assert size is not None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("epmoe.data.yardsticks.write_json", full)
    monkeypatch.setattr("epmoe.data.yardsticks.XZ_LIMIT_BYTES", size)
    compressed = yardsticks(prepared, "s0")
    assert compressed.xz is not None
    assert compressed.xz_left_out is None
    monkeypatch.setattr("epmoe.data.yardsticks.XZ_LIMIT_BYTES", size - 1)
    found = yardsticks(prepared, "s0")
    assert (found.unigram, found.xz, found.xz_after_train) == (compressed.unigram, None, None)
    assert "would take too long" in str(found.xz_left_out)
    assert capsys.readouterr().err.count("s0.yardsticks.json cannot be written: No space left") == 2


def test_without_validation_text_and_when_stopped(tmp_path: Path) -> None:
    write_pair(tmp_path / "p", [[1] * 40])
    with pytest.raises(DataError, match="has no validation text to measure"):
        yardsticks(prepare(config(tmp_path, tmp_path / "p")), "s0")
    prepared = prepare(config(tmp_path, write_folder(tmp_path / "texts", 60)))
    with pytest.raises(Preempted):
        yardsticks(prepared, "s0", should_stop=lambda: True)
    assert not (prepared.folder / "s0.yardsticks.json").exists()
