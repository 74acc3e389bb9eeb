"""Small corpora for the data tests."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from epmoe.config import DataConfig, SourceConfig
from epmoe.data.corpora import Corpus
from epmoe.data.indexed import IndexedWriter, token_dtype
from epmoe.data.passages import Passage, read_piece
from epmoe.data.passages import documents as passages_by_document

WORDS = ("the", "of", "router", "expert", "token", "slot", "rank", "loss", "é", "漢", "x=1", "return\n", "\n")


def text(seed: int, words: int) -> str:
    """Some words, the same for the same seed."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def write_folder(folder: Path, documents: int, words: int = 200) -> Path:
    """A folder with numbered text files in two levels."""
    for number in range(documents):
        file = folder / f"part{number % 3}" / f"{number:03d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text(number, words), encoding="utf-8")
    return folder


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def config(tmp_path: Path, *paths: Path, **options: Any) -> DataConfig:
    """A data section over these paths, named s0, s1 ...; bytes, one process, short windows."""
    source_options = options.pop("source", {})
    sources = tuple(
        SourceConfig(name=f"s{i}", path=str(path), **source_options) for i, path in enumerate(paths)
    )
    values: dict[str, Any] = {"tokenizer": "byte", "seq_len": 16, "num_workers": 1}
    return DataConfig(sources=sources, cache=str(tmp_path / "cache"), **(values | options))


def write_pair(prefix: Path, documents: list[list[int]], vocab_size: int = 257) -> Path:
    """A Megatron pair of these documents, as they are."""
    writer = IndexedWriter(prefix, token_dtype(vocab_size))
    flat = np.array([token for document in documents for token in document], np.int64)
    writer.add(flat, np.array([len(document) for document in documents], np.int64))
    writer.finish()
    return prefix


def documents(corpus: Corpus) -> list[Passage]:
    """Every document of a corpus, in one piece."""
    return [
        replace(first, text=first.text + "".join(part.text for part in others))
        for piece in corpus.pieces
        for first, others in passages_by_document(read_piece(corpus, piece))
    ]


def hand_built(lengths: list[int], pointers: list[int], documents: list[int], code: int = 8) -> bytes:
    """An index written number by number."""
    return b"".join(
        (
            b"MMIDIDX\x00\x00",
            struct.pack("<Q", 1),
            struct.pack("<B", code),
            struct.pack("<Q", len(lengths)),
            struct.pack("<Q", len(documents)),
            b"".join(struct.pack("<i", n) for n in lengths),
            b"".join(struct.pack("<q", n) for n in pointers),
            b"".join(struct.pack("<q", n) for n in documents),
        )
    )
