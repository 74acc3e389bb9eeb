"""One micro-batch: task loss, auxiliary losses, and the sums that are reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from epmoe.data.loader import Batch
from epmoe.models.decoder import Decoder
from epmoe.parallel.sums import Sums
from epmoe.types import RouterReport, compute_dtype

IGNORED = -100


AUTOCAST_DTYPE = {"bf16_autocast": torch.bfloat16, "fp16_autocast": torch.float16}
"""In which dtype matrices are multiplied where that is not the parameters' own."""


def autocast(precision: str, device_type: str) -> AbstractContextManager[object]:
    """The autocast context of a precision."""
    if precision in AUTOCAST_DTYPE:
        return torch.autocast(device_type, AUTOCAST_DTYPE[precision])
    return nullcontext()


def token_loss(logits_BSV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over the targets of each sequence that count -> ``[B]``, in at least float32."""
    logits_TV = logits_BSV.flatten(0, 1)
    target_T = batch.target_BS.masked_fill(~batch.loss_BS, IGNORED).flatten()
    loss_T = F.cross_entropy(
        logits_TV.to(compute_dtype(logits_TV.dtype)), target_T, ignore_index=IGNORED, reduction="none"
    )
    return loss_T.view_as(batch.loss_BS).sum(1)


def micro_step(
    model: Decoder,
    batch: Batch,
    *,
    num_tokens: float,
    num_routed: float,
    coefficients: Mapping[str, float],
    precision: str,
    backward: Callable[[Tensor], None],
) -> Sums:
    """Forward and backward of one micro-batch; ``backward`` takes the objective.

    The objective is a mean task loss plus the coefficients times mean auxiliary losses: sums over tokens, divided by
    numbers of tokens of all ranks and micro-batches of the step. So gradients only ever need to be summed.

    Args:
        num_tokens: Tokens that count in the loss, at least 1.
        num_routed: Tokens that are routed, at least 1: all but padding.

    Returns:
        Sums over this micro-batch: ``loss``, ``aux.<name>``, ``<layer>.<metric>`` and those of ``source_sums``.
    """
    with autocast(precision, batch.token_BS.device.type):
        logits_BSV, reports = model(batch.token_BS, batch.context)
    loss_B = token_loss(logits_BSV, batch)
    loss = objective = loss_B.sum()
    for report in reports:
        for name, value in report.losses.items():
            objective = objective + coefficients[name] * (num_tokens / num_routed) * value
    backward(objective / num_tokens)
    return {"loss": loss.detach(), **report_sums(reports), **source_sums(loss_B, batch)}


def source_sums(loss_B: Tensor, batch: Batch) -> Sums:
    """``source_loss`` and ``source_tokens``, a number for each source; nothing where there is only one."""
    if batch.num_sources == 1 or batch.context.task_B is None:
        return {}
    per_source = {"source_loss": loss_B.detach(), "source_tokens": batch.loss_BS.sum(1)}
    return {
        name: value_B.new_zeros(batch.num_sources).index_add_(0, batch.context.task_B, value_B)
        for name, value_B in per_source.items()
    }


def with_counts(batch: Batch, model: Decoder, sums: Sums) -> Batch:
    """The batch, told what this rank's earlier micro-batches of the step sent to each expert (``balance_scope:
    global``; otherwise nothing was counted and it is unchanged).

    Args:
        sums: ``<layer>.counted_E`` and ``<layer>.valid_tokens`` so far; empty before the first micro-batch.
    """
    counted = {
        layer.router.layer: (sums[f"{index}.counted_E"].long(), sums[f"{index}.valid_tokens"].long().view(1))
        for index, layer in enumerate(model.moe_layers())
        if f"{index}.counted_E" in sums
    }
    if not counted:
        return batch
    return replace(batch, context=replace(batch.context, counted=counted))


def report_sums(reports: list[RouterReport]) -> Sums:
    """Auxiliary losses summed over layers, and every layer's metrics, under flat names."""
    sums: Sums = {}
    for layer, report in enumerate(reports):
        for name, value in report.losses.items():
            sums[f"aux.{name}"] = sums.get(f"aux.{name}", 0.0) + value.detach()
        for name, value in report.metrics.items():
            sums[f"{layer}.{name}"] = value
    return sums
