"""Preparation: exact, parallel, cached, resumable after a kill, atomic, stoppable, and honest about bad input."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epmoe.config import DataConfig
from epmoe.data import corpora
from epmoe.data.corpora import is_validation, scan
from epmoe.data.files import crc32_of
from epmoe.data.foreign import facts_path
from epmoe.data.indexed import bin_path, idx_path, open_indexed
from epmoe.data.loader import TrainData
from epmoe.data.prepare import prepare
from epmoe.data.prepared import (
    PreparedData,
    PreparedSplit,
    check_trainable,
    open_prepared,
    open_split,
    verify_split,
)
from epmoe.data.shards import encode_document
from epmoe.data.tokenizer import ByteTokenizer, train_bpe
from epmoe.errors import ConfigError, DataError, Preempted
from tests.patience import HANGS_S
from tests.unit.data.helpers import config, text, write_folder, write_jsonl, write_pair


def decoded(split: PreparedSplit, prepared: PreparedData) -> list[str]:
    pair = open_split(split, prepared.tokenizer)
    offsets = pair.document_offsets
    texts = []
    for i in range(pair.num_documents):
        ids = pair.tokens[offsets[i] : offsets[i + 1]].tolist()
        assert ids[-1] == prepared.tokenizer.eos_id
        texts.append(prepared.tokenizer.decode(ids[:-1]))
    return texts


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def several_shards(tmp_path: Path, **options: object) -> DataConfig:
    """2.3 MiB of JSONL: three shards."""
    path = tmp_path / "big.jsonl"
    if not path.exists():
        line = json.dumps({"text": text(1, 8000)})
        path.write_text("".join(f'{{"n": {i}, {line[1:]}\n' for i in range(2_400_000 // len(line))))
    return config(tmp_path, path, **options)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_documents_come_back_exactly_and_only_training_text_trains(tmp_path: Path, tokenizer: str) -> None:
    folder = write_folder(tmp_path / "texts", 80)
    (folder / "part0" / "empty.txt").touch()
    (folder / "part0" / "latin.txt").write_bytes(b"caf\xe9 " * 9)
    cfg = config(tmp_path, folder, tokenizer=tokenizer, vocab_size=300)
    prepared = prepare(cfg)
    [source] = prepared.sources
    assert source.val is not None
    texts: dict[str, list[str]] = {"train": [], "val": []}
    for piece in scan(cfg.sources[0]).pieces:
        value = Path(piece.path).read_bytes().decode(errors="replace")
        texts["val" if is_validation(piece.name.encode()) else "train"].append(value)
    train = [value for value in texts["train"] if value]
    assert decoded(source.train, prepared) == train
    assert decoded(source.val, prepared) == texts["val"]
    assert source.train.facts.utf8_bytes == sum(len(value.encode()) for value in train)
    assert source.train.facts.documents == len(train)
    assert (source.train.empty, source.train.replaced) == (1, 1)
    if tokenizer == "bpe":
        assert prepared.tokenizer.sha256 == train_bpe(texts["train"], 300).sha256
        assert prepared.padded_vocab_size == 320


def test_validation_documents_of_a_jsonl_do_not_train_the_tokenizer(tmp_path: Path) -> None:
    texts = [text(i, 40) + f" only{i}here" * 5 for i in range(60)]
    train = [value for value in texts if not is_validation(value.encode())]
    assert 0 < len(train) < 60
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": value} for value in texts])
    prepared = prepare(config(tmp_path, path, tokenizer="bpe", vocab_size=350))
    assert prepared.tokenizer.sha256 == train_bpe(train, 350).sha256 != train_bpe(texts, 350).sha256


def test_preparation_does_not_import_torch() -> None:
    code = "import sys, epmoe.cli.prepare, epmoe.data.workers, epmoe.data.yardsticks; sys.exit('torch' in sys.modules)"
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | path, check=False).returncode == 0


def test_several_processes_give_the_same_bytes_as_one(tmp_path: Path) -> None:
    cfg = several_shards(tmp_path)
    alone = prepare(cfg)
    together = prepare(cfg.model_copy(update={"cache": str(tmp_path / "other"), "num_workers": 2}))
    assert files_of(alone.folder) == files_of(together.folder)
    assert alone.fingerprint == together.fingerprint
    facts = alone.sources[0].train.facts
    prefix = alone.sources[0].train.prefix
    assert facts.bin_crc32 == crc32_of(bin_path(prefix))
    assert facts.idx_crc32 == crc32_of(idx_path(prefix))


def test_prepared_data_is_found_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 10)
    cfg = config(tmp_path, folder)
    first = prepare(cfg)
    stamp = (first.folder / "prepared.json").stat().st_mtime_ns
    again = prepare(cfg.model_copy(update={"seq_len": 32, "vocab_multiple": 8, "cross_document": False}))
    assert again.folder == first.folder
    assert (again.folder / "prepared.json").stat().st_mtime_ns == stamp
    assert again.padded_vocab_size == 264
    bpe = prepare(cfg.model_copy(update={"tokenizer": "bpe", "vocab_size": 280}))
    (folder / "part0" / "000.txt").write_text("another text")
    changed = prepare(cfg)
    assert len({first.folder, bpe.folder, changed.folder}) == 3
    assert len({first.fingerprint, bpe.fingerprint, changed.fingerprint}) == 3
    assert not list(Path(cfg.cache).glob(".*.work"))


def run_prepare(cfg: DataConfig, fault: str) -> subprocess.CompletedProcess[str]:
    """Prepares in a process of its own, with a planned fault."""
    code = (
        "import sys; from epmoe.config import DataConfig; from epmoe.data.prepare import prepare;"
        "prepare(DataConfig.model_validate_json(sys.argv[1]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, cfg.model_dump_json()],
        env={**os.environ, "EPMOE_FAULT": fault, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=False,
    )


@pytest.mark.parametrize(("step", "workers", "finished"), [(1, 1, 1), (1, 2, 1), (4, 1, 3)])
def test_killed_preparation_continues(tmp_path: Path, step: int, workers: int, finished: int) -> None:
    cfg = several_shards(tmp_path, num_workers=workers)
    killed = run_prepare(cfg, f"point=data.prepare,step={step},action=kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cache = Path(cfg.cache)
    assert not list(cache.glob("*/prepared.json"))
    assert not [p for p in cache.iterdir() if not p.name.startswith(".")]
    [work] = cache.glob(".*.work")
    shards = {p: p.stat().st_mtime_ns for p in sorted((work / "shards").glob("[!.]*"))}
    # A worker may finish the shard it was at after its parent died; run() waited for its standard error to close.
    assert finished <= len(shards) <= finished + workers - 1
    remade: list[int] = []

    def watch(phase: str, done: int, total: int) -> None:
        if phase == "tokenising":
            remade.append(done)
            assert shards == {p: p.stat().st_mtime_ns for p in shards}

    resumed = prepare(cfg, progress=watch)
    assert len(remade) == 3 - len(shards)
    clean = prepare(cfg.model_copy(update={"cache": str(tmp_path / "clean")}))
    assert files_of(resumed.folder) == files_of(clean.folder)
    assert not work.exists()


def test_stop_flag_between_shards(tmp_path: Path) -> None:
    cfg = several_shards(tmp_path)
    done: list[int] = []

    def report(phase: str, finished: int, total: int) -> None:
        if phase == "tokenising":
            done.append(finished)

    with pytest.raises(Preempted, match="asked to stop") as caught:
        prepare(cfg, progress=report, should_stop=lambda: len(done) == 2)
    assert caught.value.exit_code == 75
    assert len(list(Path(cfg.cache).glob(".*.work/shards/[!.]*"))) == 2
    prepare(cfg, progress=report)
    assert len(done) == 3


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_stop_flag_anywhere_leaves_nothing_half_done(tmp_path: Path, calls: int) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 5), tokenizer="bpe", vocab_size=270)
    polls: Iterator[int] = iter(range(calls))
    with pytest.raises(Preempted):
        prepare(cfg, should_stop=lambda: next(polls, None) is None)
    assert not list(Path(cfg.cache).glob("[!.]*"))
    assert prepare(cfg).sources[0].train.facts.documents > 0


def test_stop_flag_inside_a_long_document(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(text(1, 1000) * 1000)
    cfg = config(tmp_path, tmp_path / "long.txt")
    polls: list[int] = []
    prepare(cfg, should_stop=lambda: polls.append(1) or False)  # type: ignore[func-returns-value]
    assert len(polls) > 6  # once for each megabyte, and around


def test_stop_flag_ends_the_workers(tmp_path: Path) -> None:
    cfg = several_shards(tmp_path, num_workers=2)
    done: list[int] = []
    with pytest.raises(Preempted):
        prepare(cfg, progress=lambda phase, n, _: done.append(n), should_stop=lambda: len(done) > 4)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_workers_ignore_sigterm_and_their_death_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = several_shards(tmp_path, num_workers=2)
    monkeypatch.setenv("EPMOE_FAULT", "point=data.worker,step=1,action=kill")
    with pytest.raises(
        DataError, match=r"ended with exit code -9(.|\n)*big\.jsonl(.|\n)*run the command again"
    ):
        prepare(cfg)
    monkeypatch.setenv("EPMOE_FAULT", "point=data.worker,action=term")
    assert prepare(cfg).sources[0].train.facts.documents > 0


def test_a_full_disk_is_an_error_the_next_run_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 5))
    monkeypatch.setenv("EPMOE_FAULT", "point=data.prepare,action=enospc")
    with pytest.raises(DataError, match=r"cannot be prepared in .*cache\n.*No space left"):
        prepare(cfg)
    monkeypatch.delenv("EPMOE_FAULT")
    prepare(cfg)


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 5))
    key = prepare(cfg).folder.name
    shutil.rmtree(Path(cfg.cache) / key)
    polls: list[int] = []
    with (Path(cfg.cache) / f".{key}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Preempted):
            prepare(cfg, should_stop=lambda: polls.append(1) or len(polls) > 7)  # type: ignore[func-returns-value]
    assert not (Path(cfg.cache) / key).exists()
    prepare(cfg)


def test_what_is_prepared_needs_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 5))
    first = prepare(cfg)
    for file in Path(cfg.cache).glob(".*"):
        file.unlink()

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("epmoe.data.known.write_atomically", read_only)
    assert prepare(cfg).fingerprint == first.fingerprint
    assert [path.name for path in Path(cfg.cache).iterdir()] == [first.folder.name]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_an_end_of_text_token_that_would_be_ignored_is_refused(tmp_path: Path, tokenizer: str) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 5), tokenizer=tokenizer, eos_token="</s>")
    with pytest.raises(
        ConfigError, match=rf"data\.eos_token='</s>' has no effect with data\.tokenizer={tokenizer}"
    ):
        prepare(cfg)


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "texts", 6)
    (folder / "image.png").write_bytes(b"PNG\0")
    jsonl = write_jsonl(tmp_path / "x.jsonl", [{"text": text(i, 50)} for i in range(5)])
    cfg = config(tmp_path, folder, jsonl)
    first = prepare(cfg)
    read: list[str] = []
    for function in ("form_of", "_text_cuts", "_line_cuts"):
        original = getattr(corpora, function)

        def watched(path: Path, original: Callable[[Path], Any] = original) -> Any:
            read.append(path.name)
            return original(path)

        monkeypatch.setattr(corpora, function, watched)
    again = prepare(cfg)
    assert read == []
    assert (again.folder, again.sources) == (first.folder, first.sources)
    assert "1 file(s) with NUL bytes" in again.sources[0].sentence

    changed = folder / "part0" / "003.txt"
    times = changed.stat()
    changed.write_bytes(changed.read_bytes()[::-1])
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copying tool would
    other = prepare(cfg)
    assert read == ["003.txt", "003.txt"]  # its form, then all of it
    assert other.fingerprint != first.fingerprint

    for kept in Path(cfg.cache).glob(".*.files"):
        kept.write_text('{"x": 1}')
    read.clear()
    assert prepare(cfg).fingerprint == other.fingerprint
    assert len(read) == 8 + 7  # of the image only what it is


def test_malformed_line_found_by_a_worker(tmp_path: Path) -> None:
    cfg = several_shards(tmp_path, num_workers=2)
    path = Path(cfg.sources[0].path)
    lines = path.read_text().splitlines()
    lines[-2] = "{"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"big\.jsonl:{len(lines) - 1}: not valid JSON"):
        prepare(cfg)


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    cfg = several_shards(tmp_path)
    with pytest.raises(Preempted):
        prepare(cfg, should_stop=lambda: len(list(Path(cfg.cache).glob(".*.work/shards/[!.]*"))) == 2)
    shard = sorted(Path(cfg.cache).glob(".*.work/shards/[!.]*"))[1]
    tokens = bytearray((shard / "train.bin").read_bytes())
    tokens[1000] ^= 1
    (shard / "train.bin").write_bytes(tokens)
    with pytest.raises(DataError, match=r"s0-00001 is damaged(.|\n)*checksums(.|\n)*run the command again"):
        prepare(cfg)
    prepare(cfg)


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    cfg = config(tmp_path, tmp_path / "a.txt", seq_len=11)
    with pytest.raises(
        DataError, match=r"s0 has 11 training tokens in 1 documents \(10 bytes\), one window needs 12"
    ):
        TrainData(prepare(cfg), cfg, 0)
    prepared = prepare(cfg.model_copy(update={"seq_len": 10}))
    assert TrainData(prepared, cfg.model_copy(update={"seq_len": 10}), 0).num_windows == (1,)
    (tmp_path / "b.txt").touch()
    with pytest.raises(DataError, match=r"s0 has 0 training tokens in 0 documents \(0 bytes\)"):
        check_trainable(prepare(config(tmp_path, tmp_path / "b.txt")), 16)
    write_jsonl(tmp_path / "c.jsonl", [])
    with pytest.raises(DataError, match="s0 has 0 training tokens"):
        check_trainable(prepare(config(tmp_path, tmp_path / "c.jsonl", tokenizer="bpe")), 16)


def test_ranges_that_leave_nothing_to_learn(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "0123456789", "loss": []}] * 3)
    with pytest.raises(DataError, match="s0 has 30 bytes of training text, and 0 of them count"):
        check_trainable(prepare(config(tmp_path, path, seq_len=4, source={"loss_field": "loss"})), 4)
    some = write_jsonl(tmp_path / "y.jsonl", [{"text": "0123456789", "loss": [[0, 2]]}])
    cfg = config(tmp_path, some, seq_len=4, source={"loss_field": "loss", "val_path": str(path)})
    assert prepare(cfg).sources[0].val is None


def test_a_prepared_pair_is_a_source_of_its_own(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 60), tokenizer="bpe", vocab_size=280)
    first = prepare(cfg)
    [source] = first.sources
    assert source.val is not None
    indexed = config(
        tmp_path, source.train.prefix, tokenizer="bpe", source={"val_path": str(source.val.prefix) + ".bin"}
    )
    second = prepare(indexed)
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert second.fingerprint == first.fingerprint
    other = train_bpe(["another text"], 270)
    other.save(tmp_path / "other")
    wrong = indexed.model_copy(update={"tokenizer": str(tmp_path / "other")})
    with pytest.raises(
        DataError, match=rf"made with tokenizer {first.tokenizer.sha256}.*\(bpe\) is {other.sha256}"
    ):
        prepare(wrong)


def test_a_foreign_pair_needs_a_tokenizer_and_gets_its_facts(tmp_path: Path) -> None:
    write_pair(tmp_path / "t", [[*b"one two"], [*b"three", 256], []])
    write_pair(tmp_path / "v", [[*"é!".encode()], [*b"z", 256]])
    cfg = config(tmp_path, tmp_path / "t", seq_len=4, source={"val_path": str(tmp_path / "v")})
    with pytest.raises(DataError, match="their tokenizer is unknown"):
        prepare(cfg.model_copy(update={"tokenizer": "bpe"}))
    prepared = prepare(cfg)
    train, val = prepared.sources[0].train.facts, prepared.sources[0].val
    assert val is not None
    assert (train.documents, train.tokens, train.missing_eos, train.stream_tokens) == (3, 13, 1, 14)
    assert (train.utf8_bytes, val.facts.utf8_bytes) == (None, 4)
    assert not facts_path(tmp_path / "t").exists()


def test_damage_after_preparation(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 10))
    prepared = prepare(cfg)
    split, tokenizer = prepared.sources[0].train, prepared.tokenizer
    verify_split(split, tokenizer)
    good = bin_path(split.prefix).read_bytes()
    bin_path(split.prefix).write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    open_split(split, tokenizer)
    with pytest.raises(DataError, match=r"s0\.train\.bin: crc32 is \d+, expected \d+"):
        verify_split(split, tokenizer)
    bin_path(split.prefix).write_bytes(good[:-2])
    with pytest.raises(DataError, match=rf"has {len(good) - 2} bytes, expected {len(good)}"):
        open_split(split, tokenizer)
    write_pair(split.prefix, [[1, 2, 3]])
    with pytest.raises(DataError, match=r"documents is 1, expected \d"):
        open_split(split, tokenizer)
    record = prepared.folder / "prepared.json"
    record.write_text(record.read_text().replace('"documents"', '"papers"'))
    with pytest.raises(DataError, match=r"prepared\.json is damaged(.|\n)*documents: Field required"):
        open_prepared(prepared.folder, cfg)


@pytest.mark.parametrize("beside", ['{"license": "cc0"}', "[1]", "no JSON", '{"tokenizer": "x"}'])
def test_a_json_of_somebody_else_beside_a_pair_says_nothing(tmp_path: Path, beside: str) -> None:
    pair = write_pair(tmp_path / "p", [[*range(40), 256]])
    cfg = config(tmp_path, pair, source={"val_path": str(pair)})
    wanted = prepare(cfg).sources[0].train.facts
    facts_path(pair).write_text(beside)
    assert prepare(cfg).sources[0].train.facts == wanted
    assert facts_path(pair).read_text() == beside
    facts_path(pair).write_text(wanted.model_dump_json().replace('"documents":1', '"documents":-1'))
    with pytest.raises(DataError, match=r"p\.json is damaged(.|\n)*move it away"):
        prepare(cfg)


def test_no_advice_deletes_anything() -> None:
    for path in Path(corpora.__file__).parent.glob("*.py"):
        assert not re.search(r"fix=.*\b(delete|remove)\b(?! the line)", path.read_text()), path


def test_what_was_abandoned_is_swept_and_nothing_else(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 5))
    cache = Path(cfg.cache)
    for name in ("old", "held", "new"):
        (cache / f".{name}.work" / "shards").mkdir(parents=True)
        if name != "new":
            for place in (cache / f".{name}.work" / "shards", cache / f".{name}.work"):
                os.utime(place, (1e9, 1e9))
    with (cache / ".held.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        prepare(cfg)
    assert {path.name for path in cache.glob(".*.work")} == {".held.work", ".new.work"}


def test_an_interrupted_shard_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = several_shards(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("epmoe.data.shards.write_json", full)
        with pytest.raises(DataError, match="No space left"):
            prepare(cfg)
    [shards] = Path(cfg.cache).glob(".*.work/shards")
    assert list(shards.iterdir()) == []
    (shards / ".s0-00000.123").mkdir()  # of a process that was killed
    prepare(cfg)


def memory_of(cfg: DataConfig) -> int:
    """Largest resident size of a process that prepares, in bytes; getrusage would know its parent's."""
    code = (
        "import re, sys; from epmoe.config import DataConfig; from epmoe.data.prepare import prepare;"
        "prepare(DataConfig.model_validate_json(sys.argv[1]));"
        "print(re.search('VmHWM: *([0-9]+)', open('/proc/self/status').read().replace(chr(9), ' '))[1])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, cfg.model_dump_json()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    return 1024 * int(found.stdout)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_for_a_long_document(tmp_path: Path, suffix: str) -> None:
    """Two processes, because what a process once had it keeps. One letter beyond 16 bits makes four bytes of all."""
    sizes = (20_000, 24_000_000)
    used = []
    for size in sizes:
        value = (text(1, 4000) * 2000)[:size]
        path = tmp_path / f"{size}{suffix}"
        if suffix == ".jsonl":
            write_jsonl(path, [{"text": "\U0001f9ed" + value.encode("ascii", "replace").decode()}])
        else:
            path.write_text(value, encoding="utf-8")
        used.append(memory_of(config(tmp_path, path)))
    largest = (tmp_path / f"{sizes[1]}{suffix}").stat().st_size
    assert used[1] - used[0] < (3 * largest if suffix == ".jsonl" else largest)


def test_tokenizer_beside_the_data_must_be_theirs(tmp_path: Path) -> None:
    cfg = config(tmp_path, write_folder(tmp_path / "texts", 10))
    prepared = prepare(cfg)
    other = train_bpe(["x y z"], 260)
    with pytest.raises(DataError, match=f"made with tokenizer {ByteTokenizer().sha256}.*is {other.sha256}"):
        open_split(prepared.sources[0].train, other)
    other.save(prepared.folder / "tokenizer")
    with pytest.raises(DataError, match=f"made with tokenizer {ByteTokenizer().sha256}.*is {other.sha256}"):
        open_prepared(prepared.folder, cfg)


def test_loss_ranges_of_bpe_tokens() -> None:
    tokenizer = train_bpe(["def router(): return expert"] * 20, 300)
    value = "def router(): return expert"
    ids, offsets = tokenizer.encode_with_offsets(value)
    for ranges in (((0, 3),), ((4, 6), (14, 20)), ((26, 27),), (), ((0, len(value)),)):
        [(part, marks)] = encode_document(tokenizer, [value], ranges)
        assert part.ids.tolist() == ids
        assert marks.tolist() == [any(a < end and start < b for start, end in ranges) for a, b in offsets]
        assert marks.dtype == np.uint8


def test_masks_are_stored_beside_the_tokens(tmp_path: Path) -> None:
    records = [{"text": "abcdef", "loss": [[2, 4]]}, {"text": "whole text"}]
    path = write_jsonl(tmp_path / "x.jsonl", records)
    cfg = config(tmp_path, path, seq_len=4, source={"loss_field": "loss", "val_path": str(path)})
    split = prepare(cfg).sources[0].train
    mask = open_indexed(split.prefix).mask
    assert mask is not None
    assert mask.tolist() == [0, 0, 1, 1, 0, 0, 0] + [1] * 11
    assert (split.facts.utf8_bytes, split.facts.loss_utf8_bytes) == (16, 12)
