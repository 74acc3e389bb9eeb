"""Prepared data: a folder with token files, their facts, and the tokenizer they were made with.

<cache>/<key>/prepared.json          all of it, as described here
              tokenizer/             for load_tokenizer
              <source>.train.bin     and .idx, .mask where the loss has ranges, .json (the facts again, so that a
              <source>.val.bin       pair can be moved elsewhere and used as an ``indexed`` source)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from epmoe.config import DataConfig, SourceConfig
from epmoe.data.files import StopFlag, crc32_of, never_stop, read_json, stop_if
from epmoe.data.indexed import (
    TOKENS_AT_A_TIME,
    IndexedPair,
    bin_path,
    blocks_of,
    idx_path,
    mask_path,
    open_indexed,
)
from epmoe.data.tokenizer import Tokenizer, load_tokenizer, padded_vocab_size
from epmoe.errors import DataError

RECORD_FILE = "prepared.json"
TOKENIZER_FOLDER = "tokenizer"
FORMAT_VERSION: Literal[1] = 1

R = TypeVar("R", bound=BaseModel)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Facts(_Record):
    """What is known about a token file; the sidecar ``<prefix>.json``."""

    format: Literal[1] = FORMAT_VERSION
    tokenizer_sha256: str
    vocab_size: int = Field(ge=1)
    eos_id: int = Field(ge=0)
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    missing_eos: int = Field(ge=0)
    """Documents that do not end with end-of-text in the file; it is added when they are read."""
    utf8_bytes: int | None = Field(ge=0)
    """Bytes of the text; None = unknown (training tokens somebody else prepared)."""
    loss_utf8_bytes: int | None = Field(ge=0)
    """Bytes of the text that counts in the loss."""
    lost_share: float | None = Field(default=None, ge=0, le=1)
    """Share of the validation text's characters that its tokens do not give back; None = not known."""
    bin_crc32: int
    idx_crc32: int
    mask_crc32: int | None

    @property
    def stream_tokens(self) -> int:
        """Tokens of the document stream, every end-of-text included."""
        return self.tokens + self.missing_eos


class SplitRecord(_Record):
    """Training or validation part of a source, as stored."""

    prefix: str
    """Path of the pair without ``.bin``; a bare name lies in the prepared folder."""
    facts: Facts
    replaced: int = Field(ge=0)
    """Documents with bytes that were no UTF-8 and became U+FFFD."""
    empty: int = Field(ge=0)
    """Documents without text, which were left out."""


class SourceRecord(_Record):
    """One source, as stored."""

    name: str
    train: SplitRecord
    val: SplitRecord | None


class PreparedRecord(_Record):
    """The file ``prepared.json``."""

    format: Literal[1] = FORMAT_VERSION
    tokenizer_sha256: str
    sources: list[SourceRecord] = Field(min_length=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSplit:
    """Training or validation part of a source."""

    prefix: Path
    facts: Facts
    replaced: int
    empty: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSource:
    """One source; ``val`` is None when it has no validation text."""

    name: str
    train: PreparedSplit
    val: PreparedSplit | None
    sentence: str = ""
    """What the source was read as: files, format, size, and what was left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """All sources, ready to be opened by any rank."""

    folder: Path
    tokenizer: Tokenizer
    sources: tuple[PreparedSource, ...]
    padded_vocab_size: int
    """Rows of the model's embedding."""
    fingerprint: str
    """Equal exactly when tokens, their order in the files and the tokenizer are."""
    remarks: tuple[str, ...] = ()
    """What ``prepare`` noticed about the sources."""

    def source(self, name: str) -> PreparedSource:
        """The source of that name; KeyError otherwise."""
        return {source.name: source for source in self.sources}[name]


def open_prepared(folder: Path, cfg: DataConfig) -> PreparedData:
    """Opens what ``prepare`` left; token files are checked when ``open_split`` maps them.

    Raises DataError when the record is damaged, the stored tokenizer is not the one the tokens were made with (with
    both hashes), or a ``val_path`` holds no text.
    """
    path = folder / RECORD_FILE
    record = parse_record(
        PreparedRecord, path, fix=f"move {folder} away, or set another data.cache, and run the command again"
    )
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    check_tokenizer(path, record.tokenizer_sha256, tokenizer)
    sources = []
    for source in record.sources:
        train = _split(folder, source.train)
        # Without a byte that counts there is no bits per byte, and nothing to measure.
        measurable = source.val is not None and source.val.facts.loss_utf8_bytes
        val = _split(folder, source.val) if source.val is not None and measurable else None
        sources.append(PreparedSource(name=source.name, train=train, val=val))
    names = [source.name for source in sources]
    if names != [source.name for source in cfg.sources]:
        raise DataError(
            f"{path} holds the sources {names}, the configuration has {[source.name for source in cfg.sources]}",
            fix="run epmoe prepare with this configuration",
        )
    for configured, source in zip(cfg.sources, record.sources, strict=True):
        if configured.val_path is not None and source.val is not None:
            _check_validation(configured, source.val.facts)
    return PreparedData(
        folder=folder,
        tokenizer=tokenizer,
        sources=tuple(sources),
        padded_vocab_size=padded_vocab_size(tokenizer.size, cfg.vocab_multiple),
        fingerprint=_content_fingerprint(record),
    )


def source_lines(prepared: PreparedData) -> list[str]:
    """One line per source: what it was read as."""
    return [f"source {source.name}: {source.sentence}" for source in prepared.sources]


def text_warning(prepared: PreparedData) -> str | None:
    """One line about documents that were repaired and whatever else is doubtful; None when nothing is."""
    repaired = sum(
        s.replaced for source in prepared.sources for s in (source.train, source.val) if s is not None
    )
    parts = list(prepared.remarks)
    if repaired:
        parts.append(f"{repaired} documents had bytes that are not UTF-8; each became U+FFFD")
    parts += [
        f"the validation tokens of source {source.name} are its training tokens"
        for source in prepared.sources
        if source.val is not None and source.val.facts.bin_crc32 == source.train.facts.bin_crc32
    ]
    parts += filter(None, map(_lossy, prepared.sources))
    return "; ".join(parts) or None


def _lossy(source: PreparedSource) -> str | None:
    if source.val is None or source.val.facts.lost_share == 0:
        return None
    return f"no bits per byte of source {source.name}: {lost_text(source.val.facts)}"


def lost_text(facts: Facts) -> str:
    """Why the tokens of a validation text do not stand for its bytes."""
    if facts.lost_share is None:
        return "its tokenizer does not give every text back, and how much is lost cannot be told from tokens"
    share = f"{facts.lost_share:.2%}" if facts.lost_share >= 1e-4 else "less than 0.01%"
    return f"{share} of its characters do not come back from its tokens"


def parse_record(kind: type[R], path: Path, *, fix: str) -> R:
    """Reads a JSON record; DataError that names the wrong fields, and the fix."""
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise DataError(f"{path} is damaged", why=wrong, fix=fix) from None


def check_tokenizer(path: Path, sha256: str, tokenizer: Tokenizer) -> None:
    """DataError with both hashes when tokens were made with another tokenizer."""
    if sha256 != tokenizer.sha256:
        raise DataError(
            f"{path} was made with tokenizer {sha256}, but the tokenizer in use ({tokenizer.name}) is "
            f"{tokenizer.sha256}",
            fix="set data.tokenizer to the one the data was made with, or prepare the data again",
        )


def check_enough(name: str, facts: Facts, seq_len: int) -> None:
    """DataError with the numbers when a training source does not fill one window, or nothing of it counts."""
    if facts.stream_tokens < seq_len + 1:
        raise DataError(
            f"source {name} has {facts.stream_tokens} training tokens in {facts.documents} documents "
            f"({facts.utf8_bytes or 0} bytes), one window needs {seq_len + 1}",
            fix="use more text or a smaller data.seq_len",
        )
    if facts.loss_utf8_bytes == 0:
        raise DataError(
            f"source {name} has {facts.utf8_bytes} bytes of training text, and 0 of them count in the loss",
            fix="correct data.sources[].loss_field, or the ranges in the file",
        )


def check_trainable(prepared: PreparedData, seq_len: int) -> None:
    """DataError when a source has too little to train on."""
    for source in prepared.sources:
        check_enough(source.name, source.train.facts, seq_len)


def _check_validation(source: SourceConfig, facts: Facts) -> None:
    if facts.stream_tokens < 2:
        raise DataError(
            f"source {source.name}: val_path {source.val_path!r} holds {facts.documents} documents with "
            f"{facts.stream_tokens} tokens, too few to validate on",
            fix="name other text, or leave val_path out",
        )


def open_split(split: PreparedSplit, tokenizer: Tokenizer) -> IndexedPair:
    """Maps a token file after checking it against its facts; reads the index, not the tokens."""
    facts = split.facts
    check_tokenizer(bin_path(split.prefix), facts.tokenizer_sha256, tokenizer)
    pair = open_indexed(split.prefix)
    _same(split.prefix, "documents", pair.num_documents, facts.documents)
    _same(split.prefix, "tokens", len(pair.tokens), facts.tokens)
    _same(idx_path(split.prefix), "crc32", crc32_of(idx_path(split.prefix)), facts.idx_crc32)
    _same(mask_path(split.prefix), "existence", pair.mask is not None, facts.mask_crc32 is not None)
    return pair


def verify_split(split: PreparedSplit, tokenizer: Tokenizer, should_stop: StopFlag = never_stop) -> None:
    """Reads every byte of a split once: CRC-32 of tokens and mask, and every id inside the vocabulary."""
    pair = open_split(split, tokenizer)
    files = [(bin_path(split.prefix), split.facts.bin_crc32)]
    if split.facts.mask_crc32 is not None:
        files.append((mask_path(split.prefix), split.facts.mask_crc32))
    for file, crc in files:
        _same(file, "crc32", crc32_of(file, should_stop), crc)
    check_vocabulary(pair, tokenizer.size, should_stop)


def check_vocabulary(pair: IndexedPair, vocab_size: int, should_stop: StopFlag = never_stop) -> None:
    """DataError that names file, document and offset of the first id outside ``[0, vocab_size)``."""
    for number, (block, _) in enumerate(blocks_of(pair)):
        stop_if(should_stop)
        if int(block.min()) < 0 or int(block.max()) >= vocab_size:
            first = int(np.flatnonzero((block < 0) | (block >= vocab_size))[0])
            raise outside_vocabulary(pair, number * TOKENS_AT_A_TIME + first, vocab_size)


def outside_vocabulary(pair: IndexedPair, position: int, vocab_size: int) -> DataError:
    """The error for the token at this position of the file."""
    document = int(np.searchsorted(pair.document_offsets, position, side="right")) - 1
    offset = position - int(pair.document_offsets[document])
    return DataError(
        f"{bin_path(pair.prefix)}: document {document}, token {offset}: id {int(pair.tokens[position])} is outside "
        f"the vocabulary of {vocab_size}",
        why="the file is damaged, or was made with another tokenizer",
        fix="prepare the data again, or set data.tokenizer to the one it was made with",
    )


def _same(path: Path, what: str, actual: int, expected: int) -> None:
    if actual != expected:
        raise DataError(
            f"{path}: {what} is {actual}, expected {expected}",
            why="the file changed after it was prepared",
            fix=f"copy the file again, or move {path.parent} away and run epmoe prepare again"
            if (path.parent / RECORD_FILE).is_file()
            else "copy the file again",
        )


def _split(folder: Path, record: SplitRecord) -> PreparedSplit:
    return PreparedSplit(
        prefix=folder / record.prefix, facts=record.facts, replaced=record.replaced, empty=record.empty
    )


def _content_fingerprint(record: PreparedRecord) -> str:
    parts: list[object] = [record.tokenizer_sha256]
    for source in record.sources:
        for split in (source.train, source.val):
            facts = None if split is None else split.facts
            parts.append(None if facts is None else facts.model_dump(exclude={"format", "lost_share"}))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
