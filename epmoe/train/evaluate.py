"""Validation: summed loss over every validation token, dropless unless the configuration says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from epmoe import env
from epmoe.data.loader import ValidationData
from epmoe.models.decoder import Decoder
from epmoe.parallel.reduce_sums import add_sums, all_reduce_sums
from epmoe.train.step import autocast, layer_sums, token_loss
from epmoe.types import LayerSums

_Totals = tuple[Tensor, Tensor, tuple[LayerSums, ...]]
"""Loss, tokens in it, and what the routers did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Validation of one source."""

    name: str
    loss: float
    """Nats per token."""
    num_tokens: int
    bits_per_byte: float | None
    """Summed loss / ln 2 / UTF-8 bytes; None when only part of the text was read, or its tokens are not the text."""
    drop_rate: float
    """Dropped assignments / assignments; 0 when dropless."""
    bits_left_out: str | None = None
    """Why there are no bits per byte."""

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(
    model: Decoder,
    data: ValidationData,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    precision: str,
    device: torch.device,
    max_windows: int | None = None,
    poll: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Loss over the windows of one validation set, shared out over the ranks.

    Args:
        batch_size: Windows per rank and forward pass. Ranks without a window get an invalid one, so that all of them
            run the same number of passes.
        max_windows: Read only this many windows, evenly spread.
        poll: Called before each pass with the windows that are done and those there are; may raise to end the
            evaluation on all ranks alike.
    """
    was_training = model.training
    model.eval()
    windows = _spread(data.num_windows, max_windows)
    totals: _Totals | None = None
    for start in range(0, len(windows), batch_size * world_size):
        env.fault("train.eval")
        poll(start, len(windows))
        first = start + rank * batch_size
        chosen = [windows[i] if i < len(windows) else None for i in range(first, first + batch_size)]
        batch = data.batch(chosen).to(device)
        with autocast(precision, device.type):
            logits_BSV, reports = model(batch.token_BS, batch.context)
        loss, tokens = token_loss(logits_BSV, batch).sum(), batch.loss_BS.sum()
        totals = add_sums(totals, (loss, tokens, layer_sums(reports)))
    model.train(was_training)
    assert totals is not None  # there is a window
    return _summarise(data, all_reduce_sums(totals, None), num_windows=len(windows))


def _spread(num_windows: int, max_windows: int | None) -> list[int]:
    count = min(num_windows, max_windows or num_windows)
    return [i * num_windows // count for i in range(count)]


def _summarise(data: ValidationData, totals: _Totals, *, num_windows: int) -> Evaluation:
    loss, tokens, layers = float(totals[0]), int(totals[1]), totals[2]
    wanted = sum(int(did.assignments) for did in layers)
    kept = sum(int(did.kept_E.sum()) for did in layers)
    left_out = data.bits_left_out
    if num_windows < data.num_windows:
        left_out = f"{num_windows:,} of {data.num_windows:,} windows were read"
    return Evaluation(
        name=data.name,
        loss=loss / max(tokens, 1),
        num_tokens=tokens,
        bits_per_byte=None if left_out else loss / math.log(2) / data.utf8_bytes,
        drop_rate=1.0 - kept / wanted if wanted else 0.0,
        bits_left_out=left_out,
    )
