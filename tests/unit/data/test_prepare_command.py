"""``epmoe prepare`` and its progress lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from epmoe.cli.prepare import prepare
from epmoe.data.corpora import is_validation
from epmoe.data.indexed import bin_path
from epmoe.data.prepare import prepare as prepare_data
from epmoe.data.prepared import text_warning
from epmoe.data.progress import console_progress, plain_progress
from epmoe.errors import DataError
from tests.unit.data.helpers import config, write_folder


def command(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data:\n  sources:\n    - name: notes\n      path: {tmp_path / 'texts'}\n  tokenizer: byte\n"
    )
    prepare(file, [f"data.cache={tmp_path / 'cache'}", "data.seq_len=32"])


def test_prints_statistics_and_checks_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "texts", 60)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "image.png").write_bytes(b"PNG\0")
    num_val = sum(
        is_validation(name.relative_to(folder).as_posix().encode()) for name in folder.rglob("*.txt")
    )
    command(tmp_path)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1].startswith("source notes: 61 file(s) of text, ")
    assert lines[1].endswith(" kB; left out: 1 file(s) with NUL bytes, which are no text (image.png)")
    assert lines[2] == "tokenizer byte: 257 entries, 320 with padding"
    assert lines[4].split()[:3] == ["notes", "train", str(61 - num_val)]
    assert lines[5].split()[:3] == ["notes", "val", str(num_val)]
    assert lines[6] == "1 documents had bytes that are not UTF-8; each became U+FFFD"
    assert "prepare: tokenising" in err
    command(tmp_path)
    assert capsys.readouterr().out == out

    prepared = Path(lines[0].removeprefix("prepared "))
    tokens = bin_path(prepared / "notes.train")
    data = tokens.read_bytes()
    tokens.write_bytes(data[:-2] + b"\0\0")
    with pytest.raises(DataError, match="crc32"):
        command(tmp_path)


def test_no_warning_without_a_reason(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 5)
    assert text_warning(prepare_data(config(tmp_path, folder))) is None
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    assert text_warning(prepare_data(config(tmp_path, folder))) == (
        "1 documents had bytes that are not UTF-8; each became U+FFFD"
    )


def test_plain_lines_come_at_intervals_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    report = plain_progress("prepare", every_s=1000.0)
    for done in range(0, 5_000_001, 1_000_000):
        report("tokenising", done, 5_000_000)
    report("reading", 7, 0)
    assert capsys.readouterr().err == "prepare: tokenising 5.0 of 5.0 MB\n"
    report = plain_progress("prepare", every_s=0.0)
    report("reading", 1_500_000, 0)
    assert capsys.readouterr().err == "prepare: reading 1.5 MB\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console_progress() as report:
        report("tokenising", 1_000_000, 4_000_000)
        report("tokenising", 4_000_000, 4_000_000)
    err = capsys.readouterr().err
    assert "tokenising" in err
    assert "4.0" in err
