"""Auxiliary losses as sums over valid tokens, and the router's metrics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .routing import Decision


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def balance_loss(
    decision: Decision, group_of: list[int], groups: int, experts: int, *, count: str, k: int
) -> Tensor:
    """sum over groups of n * E * sum_e f_e m_e.

    n = routed tokens of the group; m_e = mean probability; f_e = share of tokens whose first choice is e
    (``top1``), or wishes for e / (n k) (``all``); both before capacity.
    """
    total = zero()
    for group in range(groups):
        tokens = [t for t in decision.probs if group_of[t] == group]
        n = max(len(tokens), 1)
        loss = zero()
        for expert in range(experts):
            wishes = [a for a in decision.assignments if a.token in tokens and a.expert == expert]
            if count == "top1":
                f = len([a for a in wishes if a.choice == 0]) / n
            else:
                f = len(wishes) / (n * k)
            mean = sum((decision.probs[t][expert] for t in tokens), zero()) / n
            loss = loss + experts * f * mean
        total = total + len(tokens) * loss
    return total


def z_loss(decision: Decision) -> Tensor:
    """sum over routed tokens of (log sum_e exp h_e) squared."""
    total = zero()
    for row in decision.logits.values():
        available = [h for h in row if h.item() > -math.inf]
        shift = max(h.item() for h in available)
        log_sum = torch.log(sum((torch.exp(h - shift) for h in available), zero())) + shift
        total = total + log_sum * log_sum
    return total


def entropy(decision: Decision) -> float:
    """sum over routed tokens of -sum_e p_e ln p_e, with 0 ln 0 = 0."""
    total = 0.0
    for row in decision.probs.values():
        total -= sum(p.item() * math.log(p.item()) for p in row if p.item() > 0.0)
    return total


def metrics(
    decision: Decision, kept: dict[tuple[int, int], int], experts: int
) -> dict[str, list[int] | int | float]:
    """The counts a layer reports, over all its groups."""
    demand, stay = [0] * experts, [0] * experts
    for a in decision.assignments:
        demand[a.expert] += 1
        stay[a.expert] += (a.token, a.choice) in kept
    carried = {token for token, _ in kept}
    return {
        "demand_E": demand,
        "kept_E": stay,
        "assignments": len(decision.assignments),
        "overflow_tokens": len([t for t in decision.probs if t not in carried]),
        "valid_tokens": len(decision.probs),
        "nonfinite_tokens": decision.nonfinite,
        "entropy": entropy(decision),
    }


def squared_variation(totals: list[Tensor]) -> Tensor:
    """Population variance / (mean squared + 1e-10)."""
    mean = sum(totals, zero()) / len(totals)
    variance = sum(((value - mean) * (value - mean) for value in totals), zero()) / len(totals)
    return variance / (mean * mean + 1e-10)


def importance_loss(decision: Decision, experts: int) -> Tensor:
    """CV(sum of gates)^2, once per routed token."""
    totals = decision.importance
    if totals is None:
        totals = [
            sum((a.weight for a in decision.assignments if a.expert == e), zero()) for e in range(experts)
        ]
    return len(decision.probs) * squared_variation(totals)


def load_loss(decision: Decision, experts: int) -> Tensor:
    """CV(load)^2, once per routed token."""
    load = decision.load
    if load is None:
        load = [zero() + len([a for a in decision.assignments if a.expert == e]) for e in range(experts)]
    return len(decision.probs) * squared_variation(load)


def sequence_balance_loss(
    decision: Decision, sequence_of: list[int], sequences: int, experts: int, k: int
) -> Tensor:
    """sum over sequences of n * sum_e f_e P_e; f counts the k largest logits, whatever was chosen."""
    total = zero()
    for sequence in range(sequences):
        tokens = [t for t in decision.probs if sequence_of[t] == sequence]
        n = max(len(tokens), 1)
        count = [0] * experts
        for token in tokens:
            row = [h.item() for h in decision.logits[token]]
            available = [e for e in range(experts) if row[e] > -math.inf]
            for expert in sorted(available, key=lambda e: (-row[e], e))[:k]:
                count[expert] += 1
        for expert in range(experts):
            mean = sum((decision.probs[t][expert] for t in tokens), zero()) / n
            total = total + len(tokens) * experts / (k * n) * count[expert] * mean
    return total


def device_balance_loss(decision: Decision, experts: int, devices: int, k: int) -> Tensor:
    """n * sum_d (mean of f_e in d) * (sum of P_e in d)."""
    n, size, total = max(len(decision.probs), 1), experts // devices, zero()
    for device in range(devices):
        mine = range(device * size, (device + 1) * size)
        f = [experts / (k * n) * len([a for a in decision.assignments if a.expert == e]) for e in mine]
        p = sum((row[e] for row in decision.probs.values() for e in mine), zero()) / n
        total = total + len(decision.probs) * sum(f) / size * p
    return total


def batchwise_threshold_loss(decision: Decision, experts: int) -> Tensor:
    """sum over tokens and experts of (1[p > T and available] - 1[kept]) (p - T)."""
    total = zero()
    kept = {(a.token, a.expert) for a in decision.assignments}
    for token, row in decision.probs.items():
        for e in range(experts):
            limit = decision.thresholds[e]
            available = decision.logits[token][e].item() > -math.inf
            above = available and row[e].item() > limit.item()
            total = total + (int(above) - ((token, e) in kept)) * (row[e] - limit)
    return total


def communication_balance_loss(decision: Decision, experts: int, devices: int, limit: int) -> Tensor:
    """n * sum_d D / (M n) * (tokens sent to d) * (sum of P_e in d)."""
    n, size, total = max(len(decision.probs), 1), experts // devices, zero()
    for device in range(devices):
        sent = {a.token for a in decision.assignments if a.expert // size == device}
        p = sum(
            (sum(row[device * size : (device + 1) * size], zero()) for row in decision.probs.values()), zero()
        )
        total = total + len(decision.probs) * devices / (limit * n) * len(sent) * p / n
    return total
