"""The whole layer: route, hand out slots, run each kept token through its experts, add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .capacity import assign_slots
from .experts import ffn
from .losses import (
    balance_loss,
    batchwise_threshold_loss,
    communication_balance_loss,
    device_balance_loss,
    importance_loss,
    load_loss,
    metrics,
    sequence_balance_loss,
    z_loss,
)
from .routing import Decision

Expert = Callable[[Tensor], Tensor]


@dataclass
class LayerResult:
    """What comes out for ``B*S`` tokens."""

    y_TD: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, list[int] | int | float]
    decision: Decision
    kept: dict[tuple[int, int], int]


def ffn_experts(w_in: Tensor, w_out: Tensor, activation: str) -> list[Expert]:
    """One function per expert of the stacked weights."""
    return [
        lambda x_D, e=e: ffn(x_D, w_in[e], w_out[e], activation)  # type: ignore[misc]
        for e in range(w_in.shape[0])
    ]


def combine(
    x_TD: Tensor, decision: Decision, kept: dict[tuple[int, int], int], experts: list[Expert]
) -> Tensor:
    """y_t = sum over the kept assignments of token t of weight * expert(x_t)."""
    rows = [torch.zeros_like(x_D) for x_D in x_TD.unbind()]
    for a in decision.assignments:
        if (a.token, a.choice) in kept:
            rows[a.token] = rows[a.token] + a.weight * experts[a.expert](x_TD[a.token])
    return torch.stack(rows) if rows else x_TD * 1.0


def run_layer(
    x_TD: Tensor,
    experts: list[Expert],
    decision: Decision,
    *,
    group_of: list[int],
    groups: int,
    slots: int | None,
    k: int,
    balance_count: str,
    sequence_of: list[int] | None = None,
    devices: int = 1,
    limit: int = 1,
) -> LayerResult:
    """Output, losses and metrics of one MoE layer for a router's decision."""
    kept = assign_slots(decision.assignments, group_of, slots)
    sequence_of, E = sequence_of or group_of, len(experts)
    losses = {
        "balance": balance_loss(decision, group_of, groups, len(experts), count=balance_count, k=k),
        "z": z_loss(decision),
        "importance": importance_loss(decision, len(experts)),
        "load": load_loss(decision, len(experts)),
        "sequence_balance": sequence_balance_loss(
            decision, sequence_of, max(sequence_of, default=-1) + 1, E, k
        ),
        "device_balance": device_balance_loss(decision, E, devices, k),
        "communication_balance": communication_balance_loss(decision, E, devices, limit),
    }
    if decision.thresholds is not None:
        losses["batchwise_threshold"] = batchwise_threshold_loss(decision, E)
    return LayerResult(
        y_TD=combine(x_TD, decision, kept, experts),
        losses=losses,
        metrics=metrics(decision, kept, len(experts)),
        decision=decision,
        kept=kept,
    )


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """h_te = sum_d x_td W_ed, no bias."""
    rows = [torch.stack([(x_D * w_D).sum() for w_D in weight_ED.unbind()]) for x_D in x_TD.unbind()]
    return torch.stack(rows) if rows else x_TD @ weight_ED.T
