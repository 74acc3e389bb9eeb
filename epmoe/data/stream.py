"""The document stream: all documents of a token file, each followed by end-of-text, as one long row of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epmoe.data.indexed import IndexedPair
from epmoe.data.prepared import PreparedSplit, open_split, outside_vocabulary
from epmoe.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStream:
    """A token file as a stream. Memory: two integers per document."""

    pair: IndexedPair
    document_starts: NDArray[np.int64]
    """Stream position of every document, and the total."""
    vocab_size: int
    eos_id: int

    def __len__(self) -> int:
        return int(self.document_starts[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Some neighbouring tokens of a stream."""

    ids: NDArray[np.int64]
    documents: NDArray[np.int64]
    """Number of the document each belongs to; end-of-text belongs to the document it ends."""
    counts: NDArray[np.bool_]
    """Whether the token, as a target, counts in the loss."""


def open_stream(split: PreparedSplit, tokenizer: Tokenizer) -> TokenStream:
    """Opens a prepared split; adds an end-of-text to documents whose file has none."""
    pair = open_split(split, tokenizer)
    starts = pair.document_offsets
    if split.facts.missing_eos:
        # Costs one look at the last token of every document.
        extra = np.cumsum(lacks_end(pair, tokenizer.eos_id), dtype=np.int64)
        starts = starts + np.concatenate([np.zeros(1, np.int64), extra])
    return TokenStream(pair=pair, document_starts=starts, vocab_size=tokenizer.size, eos_id=tokenizer.eos_id)


def lacks_end(pair: IndexedPair, eos_id: int) -> NDArray[np.bool_]:
    """bool per document: it has tokens, and the last one is not end-of-text."""
    starts, ends = pair.document_offsets[:-1], pair.document_offsets[1:]
    if not len(pair.tokens):
        return np.zeros(len(starts), np.bool_)
    last: NDArray[Any] = pair.tokens[np.maximum(ends - 1, 0)]
    result: NDArray[np.bool_] = (ends > starts) & (last != eos_id)
    return result


def read_span(stream: TokenStream, start: int, stop: int) -> Span:
    """Tokens ``[start, stop)`` of the stream: O(log documents) to find them, then one gather.

    Raises DataError that names a file that has shrunk, or file, document and offset of an id outside the vocabulary.
    """
    stream.pair.require_whole()
    position = np.arange(start, min(stop, len(stream)), dtype=np.int64)
    # "right" skips empty documents, which share their start with the next one.
    document = np.searchsorted(stream.document_starts, position, side="right") - 1
    offset = position - stream.document_starts[document]
    limits = stream.pair.document_offsets
    in_file = limits[document] + offset
    added_end = in_file >= limits[document + 1]
    in_file = np.minimum(in_file, max(len(stream.pair.tokens) - 1, 0))
    stored = stream.pair.tokens[in_file].astype(np.int64)
    ids = np.where(added_end, stream.eos_id, stored)
    wrong = (ids < 0) | (ids >= stream.vocab_size)
    if wrong.any():
        raise outside_vocabulary(stream.pair, int(in_file[np.flatnonzero(wrong)[0]]), stream.vocab_size)
    counts = np.ones(len(ids), np.bool_)
    if stream.pair.mask is not None:
        counts = added_end | (stream.pair.mask[in_file] != 0)
    return Span(ids=ids, documents=document, counts=counts)
