"""DeepSeek's routers, token by token: scores, biased choice inside the best groups, weights without the bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .routing import Assignment, Decision, in_slot_order, softmax, usable_tokens


def sigmoid(h: Tensor) -> Tensor:
    """1 / (1 + e^-h); 0 for an unavailable expert."""
    return torch.zeros((), dtype=torch.float64) if h.item() == -math.inf else 1.0 / (1.0 + torch.exp(-h))


def open_groups(biased: list[float], groups: int, kept: int, group_score: str) -> list[int]:
    """The groups with the largest score, the lower number first at equality; one without an expert is never open."""
    size = len(biased) // groups
    scores = {}
    for group in range(groups):
        inside = sorted(biased[group * size : (group + 1) * size], reverse=True)
        available = [c for c in inside if c > -math.inf]
        if available:
            scores[group] = sum(available[:2]) if group_score == "top2" else available[0]
    return sorted(scores, key=lambda group: (-scores[group], group))[:kept]


def deepseek(
    logits_TE: Tensor,
    valid: list[bool],
    *,
    k: int,
    score: str,
    bias: list[float],
    groups: int,
    kept: int,
    group_score: str,
    normalize: bool,
    scale: float,
    slot_order: str = "choice_major",
) -> Decision:
    """The k largest of s + b inside the open groups, weighted by s [/ their sum] * scale."""
    usable, nonfinite = usable_tokens(logits_TE, valid)
    decision = Decision([], {}, {}, nonfinite)
    zero = torch.zeros((), dtype=torch.float64)
    for token in usable:
        row = list(logits_TE[token].unbind())
        s = softmax(row) if score == "softmax" else [sigmoid(h) for h in row]
        total = sum(s, zero) + 1e-20
        decision.probs[token], decision.logits[token] = [value / total for value in s], row
        biased = [
            -math.inf if h.item() == -math.inf else value.item() + b
            for h, value, b in zip(row, s, bias, strict=True)
        ]
        opened = open_groups(biased, groups, kept, group_score)
        size = len(row) // groups
        available = [e for e in range(len(row)) if biased[e] > -math.inf and e // size in opened]
        chosen = sorted(available, key=lambda e: (-biased[e], e))[:k]
        below = sum((s[e] for e in chosen), zero) + 1e-20 if normalize else 1.0
        for choice, expert in enumerate(chosen):
            decision.assignments.append(Assignment(token, choice, expert, scale * s[expert] / below))
    decision.assignments = in_slot_order(decision.assignments, slot_order)
    return decision


def moved_bias(bias: list[float], counts: list[int], rate: float) -> list[float]:
    """b + u where an expert had less than the mean, b - u where it had more."""
    mean = sum(counts) / len(counts)
    return [b + rate * ((c < mean) - (c > mean)) for b, c in zip(bias, counts, strict=True)]
