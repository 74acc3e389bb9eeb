"""Sources are what they seem: the form of the files decides, and whatever is not read is named or refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epmoe.config import SourceConfig
from epmoe.data.corpora import is_validation, on_one_side, refuse_as_source, scan
from epmoe.data.forms import form_of_bytes
from epmoe.data.prepare import prepare
from epmoe.data.prepared import source_lines, text_warning
from epmoe.errors import DataError
from tests.unit.data.helpers import config, documents, text, write_folder, write_jsonl

RECORDS = [{"id": i, "text": text(i, 30)} for i in range(20)]
PROSE = "# A corpus\n\nSome words about it.\n" * 40


def source(path: Path, **options: object) -> SourceConfig:
    return SourceConfig.model_validate({"name": "s", "path": str(path), **options})


def texts(path: Path, **options: object) -> list[str]:
    return [document.text for document in documents(scan(source(path, **options)))]


# ------------------------------------------------------------------------------------------- JSON
@pytest.mark.parametrize(
    "names", [["a.jsonl"], ["a.jsonl", "b.jsonl"], ["a.json", "b.ndjson"], ["a.JSONL", "b"]]
)
@pytest.mark.parametrize("folder", [True, False])
def test_json_lines_are_read_as_records_whatever_they_are_called(
    tmp_path: Path, names: list[str], folder: bool
) -> None:
    for name in names:
        write_jsonl(tmp_path / name, RECORDS)
    (tmp_path / "_SUCCESS").touch()  # an empty file says nothing
    wanted = [str(record["text"]) for record in RECORDS]
    if not folder:
        assert texts(tmp_path / names[0]) == wanted
        return
    assert texts(tmp_path) == wanted * len(names)
    assert texts(tmp_path, format="jsonl") == wanted * len(names)
    assert scan(source(tmp_path)).sentence.startswith(f"{len(names)} file(s) of JSON lines, ")


@pytest.mark.parametrize(
    "value",
    [json.dumps(RECORDS), json.dumps(RECORDS, indent=1), json.dumps(RECORDS[0], indent=1), '["a", "b"]\n'],
)
@pytest.mark.parametrize("folder", [True, False])
def test_json_that_is_no_lines_is_refused_unless_it_is_asked_for(
    tmp_path: Path, value: str, folder: bool
) -> None:
    file = tmp_path / "x.json"
    file.write_text(value)
    path = tmp_path if folder else file
    for options in ({}, {"format": "jsonl"}):
        with pytest.raises(
            DataError, match=r"1 file\(s\) in .* are JSON, but not one record per line: x\.json"
        ):
            scan(source(path, **options))
    assert texts(path, format="text")[0][:20] == value[:20]


def test_records_beside_prose_are_no_guess(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", RECORDS)
    (tmp_path / "README.md").write_text(PROSE * 100)
    with pytest.raises(DataError, match=r"1 file\(s\) of JSON \(data\.jsonl\) and 1 of text \(README\.md\)"):
        scan(source(tmp_path))
    corpus = scan(source(tmp_path, format="jsonl"))
    assert len(documents(corpus)) == 20
    assert corpus.left_out == ("1 file(s) that are no JSON lines (README.md)",)
    assert len(texts(tmp_path, format="text")) == 2
    assert len(texts(tmp_path, glob="*.jsonl")) == 20
    # Another key for the text: the size of the JSON decides.
    write_jsonl(tmp_path / "data.jsonl", [{"content": PROSE * 10}] * 30)
    with pytest.raises(DataError, match="of JSON"):
        scan(source(tmp_path))


def test_a_little_json_in_a_folder_of_text_is_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "code", 10)
    (folder / "package.json").write_text('{\n "name": "x"\n}\n')
    assert scan(source(folder)).kind == "files"
    assert len(texts(folder)) == 11


@pytest.mark.parametrize(
    "value",
    [
        "[1] Knuth, The Art",
        "[link](page) goes on",
        "{{ template }}",
        "[section]\nx = 1\n",
        "{ x = 1; }\n",
        "",
    ],
)
def test_prose_that_begins_with_a_bracket_is_text(value: str) -> None:
    assert form_of_bytes(value.encode(), whole=True).shape == "text"


@pytest.mark.parametrize("length", [10, 9000, 3_000_000])
def test_a_long_first_record_is_recognised(tmp_path: Path, length: int) -> None:
    write_jsonl(tmp_path / "x", [{"n": 1, "text": "é" * length}] * 2)
    assert texts(tmp_path / "x") == ["é" * length] * 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"text": null}', "its value is null"),
        ('{"text": 3}', "its value is a number"),
        ('{"body": "x"}', "the line has the keys 'body'"),
        ('"text"', "the line holds text, not an object"),
    ],
)
def test_a_record_without_text_says_what_is_there(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(DataError, match=f"no text under the key 'text'\n  why: {why}"):
        texts(tmp_path / "x.jsonl")


# ------------------------------------------------------------------------------------------- packed
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "Parquet": lambda data: b"PAR1\x15\x04" + data + b"\0PAR1",
    "zstd": lambda data: b"\x28\xb5\x2f\xfd\x24" + data,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "token index": lambda data: b"MMIDIDX\0\0" + data,
    "NumPy": lambda data: b"\x93NUMPY\1\0v\0{'descr'" + data,
    "tar": lambda data: b"x" * 257 + b"ustar" + data,
}


@pytest.mark.parametrize("what", PACKERS)
def test_text_beside_packed_files_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "README.md").write_text(PROSE * 100)
    for number in range(3):
        (tmp_path / f"{number}.jsonl.packed").write_bytes(PACKERS[what](PROSE.encode()))
    for options in ({}, {"format": "jsonl"}):
        with pytest.raises(DataError, match=rf"3 of 4 file\(s\) in .* are packed .* \({what}\)"):
            scan(source(tmp_path, **options))
    with pytest.raises(DataError, match=rf"1 of 1 file\(s\) in .* \({what}\)"):
        scan(source(tmp_path / "0.jsonl.packed"))
    corpus = scan(source(tmp_path, format="text"))
    assert [piece.name for piece in corpus.pieces] == ["README.md"]
    assert corpus.left_out[0].startswith("3 packed file(s) (0.jsonl.packed")


@pytest.mark.parametrize("begins", ["BZh", "PAR1 is a golf term", "Rar!", "ORCs and elves", "Object"])
def test_text_that_begins_like_a_packed_file_is_text(begins: str) -> None:
    assert form_of_bytes((begins + PROSE).encode(), whole=True).shape == "text"


# ------------------------------------------------------------------------------------------- half a folder
SCAN = (
    "import os, sys\n"
    "from epmoe.config import SourceConfig; from epmoe.data.corpora import scan; from epmoe.errors import DataError\n"
    "if os.geteuid() == 0: os.setuid(65534)  # whom permissions bind\n"
    "try: print(len(scan(SourceConfig(path=sys.argv[1], glob=sys.argv[2])).pieces))\n"
    "except DataError as error: print(error.what)"
)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that another user reaches, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def seen_by_nobody(path: Path, glob: str = "**/*") -> str:
    return subprocess.run(
        [sys.executable, "-c", SCAN, str(path), glob],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize("mode", [0o000, 0o711, 0o444])
def test_a_folder_that_cannot_be_listed_is_refused(shared: Path, mode: int) -> None:
    write_folder(shared / "texts", 9)
    assert seen_by_nobody(shared / "texts") == "9"
    hidden = shared / "texts" / "part1"
    hidden.chmod(mode)
    assert str(hidden) in seen_by_nobody(shared / "texts")
    assert "cannot be read" in seen_by_nobody(shared / "texts")
    assert seen_by_nobody(shared / "texts", "part0/*") == "3"  # not asked for, not missed
    (shared / "texts").chmod(0)
    assert "cannot be read" in seen_by_nobody(shared / "texts")
    assert "cannot be read" in seen_by_nobody(shared / "texts" / "part0")
    (shared / "texts").chmod(0o755)
    hidden.chmod(0o755)


def test_an_unreadable_file_is_refused(shared: Path) -> None:
    file = write_folder(shared / "texts", 3) / "part0" / "000.txt"
    file.chmod(0)
    assert seen_by_nobody(shared / "texts") == f"{file} cannot be read"


def test_links_are_followed_counted_or_refused(tmp_path: Path) -> None:
    folder, elsewhere = write_folder(tmp_path / "texts", 3), write_folder(tmp_path / "more", 5)
    (folder / "linked.txt").symlink_to(elsewhere / "part0" / "000.txt")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "circle").symlink_to(folder)
    corpus = scan(source(folder))
    assert len(corpus.pieces) == 4
    assert corpus.left_out == ("2 linked folder(s), which ** does not enter",)
    assert len(scan(source(folder, glob="linked/*/*")).pieces) == 5
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"nowhere is a link to .*gone, which is not there"):
        scan(source(folder))
    assert len(scan(source(folder, glob="**/*.txt")).pieces) == 4


def test_what_is_no_regular_file_and_what_is_hidden_are_counted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 3)
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
    (folder / ".notes").mkdir()
    (folder / ".notes" / "a.txt").write_text("a")
    corpus = scan(source(folder))
    assert len(corpus.pieces) == 3
    assert corpus.left_out == ("1 hidden name(s)", "2 pipe(s), socket(s) or device(s)")
    assert len(scan(source(folder, glob=".notes/*")).pieces) == 1


@pytest.mark.parametrize(
    ("glob", "count"),
    [
        ("**/*.txt", 6),
        ("*/*", 6),
        ("part[01]/*", 4),
        ("**", 6),
        ("part0/000.txt", 1),
        ("./**/003.txt", 1),
        ("part?/**/*", 6),
    ],
)
def test_patterns(tmp_path: Path, glob: str, count: int) -> None:
    folder = write_folder(tmp_path / "texts", 6)
    names = [piece.name for piece in scan(source(folder, glob=glob)).pieces]
    assert len(names) == count
    assert names == sorted(set(names))
    if glob != "**":
        assert names == sorted(p.relative_to(folder).as_posix() for p in folder.glob(glob) if p.is_file())


@pytest.mark.parametrize("glob", [".", "/etc/*", "../*", "a/../../*"])
def test_patterns_that_lead_out_of_the_folder_are_refused(tmp_path: Path, glob: str) -> None:
    write_folder(tmp_path, 3)
    with pytest.raises(DataError, match="does not work"):
        scan(source(tmp_path, glob=glob))


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(write_folder(tmp_path / "texts", 3))
    for name in (b"caf\xe9.txt", b"caf\xe8.txt"):
        Path(os.fsdecode(os.path.join(folder, name))).write_text("text")
    cfg = config(tmp_path, Path(os.fsdecode(folder)), num_workers=2)
    assert prepare(cfg).fingerprint == prepare(cfg).fingerprint


# ------------------------------------------------------------------------------------------- our own files
def test_the_cache_inside_a_source_is_no_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 40)
    cfg = config(tmp_path, folder).model_copy(update={"cache": str(folder / "cache")})
    first = prepare(cfg)
    for tokenizer in ("byte", "bpe"):  # the second one leaves a tokenizer.json
        again = prepare(cfg.model_copy(update={"tokenizer": tokenizer, "vocab_size": 300}))
        assert [s.train.facts.documents for s in again.sources] == [first.sources[0].train.facts.documents]
    assert prepare(cfg).fingerprint == first.fingerprint
    assert "2 folder(s) that epmoe wrote" in source_lines(prepare(cfg))[0]


def test_a_run_inside_a_source_is_no_text_and_is_none_itself(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 5)
    run = folder / "runs" / "first"
    run.mkdir(parents=True)
    (run / "run_status.json").write_text('{"state": "running"}')
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    corpus = scan(source(folder))
    assert (len(corpus.pieces), corpus.left_out) == (5, ("1 folder(s) that epmoe wrote",))
    with pytest.raises(DataError, match="holds what epmoe wrote"):
        scan(source(run))
    (run / "run_status.json").write_text('{"of": "somebody else"}')
    assert len(scan(source(folder, format="text")).pieces) == 7


# ------------------------------------------------------------------------------------------- splits
def test_equal_files_fall_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:03d}.txt").write_text(f"text {number // 2}" if number > 19 else "")
    [corpus] = on_one_side([scan(source(folder))])
    sides: dict[str, set[str | None]] = {}
    for piece in corpus.pieces:
        sides.setdefault(piece.sha256, set()).add(piece.split)
        if piece.end == 0 or int(piece.name[:3]) % 2 == 0:  # the first one of its kind, and empty files
            assert piece.split == ("val" if is_validation(piece.name.encode()) else "train")
    assert all(len(side) == 1 for sha, side in sides.items() if sha != corpus.pieces[0].sha256)
    moved = [p for p in corpus.pieces if (p.split == "val") != is_validation(p.name.encode())]
    assert moved, "no pair would have been torn apart"


def test_equal_files_of_two_sources_fall_on_one_side(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 60)
    whole, part = on_one_side([scan(source(folder)), scan(source(folder / "part0"))])
    side = {piece.sha256: piece.split for piece in whole.pieces}
    assert all(piece.split == side[piece.sha256] for piece in part.pieces)
    assert "val" in {piece.split for piece in part.pieces}
    named = scan(source(folder / "part1", val_path=str(folder / "part0")))
    for corpus in on_one_side([whole, named]):
        assert all((p.split == "val") or "part0" not in p.path for p in corpus.pieces)


def test_validation_that_is_training_text_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 6)
    warning = text_warning(prepare(config(tmp_path, folder, source={"val_path": str(folder / "part0")})))
    assert warning == "2 validation file(s) or pieces of source s0 are training text too"
    same = text_warning(prepare(config(tmp_path, folder, source={"val_path": str(folder)})))
    assert "6 validation file(s)" in str(same)
    assert text_warning(prepare(config(tmp_path, folder))) is None


def test_a_held_out_end_that_another_source_trains_on_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 6)
    files = sorted(folder.rglob("*.txt"))
    book = next(f for f in files if not is_validation(f.relative_to(folder).as_posix().encode()))
    warning = text_warning(prepare(config(tmp_path, folder, book)))
    assert warning == "1 validation file(s) or pieces of source s1 are training text too"


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_an_empty_val_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    train = tmp_path / "train.jsonl" if name.endswith("l") else write_folder(tmp_path / "texts", 5)
    with pytest.raises(DataError, match=rf"val_path '.*{name}' holds 0 documents with 0 tokens"):
        prepare(config(tmp_path, train, source={"val_path": str(tmp_path / name)}))


def test_path_and_val_path_have_one_format(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    (tmp_path / "val.txt").write_text(PROSE)
    with pytest.raises(DataError, match="path holds JSON lines, val_path text"):
        scan(source(tmp_path / "train.jsonl", val_path=str(tmp_path / "val.txt")))


# ------------------------------------------------------------------------------------------- byte order marks
def test_byte_order_marks_go(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone \ufeff two", encoding="utf-8")
    (tmp_path / "b.txt").write_text("one \ufeff two", encoding="utf-8")
    corpus = scan(source(tmp_path))
    assert [document.text for document in documents(corpus)] == ["one \ufeff two"] * 2
    assert len({piece.sha256 for piece in corpus.pieces}) == 1  # equal text, one side of the split
    (tmp_path / "only.txt").write_bytes(b"\xef\xbb\xbf")
    assert texts(tmp_path / "only.txt") == [""]
    lines = "".join("\ufeff" + json.dumps(record) + "\n" for record in RECORDS)  # several files joined
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    assert texts(tmp_path / "x.jsonl") == [record["text"] for record in RECORDS]


# ------------------------------------------------------------------------------------------- long texts
@pytest.mark.parametrize("ending", [b"", b"\xff", b"\xe6\xbc", "漢".encode()])
def test_a_text_of_many_blocks_is_that_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: bytes
) -> None:
    data = ("é漢字 words and\nlines\n" * 50).encode() + ending
    (tmp_path / "x.txt").write_bytes(data)
    (tmp_path / "y.txt").write_bytes(b"y")
    whole = {path: documents(scan(source(path))) for path in (tmp_path, tmp_path / "x.txt")}
    assert whole[tmp_path][0].text == data.decode(errors="replace")
    for size in (1, 7, 64):
        monkeypatch.setattr("epmoe.data.corpora.BLOCK_BYTES", size)
        monkeypatch.setattr("epmoe.data.passages.BLOCK_BYTES", size)
        for path, wanted in whole.items():
            found = documents(scan(source(path)))
            assert [(d.text, d.split) for d in found] == [(d.text, d.split) for d in wanted]


def test_a_run_in_the_folder_of_a_source_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 3)
    cfg = config(tmp_path, folder)
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link", folder / "part0" / ".."):
        with pytest.raises(DataError, match="is the folder of source s0"):
            refuse_as_source(cfg, out)
    for out in (folder / "runs", tmp_path, tmp_path / "texts2"):
        refuse_as_source(cfg, out)
