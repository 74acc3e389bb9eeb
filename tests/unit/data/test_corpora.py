"""Which documents a source has, in which order, and which of them are validation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from epmoe.config import SourceConfig
from epmoe.data.corpora import is_indexed, is_validation, scan
from epmoe.data.listing import STDLIB_SKIPPED
from epmoe.errors import DataError
from tests.unit.data.helpers import documents, write_folder, write_jsonl


def jsonl(path: Path, **options: object) -> SourceConfig:
    return SourceConfig.model_validate({"name": "j", "path": str(path), **options})


def test_split_rule_is_sha256_modulo_20() -> None:
    for key in (f"folder/{i}.py" for i in range(200)):
        expected = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 20 == 0
        assert is_validation(key.encode()) == expected


def test_standard_library() -> None:
    corpus = scan(SourceConfig())
    names = [piece.name for piece in corpus.pieces]
    assert names == sorted(names)
    assert "abc.py" in names
    assert len(names) > 300
    assert not any(set(name.split("/")[:-1]) & STDLIB_SKIPPED for name in names)
    assert not any("_sysconfigdata" in name or not name.endswith(".py") for name in names)
    for piece in corpus.pieces:
        assert piece.split == ("val" if is_validation(piece.name.encode()) else "train")
    assert {piece.split for piece in corpus.pieces} == {"train", "val"}
    assert scan(SourceConfig()).fingerprint == corpus.fingerprint


def test_folder_order_split_and_hidden_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 60)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("no text")
    corpus = scan(SourceConfig(path=str(folder)))
    names = [piece.name for piece in corpus.pieces]
    assert len(names) == 60
    assert names == sorted(names)
    for piece, document in zip(corpus.pieces, documents(corpus), strict=True):
        assert document.text == (folder / piece.name).read_text(encoding="utf-8")
        assert document.split == ("val" if is_validation(piece.name.encode()) else "train")


def test_fingerprint_is_that_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "a", 5), write_folder(tmp_path / "b", 5)
    scans = [scan(SourceConfig(path=str(folder))).fingerprint for folder in (first, second)]
    assert scans[0] == scans[1]
    (second / "part0" / "000.txt").write_text("changed")
    assert scan(SourceConfig(path=str(second))).fingerprint != scans[0]


def test_bytes_that_are_no_utf8_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ok \xff\xfe end")
    (tmp_path / "good.txt").write_text("fine é", encoding="utf-8")
    bad, good = documents(scan(SourceConfig(path=str(tmp_path))))
    assert (bad.text, bad.replaced) == ("ok \ufffd\ufffd end", True)
    assert (good.text, good.replaced) == ("fine é", False)


def test_files_with_a_nul_byte_at_the_beginning_are_no_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 3)
    text_only = scan(SourceConfig(path=str(folder)))
    (folder / "image.png").write_bytes(b"x" * 8191 + b"\0")
    corpus = scan(SourceConfig(path=str(folder)))
    assert corpus.left_out == ("1 file(s) with NUL bytes, which are no text (image.png)",)
    assert text_only.left_out == ()
    assert corpus.fingerprint == text_only.fingerprint
    (folder / "late.txt").write_bytes(b"x" * 8192 + b"\0")
    assert "late.txt" in [piece.name for piece in scan(SourceConfig(path=str(folder))).pieces]
    for path in (folder / "image.png", folder):
        with pytest.raises(DataError, match=r"none of the 1 file\(s\) in .* is text"):
            scan(SourceConfig(path=str(path), glob="*.png"))


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\rc\n")
    assert documents(scan(SourceConfig(path=str(tmp_path))))[0].text == "a\r\nb\rc\n"


def test_one_file_is_training_and_val_path_is_validation(tmp_path: Path) -> None:
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text(name)
    alone = documents(scan(SourceConfig(path=str(tmp_path / "train.txt"))))
    assert [(d.text, d.split) for d in alone] == [("train.txt", "train")]
    lines = "".join(f"line {i} of a book\n" for i in range(100))
    (tmp_path / "book.txt").write_text(lines)
    train, val = documents(scan(SourceConfig(path=str(tmp_path / "book.txt"))))
    assert (train.text + val.text, train.split, val.split) == (lines, "train", "val")
    assert val.text.startswith("line 9")
    assert 0.05 <= len(val.text) / len(lines) < 0.07
    (tmp_path / "book.txt").write_text("x" * 200)
    assert [len(d.text) for d in documents(scan(SourceConfig(path=str(tmp_path / "book.txt"))))] == [190, 10]
    both = documents(scan(SourceConfig(path=str(tmp_path / "train.txt"), val_path=str(tmp_path / "val.txt"))))
    assert [(d.text, d.split) for d in both] == [("train.txt", "train"), ("val.txt", "val")]


def test_missing_paths_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is neither a folder nor a file"):
        is_indexed(SourceConfig(path=str(tmp_path / "nothing")))
    with pytest.raises(DataError, match=r"0 files in .* match '\*\.md'"):
        scan(SourceConfig(path=str(tmp_path), glob="*.md"))
    with pytest.raises(DataError, match="does not exist"):
        scan(SourceConfig(path=str(tmp_path / "nothing"), format="text"))


def test_auto_looks_at_the_path(tmp_path: Path) -> None:
    for name in ("x.jsonl", "pair.bin", "pair.idx", "plain.txt"):
        (tmp_path / name).touch()
    sources = {name: SourceConfig(path=str(tmp_path / name)) for name in ("x.jsonl", "plain.txt")}
    assert {name: scan(source).kind for name, source in sources.items()} == {
        "x.jsonl": "jsonl",
        "plain.txt": "files",
    }
    assert all(
        is_indexed(SourceConfig(path=str(tmp_path / name))) for name in ("pair", "pair.bin", "pair.idx")
    )
    assert not any(map(is_indexed, [*sources.values(), SourceConfig()]))


def test_a_file_that_changes_after_the_scan_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    corpus = scan(SourceConfig(path=str(tmp_path)))
    file.write_text("after!")
    with pytest.raises(DataError, match="changed while it was being prepared"):
        documents(corpus)


def test_jsonl_splits_by_text_and_skips_blank_lines(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(100)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": t}) for t in texts) + "\n")
    found = documents(scan(jsonl(path)))
    assert [d.text for d in found] == texts
    assert [d.split for d in found] == ["val" if is_validation(t.encode()) else "train" for t in texts]
    assert {d.split for d in found} == {"train", "val"}


def test_jsonl_pieces_hold_whole_lines_and_know_their_line_numbers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "y" * 1000 + str(i)} for i in range(3000)])
    corpus = scan(jsonl(path))
    assert len(corpus.pieces) == 3
    assert len(documents(corpus)) == 3000
    lines = path.read_text().splitlines()
    lines[2777] = '{"text": "cut'
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"x\.jsonl:2778: not valid JSON"):
        documents(scan(jsonl(path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "no text under the key 'text'"),
        ('{"body": "x"}', r"no text under the key 'text'\n.*'body'"),
        ("[1, 2]", "no text under the key"),
        ("[" * 100_000, "not valid JSON"),
        ('{"text": "abc", "loss": [[0, 4]]}', r"\[0, 4\], which is no .* range of a text of 3 characters"),
        ('{"text": "abc", "loss": [[2, 1]]}', r"\[2, 1\]"),
        ('{"text": "abc", "loss": [[true, 2]]}', r"\[True, 2\]"),
        ('{"text": "abc", "loss": [0, 2]}', "holds 0"),
        ('{"text": "abc", "loss": "all"}', "holds 'all'"),
    ],
)
def test_malformed_jsonl_lines(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl:2: ") as caught:
        documents(scan(jsonl(path, loss_field="loss")))
    assert caught.match(message)


def test_loss_ranges_are_sorted_and_merged(tmp_path: Path) -> None:
    records = [
        {"text": "0123456789", "loss": [[7, 9], [0, 2], [2, 4], [5, 5], [8, 10]]},
        {"text": "no ranges given"},
        {"text": "none counts", "loss": []},
    ]
    found = documents(scan(jsonl(write_jsonl(tmp_path / "x.jsonl", records), loss_field="loss")))
    assert [d.loss_ranges for d in found] == [((0, 4), (7, 10)), None, ()]


def test_half_a_surrogate_pair_is_replaced_in_place(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    [found] = documents(scan(jsonl(tmp_path / "x.jsonl")))
    assert (found.text, found.replaced) == ("a\ufffdb 😀", True)
