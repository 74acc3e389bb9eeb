"""Long lines of JSON in blocks: the text is that of the line in one piece."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from epmoe.config import SourceConfig
from epmoe.data import long_lines, passages
from epmoe.data.corpora import scan
from epmoe.data.long_lines import blocks, outline
from epmoe.data.passages import Passage, read_piece
from epmoe.errors import DataError

LETTERS = st.text(st.characters(codec=None, exclude_categories=()), max_size=60)
SIZE = 13  # an escaped pair has twelve bytes


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines and blocks so short that every kind of cut happens."""
    for module, name, value in ((long_lines, "BLOCK_BYTES", SIZE), (passages, "LONG_BYTES", 2 * SIZE)):
        monkeypatch.setattr(module, name, value)


def joined(line: bytes, start: int, end: int) -> str:
    found = list(blocks(line, (start, end)))
    assert [last for _, _, last in found] == [False] * (len(found) - 1) + [True] * bool(found)
    return "".join(text for text, _, _ in found)


@settings(max_examples=300, deadline=None)
@given(LETTERS, st.booleans())
@example("\ud83d" * 9 + "x", True)
@example("\\ud83d\\\\" * 7, True)
@example("\U0001f9ed" * 20, False)
@example('"\\/\b\f\n\r\t' * 9, False)
def test_blocks_add_up_to_the_string(text: str, escaped: bool) -> None:
    data = json.dumps(text, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    try:
        whole = json.loads(data.decode())
    except UnicodeDecodeError:  # half a pair that is not spelled out
        return
    assert joined(data, 0, len(data)) == whole


def read(path: Path, **options: object) -> list[tuple[str, str, bool]]:
    """Text, split and ``replaced`` of every document of a file of JSON lines."""
    corpus = scan(SourceConfig.model_validate({"name": "j", "path": str(path), "format": "jsonl", **options}))
    found: list[tuple[str, str, bool]] = []
    parts: list[Passage] = []
    for piece in corpus.pieces:
        for part in read_piece(corpus, piece):
            parts.append(part)
            if part.last:
                assert len({(p.split, p.replaced) for p in parts}) == 1
                found.append(("".join(p.text for p in parts), part.split, part.replaced))
                parts = []
    assert not parts
    return found


LONG = "αβγ \U0001f9ed plain words and \\ more " * 5
LINES = [
    json.dumps({"text": LONG}).encode(),
    json.dumps({"text": LONG}, ensure_ascii=False).encode(),
    b"\xef\xbb\xbf" + json.dumps({"id": 3, "text": LONG, "meta": {"text": "x" * 90, "list": [LONG] * 2}}).encode(),
    json.dumps({"html": LONG, "text": "short"}).encode(),
    json.dumps({"html": LONG, "text": ""}).encode(),
    b'{"text": "' + b"first " * 9 + b'", "text": "' + b"second " * 9 + b'"}',
    b'{"te\\u0078t": "' + b"a key with an escape " * 5 + b'"}',
    b'{"text": "' + b"broken \xff bytes \xc3" * 5 + b'"}',
    b'{"text": "' + b"half a pair \\ud83d, then " * 5 + b'"}',
    b'{"text": "' + b"\\ud83d" * 8 + b"\\ud83d\\ude00" * 8 + b'"}',
    b" " * 70,
]  # fmt: skip


def test_records_are_those_of_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    with monkeypatch.context() as patched:
        patched.setattr(passages, "LONG_BYTES", 10**9)
        whole = read(path)
    assert len(whole) == len(LINES) - 1
    assert read(path) == whole


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "' + b"no end " * 9,
        b'{"text": "' + b"tab \t inside " * 9 + b'"}',
        b'{"text": "' + b"bad escape \\q " * 9 + b'"}',
        b'{"text": "' + b"cut escape \\u12" * 9 + b'"}',
        b'{"text": "good", "other": "' + b"bad \\q " * 9 + b'"}',
        b'{"other": "' + b"there is no text " * 9 + b'"}',
        b'["' + b"a list " * 9 + b'"]',
        b'"' + b"a string " * 9 + b'"',
        b'{"text": ["' + b"inside " * 9 + b'"]}',
        b'{"text": "' + b"more behind " * 9 + b'"} {}',
    ],
)
def test_what_is_wrong_is_told_as_of_a_whole_line(
    line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps({"text": LONG}).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read(path)
    monkeypatch.setattr(passages, "LONG_BYTES", 10**9)
    with pytest.raises(DataError) as of_whole:
        read(path)
    assert str(caught.value) == str(of_whole.value)
    assert ":2: " in str(caught.value)


def test_marks_are_of_long_strings_only() -> None:
    value, spans = outline(b'{"a": "' + b"x" * 40 + b'", "b": "short"}')
    assert value["b"] == "short"
    assert spans == {value["a"]: (6, 48)}
