"""One micro-batch: task loss, auxiliary losses, and the sums that are reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from epmoe.data.loader import Batch
from epmoe.models.decoder import Decoder
from epmoe.types import LayerSums, RouterReport, compute_dtype, register_pytree

IGNORED = -100


AUTOCAST_DTYPE = {"bf16_autocast": torch.bfloat16, "fp16_autocast": torch.float16}
"""In which dtype matrices are multiplied where that is not the parameters' own."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class StepSums:
    """What micro-batches add up to, first those of a rank and then those of all."""

    loss: Tensor
    """Cross-entropy in nats."""
    aux: dict[str, Tensor]
    """Auxiliary losses by name, without coefficients."""
    layers: tuple[LayerSums, ...]
    """By MoE layer."""
    source_loss: Tensor | None = None
    """The cross-entropy by source, where there are several;"""
    source_tokens: Tensor | None = None
    """and the tokens that count in it."""


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
) -> StepSums:
    """Forward and backward of one micro-batch; ``backward`` takes the objective.

    The objective is a mean task loss plus the coefficients times mean auxiliary losses: sums over tokens, divided by
    numbers of tokens of all ranks and micro-batches of the step. So gradients only ever need to be summed.

    Args:
        num_tokens: Tokens that count in the loss, at least 1.
        num_routed: Tokens that are routed, at least 1: all but padding.

    Returns:
        Sums over this micro-batch.
    """
    with autocast(precision, batch.token_BS.device.type):
        logits_BSV, reports = model(batch.token_BS, batch.context)
    loss_B = token_loss(logits_BSV, batch)
    loss = objective = loss_B.sum()
    for report in reports:
        for name, value in report.losses.items():
            objective = objective + coefficients[name] * (num_tokens / num_routed) * value
    backward(objective / num_tokens)
    return StepSums(
        loss=loss.detach(),
        aux=auxiliary_sums(reports),
        layers=layer_sums(reports),
        source_loss=_by_source(loss_B.detach(), batch),
        source_tokens=_by_source(batch.loss_BS.sum(1), batch),
    )


def _by_source(value_B: Tensor, batch: Batch) -> Tensor | None:
    """A number for each source; None where there is only one."""
    if batch.num_sources == 1 or batch.context.task_B is None:
        return None
    return value_B.new_zeros(batch.num_sources).index_add_(0, batch.context.task_B, value_B)


def tell_layers(model: Decoder, sums: StepSums | None) -> None:
    """Tells every MoE layer what the micro-batches of the step so far did; None before the first."""
    layers = [*model.moe_layers()]
    for layer, did in zip(layers, sums.layers if sums else [None] * len(layers), strict=True):
        layer.earlier = did


def auxiliary_sums(reports: list[RouterReport]) -> dict[str, Tensor]:
    """Auxiliary losses by name, summed over layers."""
    sums: dict[str, Tensor] = {}
    for report in reports:
        for name, value in report.losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    return sums


def layer_sums(reports: list[RouterReport]) -> tuple[LayerSums, ...]:
    """What the router of every MoE layer did."""
    return tuple(report.metrics for report in reports if report.metrics is not None)
