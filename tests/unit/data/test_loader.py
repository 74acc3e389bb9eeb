"""Batches against a plain list of tokens: windows, padding, masks, segments, epochs, vocabulary."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from epmoe.config import DataConfig, SourceConfig
from epmoe.data.indexed import bin_path
from epmoe.data.loader import Batch, TrainData, ValidationData, validation_sets
from epmoe.data.prepare import prepare
from epmoe.data.prepared import PreparedData
from epmoe.errors import ConfigError, DataError
from tests.unit.data.helpers import config, hand_built, write_folder, write_jsonl, write_pair

EOS = 256


def paired(
    tmp_path: Path, train: list[list[int]], val: list[list[int]] | None = None, **options: object
) -> tuple[PreparedData, DataConfig]:
    """Prepared data of these documents, given as token ids."""
    write_pair(tmp_path / "train", train)
    source = SourceConfig(name="s", path=str(tmp_path / "train"))
    if val is not None:
        write_pair(tmp_path / "val", val)
        source = SourceConfig(name="s", path=str(tmp_path / "train"), val_path=str(tmp_path / "val"))
    cfg = DataConfig.model_validate(
        {"sources": (source,), "tokenizer": "byte", "cache": str(tmp_path / "cache"), **options}
    )
    return prepare(cfg), cfg


def stream_of(documents: list[list[int]]) -> list[tuple[int, int]]:
    """The plain twin: (token, document) one after the other, each document ended by one EOS, empty ones left out."""
    stream = []
    for number, document in enumerate(documents):
        ended = document if document and document[-1] == EOS else [*document, EOS]
        stream += [(token, number) for token in ended] if document else []
    return stream


DOCUMENT = st.lists(st.integers(0, 255), max_size=9).flatmap(
    lambda ids: st.sampled_from([ids, [*ids, EOS]])  # as Megatron writes it with and without --append-eod
)


@settings(deadline=None, max_examples=25)
@given(st.lists(DOCUMENT, min_size=1, max_size=8), st.integers(2, 7), st.booleans())
def test_windows_equal_the_plain_twin(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seq_len: int, cross: bool
) -> None:
    documents = [*documents, list(range(seq_len + 1))]
    prepared, cfg = paired(
        tmp_path_factory.mktemp("w"), documents, documents, seq_len=seq_len, cross_document=cross
    )
    stream, [validation] = stream_of(documents), validation_sets(prepared, cfg)
    assert validation.num_windows == math.ceil((len(stream) - 1) / seq_len)
    batch = validation.batch(range(validation.num_windows))
    for w in range(validation.num_windows):
        inputs = stream[w * seq_len : (w + 1) * seq_len]
        targets = stream[w * seq_len + 1 : (w + 1) * seq_len + 1]
        padding, missing = seq_len - len(inputs), seq_len - len(targets)
        assert batch.token_BS[w].tolist() == [t for t, _ in inputs] + [EOS] * padding
        assert batch.target_BS[w].tolist() == [t for t, _ in targets] + [EOS] * missing
        assert batch.loss_BS[w].tolist() == [True] * len(targets) + [False] * missing
        assert batch.context.valid_BS is not None
        assert batch.context.valid_BS[w].tolist() == [True] * len(inputs) + [False] * padding
    assert int(batch.loss_BS.sum()) == len(stream) - 1
    assert batch.target_BS[batch.loss_BS].tolist() == [t for t, _ in stream[1:]]


@pytest.mark.parametrize("cross", [True, False])
def test_document_boundaries(tmp_path: Path, cross: bool) -> None:
    prepared, cfg = paired(tmp_path, [[1, 2], [], [3], [4, 5, 6, 7]], seq_len=5, cross_document=cross)
    data = TrainData(prepared, cfg, seed=0)
    # stream: 1 2 E 3 E | 4 5 6 7 E
    batch = data.batch([n for n in range(4) if n < 2])
    rows = {row[0]: i for i, row in enumerate(batch.token_BS.tolist())}
    first, second = rows[1], rows[4]
    assert batch.token_BS[first].tolist() == [1, 2, EOS, 3, EOS]
    assert batch.target_BS[first].tolist() == [2, EOS, 3, EOS, 4]
    assert batch.token_BS[second].tolist() == [4, 5, 6, 7, EOS]
    assert batch.target_BS[second].tolist() == [5, 6, 7, EOS, EOS]
    if cross:
        assert batch.context.segment_BS is None
        assert batch.loss_BS[first].tolist() == [True] * 5
    else:
        assert batch.context.segment_BS is not None
        assert batch.context.segment_BS[first].tolist() == [0, 0, 0, 1, 1]
        assert batch.context.segment_BS[second].tolist() == [0, 0, 0, 0, 0]
        assert batch.loss_BS[first].tolist() == [True, True, False, True, False]
    assert batch.loss_BS[second].tolist() == [True, True, True, True, False]


def test_padding_is_a_segment_of_its_own(tmp_path: Path) -> None:
    prepared, cfg = paired(tmp_path, [[1, 2, 3, 4], [5]], seq_len=4, cross_document=False)
    data = TrainData(prepared, cfg, seed=0)  # 1 2 3 4 | E 5 E
    batch = data.batch([0, 1])
    [row] = [i for i, tokens in enumerate(batch.token_BS.tolist()) if tokens[0] == EOS]
    assert batch.context.segment_BS is not None
    assert batch.context.valid_BS is not None
    assert batch.token_BS[row].tolist() == [EOS, 5, EOS, EOS]
    assert batch.context.segment_BS[row].tolist() == [0, 1, 1, 2]
    assert batch.context.valid_BS[row].tolist() == [True, True, True, False]
    assert batch.loss_BS[row].tolist() == [False, True, False, False]


def test_fillers_are_invalid_everywhere(tmp_path: Path) -> None:
    prepared, cfg = paired(tmp_path, [list(range(40))], [list(range(40))], seq_len=8, cross_document=False)
    for data in (TrainData(prepared, cfg, seed=0), ValidationData(prepared, cfg, "s")):
        full, mixed = data.batch([0, 3]), data.batch([0, None, 3, None])
        for name in ("token_BS", "target_BS", "loss_BS"):
            assert torch.equal(getattr(full, name), getattr(mixed, name)[[0, 2]])
        assert mixed.context.valid_BS is not None
        assert mixed.context.sample_B is not None
        assert mixed.context.sample_B.tolist() == [0, -1, 3, -1]
        assert not mixed.context.valid_BS[[1, 3]].any()
        assert not mixed.loss_BS[[1, 3]].any()
        assert data.batch([None]).token_BS.shape == (1, 8)
        assert data.batch([]).token_BS.shape == (0, 8)


def test_an_epoch_has_every_window_once_and_epochs_differ(tmp_path: Path) -> None:
    ids = [[i % 256, i // 256] for i in range(300)]
    prepared, cfg = paired(tmp_path, ids, seq_len=7)
    data = TrainData(prepared, cfg, seed=5)
    [windows] = data.num_windows
    epochs = [data.batch(range(e * windows, (e + 1) * windows)) for e in range(2)]
    stream = stream_of(ids)
    for epoch in epochs:
        assert int(epoch.loss_BS.sum()) == len(stream) - 1
        rows = sorted(map(tuple, epoch.token_BS.tolist()))
        assert rows == sorted(
            tuple(([t for t, _ in stream[w * 7 : w * 7 + 7]] + [EOS] * 7)[:7]) for w in range(windows)
        )
        assert epoch.context.sample_B is not None
    assert not torch.equal(epochs[0].token_BS, epochs[1].token_BS)
    samples = [int(n) for epoch in epochs for n in epoch.context.sample_B]  # type: ignore[union-attr]
    assert samples == list(range(2 * windows))


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (4, 2), (8, 1), (2, 2)])
def test_world_size_and_micro_batch_do_not_change_a_sample(tmp_path: Path, world: int, micro: int) -> None:
    prepared, cfg = paired(tmp_path, [list(range(200))], seq_len=8)
    expected = TrainData(prepared, cfg, seed=1).batch(range(24))
    rows: dict[int, torch.Tensor] = {}
    for rank in range(world):
        data = TrainData(prepared, cfg, seed=1)  # as every rank makes its own
        for start in range(0, 24, world * micro):
            mine = range(start + rank * micro, start + (rank + 1) * micro)
            rows |= dict(zip(mine, data.batch(mine).token_BS, strict=True))
    assert torch.equal(torch.stack([rows[n] for n in range(24)]), expected.token_BS)


def test_sources_mix_in_exact_proportion(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        write_pair(tmp_path / name, [[value] * 100])
    sources = tuple(
        SourceConfig(name=name, path=str(tmp_path / name), weight=weight)
        for name, weight in (("a", 0.75), ("b", 0.25))
    )
    cfg = DataConfig(sources=sources, tokenizer="byte", seq_len=10, cache=str(tmp_path / "cache"))
    data = TrainData(prepare(cfg), cfg, seed=0)
    batch = data.batch(range(400))
    assert [(batch.token_BS == value).any(1).sum().item() for value in (1, 2)] == [300, 100]
    assert [sum(data.window_of(n)[0] == name for n in range(400)) for name in ("a", "b")] == [300, 100]


def test_loss_ranges_reach_the_batch(tmp_path: Path) -> None:
    records = [{"text": "question? answer", "loss": [[10, 16]]}, {"text": "é漢 x", "loss": [[1, 2]]}]
    path = write_jsonl(tmp_path / "x.jsonl", records)
    cfg = config(tmp_path, path, seq_len=24, source={"loss_field": "loss", "val_path": str(path)})
    prepared = prepare(cfg)
    for data in (TrainData(prepared, cfg, seed=0), ValidationData(prepared, cfg, "s0")):
        batch = data.batch([0])
        targets = batch.target_BS[0].tolist()
        counted = [t for t, counts in zip(targets, batch.loss_BS[0].tolist(), strict=True) if counts]
        # The answer with the end of text it reaches, then one character of three bytes.
        assert counted == [*b"answer", EOS, *"漢".encode()]
    assert ValidationData(prepared, cfg, "s0").utf8_bytes == len(b"answer") + 3


def test_bits_per_byte_of_a_uniform_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 60)
    cfg = config(tmp_path, folder, seq_len=50)
    prepared = prepare(cfg)
    [validation] = validation_sets(prepared, cfg)
    split = prepared.sources[0].val
    assert split is not None
    batch = validation.batch(range(validation.num_windows))
    assert validation.name == "s0"
    assert int(batch.loss_BS.sum()) == split.facts.tokens - 1
    assert validation.utf8_bytes == split.facts.tokens - split.facts.documents
    loss = float(batch.loss_BS.sum()) * math.log(257)
    assert loss / math.log(2) / validation.utf8_bytes == pytest.approx(math.log2(257), rel=0.01)


def test_a_batch_moves_as_one_value(tmp_path: Path) -> None:
    prepared, cfg = paired(tmp_path, [list(range(40))], seq_len=8)
    batch = TrainData(prepared, cfg, seed=0).batch([0, None])
    doubled = tree_map(
        lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) else leaf, batch
    )
    assert isinstance(doubled, Batch)
    assert doubled.token_BS.shape == (4, 8)
    assert doubled.context.sample_B.tolist() == [0, -1, 0, -1]
    assert batch.to("meta").loss_BS.device.type == "meta"
    assert batch.to("meta").context.valid_BS.device.type == "meta"  # type: ignore[union-attr]
    assert batch.token_BS.dtype == batch.target_BS.dtype == torch.int64


def test_a_wrong_id_is_named_with_its_document_and_offset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.bin: document 2, token 1: id 257 .* vocabulary of 257"):
        paired(tmp_path, [[1] * 30, [], [3, 257, 4], [5]], seq_len=4)


def test_an_id_that_turns_wrong_after_preparation(tmp_path: Path) -> None:
    prepared, cfg = paired(tmp_path, [[1] * 30, [], [3, 4, 4], [5]], seq_len=4)
    file = bin_path(tmp_path / "train")
    tokens = np.fromfile(file, "<u2")
    tokens[31] = 60000
    tokens.tofile(file)
    data = TrainData(prepared, cfg, seed=0)
    with pytest.raises(
        DataError, match=r"train\.bin: document 2, token 1: id 60000 .* vocabulary of 257"
    ) as caught:
        data.batch(range(data.num_windows[0]))
    assert caught.value.exit_code == 3


def test_negative_ids(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(np.array([1, 2, -3, 4], "<i4").tobytes())
    (tmp_path / "train.idx").write_bytes(hand_built([4], [0], [0, 1], code=4))
    cfg = config(tmp_path, tmp_path / "train", seq_len=2)
    with pytest.raises(DataError, match="document 0, token 2: id -3"):
        prepare(cfg)


def test_a_source_without_validation_text(tmp_path: Path) -> None:
    prepared, cfg = paired(tmp_path, [list(range(40))], seq_len=8)
    assert validation_sets(prepared, cfg) == []
    with pytest.raises(DataError, match="has no validation text"):
        ValidationData(prepared, cfg, "s")
    with pytest.raises(DataError, match="1 tokens, too few to validate on"):
        paired(tmp_path, [list(range(40))], [[EOS]], seq_len=8)  # one token predicts nothing


def test_windows_outside_the_data(tmp_path: Path) -> None:
    prepared, cfg = paired(tmp_path, [list(range(40))], [list(range(8))], seq_len=8)
    with pytest.raises(IndexError, match="window 1 of 1"):
        ValidationData(prepared, cfg, "s").batch([1])


def test_fingerprints_change_with_what_a_sample_number_means(tmp_path: Path) -> None:
    prepared, cfg = paired(tmp_path, [list(range(40))], seq_len=8)
    base = TrainData(prepared, cfg, seed=0)
    assert TrainData(prepared, cfg, seed=0).fingerprint == base.fingerprint
    for change in ({"seq_len": 9}, {"cross_document": False}):
        other = cfg.model_copy(update=change)
        assert TrainData(prepare(other), other, seed=0).fingerprint != base.fingerprint
    assert TrainData(prepared, cfg, seed=1).fingerprint != base.fingerprint
    other = cfg.model_copy(update={"vocab_multiple": 100})
    assert TrainData(prepare(other), other, seed=0).fingerprint == base.fingerprint
    assert (base.padded_vocab_size, TrainData(prepare(other), other, seed=0).padded_vocab_size) == (320, 300)
    write_pair(tmp_path / "train", [[*range(39), 7]])
    assert TrainData(prepare(cfg), cfg, seed=0).fingerprint != base.fingerprint


def test_a_weight_too_small_to_be_seen_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_pair(tmp_path / name, [[1] * 100])
    sources = [{"name": n, "path": str(tmp_path / n), "weight": w} for n, w in (("a", 1e6), ("b", 1.0))]
    cfg = DataConfig.model_validate(
        {"sources": tuple(sources), "tokenizer": "byte", "seq_len": 10, "cache": str(tmp_path / "cache")}
    )
    with pytest.raises(ConfigError, match="weight"):
        TrainData(prepare(cfg), cfg, seed=0)


def test_a_token_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    prepared, cfg = paired(tmp_path, [list(range(250)) * 60])
    data = TrainData(prepared, cfg, seed=0)
    data.batch(range(4))
    with bin_path(tmp_path / "train").open("r+b") as file:
        file.truncate(100)  # less than a page: what lies behind it would end this process
    with pytest.raises(DataError, match=r"train\.bin has shrunk from \d+ to 100 bytes"):
        data.batch(range(60))
