"""Windows of prepared data as batches of tensors.

Window w of a stream with N tokens is stream tokens ``[w*S, w*S + S]``: S inputs and, one further, S targets.
Neighbouring windows share one token, so every token but the first is a target exactly once; the last window is
filled up with end-of-text that is invalid and does not count.

    stream    a b c EOS d e f g EOS h        S = 4
    window 0  a b c EOS        -> b c EOS d
    window 1  d e f g          -> e f g EOS
    window 2  EOS h . .        -> h . . .     (. = filled up)

Documents meet in a window. With ``cross_document: true`` nothing marks that. With ``false``, ``segment_BS`` says
which document each input belongs to, for attention that stays inside, and in training the first token of a document
does not count: nothing before it belongs to it. Validation counts it in either case, because bits per byte are a
price for the whole text. Where a document has loss ranges, only the tokens inside them count, and its end-of-text
when the last range reaches it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from epmoe.config import DataConfig
from epmoe.data.prepared import PreparedData, check_trainable, lost_text
from epmoe.data.sampler import mixture, num_windows, window_of
from epmoe.data.stream import Span, TokenStream, open_stream, read_span
from epmoe.errors import DataError
from epmoe.types import TokenContext, register_pytree

FILLER_SAMPLE = -1
"""Sample number of an invalid sequence."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences of one micro-batch of one rank."""

    token_BS: Tensor
    """int64 inputs; end-of-text where invalid."""
    target_BS: Tensor
    """int64: the token that follows each input; end-of-text where there is none."""
    loss_BS: Tensor
    """bool: targets that count in the loss."""
    context: TokenContext
    """What the blocks of the model get to know."""
    num_sources: int = 1
    """Sources there are; ``context.task_B`` is their number."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        moved: Batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), self)
        return moved


class TrainData:
    """Training windows of all sources in one endless, seeded order that depends on nothing but the sample number.

    Raises DataError when a source has fewer tokens than one window.

    Args:
        prepared: What ``prepare`` returned.
        cfg: The data section: sequence length, source weights, document boundaries.
        seed: Of the order.
    """

    def __init__(self, prepared: PreparedData, cfg: DataConfig, seed: int) -> None:
        check_trainable(prepared, cfg.seq_len)
        self._streams = [open_stream(source.train, prepared.tokenizer) for source in prepared.sources]
        self._names = [source.name for source in prepared.sources]
        self._mixture = mixture([source.weight for source in cfg.sources])
        self._seq_len, self._cross_document, self._seed = cfg.seq_len, cfg.cross_document, seed
        self.num_windows = tuple(num_windows(len(stream), cfg.seq_len) for stream in self._streams)
        self.padded_vocab_size = prepared.padded_vocab_size
        order = [
            prepared.fingerprint,
            seed,
            cfg.seq_len,
            cfg.cross_document,
            self._names,
            self._mixture.pattern,
        ]
        self.fingerprint = hashlib.sha256(json.dumps(order).encode()).hexdigest()
        """Equal exactly when every sample number means the same sample."""

    def window_of(self, sample_number: int) -> tuple[str, int]:
        """Global sample number -> (source name, window)."""
        source, number = self._mixture.locate(sample_number)
        name, windows = self._names[source], self.num_windows[source]
        return name, window_of(number, windows=windows, seed=self._seed, source=name)

    def batch(self, sample_numbers: Sequence[int | None]) -> Batch:
        """The samples of these numbers; None gives an invalid sequence that fills a batch up."""
        spans: list[Span | None] = []
        sources: list[int] = []
        for number in sample_numbers:
            if number is None:
                spans.append(None)
                sources.append(0)
                continue
            name, window = self.window_of(number)
            sources.append(self._names.index(name))
            spans.append(_window(self._streams[sources[-1]], window, self._seq_len))
        batch = _collate(
            spans,
            sample_numbers,
            sources,
            seq_len=self._seq_len,
            eos_id=self._streams[0].eos_id,
            segments=not self._cross_document,
            count_first=self._cross_document,
        )
        return replace(batch, num_sources=len(self._names))


class ValidationData:
    """The validation text of one source as consecutive windows.

    Summed over all windows, the loss of the counted targets divided by ``ln 2 * utf8_bytes`` is bits per byte, unless
    ``bits_left_out`` says why not.
    """

    def __init__(self, prepared: PreparedData, cfg: DataConfig, source: str) -> None:
        split = prepared.source(source).val
        if split is None:
            raise DataError(f"source {source} has no validation text", fix="set val_path")
        if split.facts.loss_utf8_bytes is None:
            raise DataError(
                f"{split.prefix}: the number of text bytes is not known", fix="prepare the data again"
            )
        self.name = source
        self._source = [known.name for known in prepared.sources].index(source)
        self._stream = open_stream(split, prepared.tokenizer)
        self._seq_len, self._cross_document = cfg.seq_len, cfg.cross_document
        self.num_windows = num_windows(len(self._stream), cfg.seq_len)
        self.utf8_bytes = split.facts.loss_utf8_bytes
        """Bytes of the text that counts in the loss."""
        self.bits_left_out = None if split.facts.lost_share == 0 else lost_text(split.facts)
        """Why a loss says nothing about those bytes; None = it does."""

    def batch(self, window_numbers: Sequence[int | None]) -> Batch:
        """These windows, whose numbers are also their sample numbers; None fills up."""
        spans = [None if w is None else _window(self._stream, w, self._seq_len) for w in window_numbers]
        return _collate(
            spans,
            window_numbers,
            [self._source] * len(spans),
            seq_len=self._seq_len,
            eos_id=self._stream.eos_id,
            segments=not self._cross_document,
            count_first=True,
        )


def validation_sets(prepared: PreparedData, cfg: DataConfig) -> list[ValidationData]:
    """One for every source that has validation text, in the order of the sources."""
    return [
        ValidationData(prepared, cfg, source.name) for source in prepared.sources if source.val is not None
    ]


def _window(stream: TokenStream, window: int, seq_len: int) -> Span:
    start = window * seq_len
    if not 0 <= start < len(stream) - 1:
        raise IndexError(f"window {window} of {num_windows(len(stream), seq_len)}")
    return read_span(stream, start, start + seq_len + 1)


def _collate(
    spans: Sequence[Span | None],
    numbers: Sequence[int | None],
    sources: Sequence[int],
    *,
    seq_len: int,
    eos_id: int,
    segments: bool,
    count_first: bool,
) -> Batch:
    """Spans of S+1 tokens or fewer -> one batch.

    Args:
        spans: One per sequence, None = invalid.
        numbers: Sample numbers.
        sources: Number of each one's source: its task.
        seq_len: S.
        eos_id: Fills up.
        segments: Say which document each token belongs to.
        count_first: The first token of a document counts in the loss.
    """
    shape = (len(spans), seq_len)
    token, target = np.full(shape, eos_id, np.int64), np.full(shape, eos_id, np.int64)
    valid, loss, segment = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_), np.zeros(shape, np.int64)
    for row, span in enumerate(spans):
        if span is None:
            continue
        inputs, targets = min(len(span.ids), seq_len), len(span.ids) - 1
        token[row, :inputs], target[row, :targets] = span.ids[:inputs], span.ids[1:]
        valid[row, :inputs], loss[row, :targets] = True, span.counts[1:]
        boundary = np.diff(span.documents) != 0
        if not count_first:
            loss[row, :targets] &= ~boundary
        numbered = np.concatenate([[0], np.cumsum(boundary)])
        segment[row, :inputs] = numbered[:inputs]
        segment[row, inputs:] = numbered[-1] + 1  # what fills up is a document of its own
    sample = [FILLER_SAMPLE if number is None else number for number in numbers]
    token_BS = torch.from_numpy(token)
    context = TokenContext(
        valid_BS=torch.from_numpy(valid),
        sample_B=torch.tensor(sample, dtype=torch.int64),
        token_BS=token_BS,
        segment_BS=torch.from_numpy(segment) if segments else None,
        task_B=torch.tensor(sources, dtype=torch.int64),
    )
    return Batch(
        token_BS=token_BS,
        target_BS=torch.from_numpy(target),
        loss_BS=torch.from_numpy(loss),
        context=context,
    )
