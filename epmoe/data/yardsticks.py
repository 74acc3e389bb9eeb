"""What bits per byte mean for this text: the same measure for models nobody would train.

``unigram`` knows how often each token occurs in the training text. ``xz`` compresses the validation text alone;
``xz_after_train`` may look at the training text while it does: size(training + validation) - size(training).
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epmoe.data.fidelity import decoded_parts
from epmoe.data.files import StopFlag, never_stop, read_json, stop_if, write_json
from epmoe.data.indexed import TOKENS_AT_A_TIME
from epmoe.data.prepared import PreparedData, PreparedSplit
from epmoe.data.stream import TokenStream, open_stream, read_span
from epmoe.data.tokenizer import Tokenizer
from epmoe.errors import DataError, warn

XZ_WINDOW_BYTES = 64 << 20
"""How far back ``xz -9`` looks; training text further from its end cannot help and is left out."""
XZ_LIMIT_BYTES = 64 << 20
"""Longer validation text is not compressed: it takes a minute or two for so much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardsticks:
    """Bits per byte of one source's validation text."""

    unigram: float | None
    """None: the tokens do not stand for the bytes of the text."""
    xz: float | None
    xz_after_train: float | None
    xz_left_out: str | None = None
    """Why there is no figure of xz."""


def yardsticks(prepared: PreparedData, source: str, *, should_stop: StopFlag = never_stop) -> Yardsticks:
    """Computes them once, a few seconds per megabyte of text, and keeps them beside the prepared data.

    Args:
        prepared: What ``prepare`` returned.
        source: Name of a source with validation text.
        should_stop: Polled while compressing; Preempted when it is true.
    """
    cache = prepared.folder / f"{source}.yardsticks.json"
    known = _read_cache(cache, prepared.fingerprint)
    if known is not None:
        return known
    parts = prepared.source(source)
    if parts.val is None:
        raise DataError(f"source {source} has no validation text to measure", fix="set val_path")
    train, val = (open_stream(split, prepared.tokenizer) for split in (parts.train, parts.val))
    counted_bytes = parts.val.facts.loss_utf8_bytes or 0
    text, left_out = None, None
    exact = parts.val.facts.lost_share == 0
    if not exact:
        left_out = "its tokens do not give the text back exactly"
    elif (parts.val.facts.utf8_bytes or 0) > XZ_LIMIT_BYTES:
        left_out = f"more than {XZ_LIMIT_BYTES >> 20} MiB would take too long"
    else:
        text = _exact_text(val, parts.val, prepared.tokenizer, should_stop)
        left_out = None if text else "its tokens do not give the text back exactly"
    tail = _tail(train, parts.train, prepared.tokenizer, should_stop) if text else None
    result = Yardsticks(
        unigram=_unigram_bits(train, val, should_stop) / max(counted_bytes, 1) if exact else None,
        xz=8 * _xz_size([text], should_stop) / len(text) if text else None,
        xz_after_train=8 * _xz_gain(tail, text, should_stop) / len(text)
        if text and tail is not None
        else None,
        xz_left_out=left_out,
    )
    try:
        write_json(cache, {"fingerprint": prepared.fingerprint, **asdict(result)})
    except OSError as error:
        warn(f"{cache} cannot be written: {error.strerror}")
    return result


def _read_cache(path: Path, fingerprint: str) -> Yardsticks | None:
    """A damaged or outdated cache is computed again."""
    if not path.is_file():
        return None
    try:
        values: Any = read_json(path)
        if values.pop("fingerprint") == fingerprint:
            return Yardsticks(**values)
    except (DataError, KeyError, TypeError, AttributeError):
        return None
    return None


def _unigram_bits(train: TokenStream, val: TokenStream, should_stop: StopFlag) -> float:
    """Bits of every counted validation token but the first, under add-one smoothed training frequencies."""
    count_V = _token_counts(train, 0, should_stop) + 1
    bits_V = math.log2(int(count_V.sum())) - np.log2(count_V)
    return float((bits_V * _token_counts(val, 1, should_stop)).sum())


def _token_counts(stream: TokenStream, first: int, should_stop: StopFlag) -> NDArray[np.int64]:
    count_V = np.zeros(stream.vocab_size, np.int64)
    for start in range(first, len(stream), TOKENS_AT_A_TIME):
        stop_if(should_stop)
        span = read_span(stream, start, start + TOKENS_AT_A_TIME)
        count_V += np.bincount(span.ids[span.counts], minlength=stream.vocab_size)
    return count_V


def _texts(
    stream: TokenStream, tokenizer: Tokenizer, documents: range, should_stop: StopFlag
) -> Iterator[bytes]:
    limits = stream.pair.document_offsets
    for document in documents:
        stop_if(should_stop)
        # A token stands for a byte at least, so no more of them are needed than xz sees bytes.
        start = max(limits[document], limits[document + 1] - max(XZ_WINDOW_BYTES, XZ_LIMIT_BYTES))
        ids = stream.pair.tokens[start : limits[document + 1]]
        yield b"".join(part.encode() for part in decoded_parts(tokenizer, ids))


def _exact_text(
    stream: TokenStream, split: PreparedSplit, tokenizer: Tokenizer, should_stop: StopFlag
) -> bytes | None:
    """All documents in file order, or None when the tokenizer does not give back what it was given."""
    text = b"".join(_texts(stream, tokenizer, range(stream.pair.num_documents), should_stop))
    return text if len(text) == split.facts.utf8_bytes else None


def _tail(stream: TokenStream, split: PreparedSplit, tokenizer: Tokenizer, should_stop: StopFlag) -> bytes:
    """The last documents of the text, about as far back as xz can see."""
    backwards = range(stream.pair.num_documents - 1, -1, -1)
    parts, size = [], 0
    for text in _texts(stream, tokenizer, backwards, should_stop):
        parts.append(text)
        size += len(text)
        if size >= XZ_WINDOW_BYTES:
            break
    return b"".join(reversed(parts))


def _xz_gain(train: bytes, val: bytes, should_stop: StopFlag) -> int:
    # lzma releases the interpreter lock, so the two take the time of one.
    with ThreadPoolExecutor(max_workers=2) as pool:
        both = pool.submit(_xz_size, [train, val], should_stop)
        alone = pool.submit(_xz_size, [train], should_stop)
        return both.result() - alone.result()


def _xz_size(texts: list[bytes], should_stop: StopFlag) -> int:
    """Bytes of ``xz -9e`` of the joined texts."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = 0
    for text in texts:
        for start in range(0, len(text), 1 << 18):
            stop_if(should_stop)
            size += len(compressor.compress(text[start : start + (1 << 18)]))
    return size + len(compressor.flush())
