"""Classical mixtures, expert by expert: the dense router, the losses of its training, EDD, smoothed probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .noisy import number, usable_in_two_levels
from .routing import Assignment, Decision, best_experts, in_slot_order, softmax, usable_tokens

Row = list[Tensor]


def log_sum(values: Row) -> Tensor:
    """ln sum exp, of at least one number that is not -inf."""
    finite = [v for v in values if v.item() > -math.inf]
    shift = max(v.item() for v in finite)
    return shift + torch.log(sum((torch.exp(v - shift) for v in finite), number(0.0)))


def joint_logits(row: Row, groups: Row) -> Row:
    """Numbers whose softmax is g_i g_{j|i} and whose log_sum is that of all sums h_i + h_j."""
    size = len(row) // len(groups)
    blocks = [row[i * size : (i + 1) * size] for i in range(len(groups))]
    closed = [all(h.item() == -math.inf for h in block) for block in blocks]
    outer = [number(-math.inf) if closed[i] else h for i, h in enumerate(groups)]
    total = log_sum([h + outer[e // size] for e, h in enumerate(row)])
    joint = []
    for e, h in enumerate(row):
        i = e // size
        if outer[i].item() == -math.inf or h.item() == -math.inf:
            joint.append(number(-math.inf))
        else:
            joint.append(outer[i] - log_sum(outer) + h - log_sum(blocks[i]) + total)
    return joint


def dense(
    logits_TE: Tensor,
    valid: list[bool],
    *,
    pooling: str,
    training: bool = True,
    group_logits_TP: Tensor | None = None,
    slot_order: str = "choice_major",
) -> Decision:
    """Every expert, best first. In evaluation experts without weight are left out."""
    if group_logits_TP is None:
        usable, nonfinite = usable_tokens(logits_TE, valid)
    else:
        usable, nonfinite = usable_in_two_levels(logits_TE, group_logits_TP, valid)
    decision = Decision([], {}, {}, nonfinite)
    for token in usable:
        row = list(logits_TE[token].unbind())
        if group_logits_TP is not None:
            row = joint_logits(row, list(group_logits_TP[token].unbind()))
        p = softmax(row)
        decision.probs[token], decision.logits[token] = p, row
        for choice, e in enumerate(best_experts([h.item() for h in row], len(row))):
            weight = p[e]
            if pooling != "weighted_sum":
                weight = 0.0 * p[e] if choice else p[e] if pooling == "max_scaled" else number(1.0)
            if pooling == "weighted_sum" or training or choice == 0:
                decision.assignments.append(Assignment(token, choice, e, weight))
    decision.assignments = in_slot_order(decision.assignments, slot_order)
    return decision


def squared(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2."""
    return sum(((x - y) * (x - y) for x, y in zip(a.unbind(), b.unbind(), strict=True)), number(0.0))


def cross_entropy(row: Tensor, label: int) -> Tensor:
    """-ln softmax(row)[label]."""
    return log_sum(list(row.unbind())) - row[label]


def mixture_losses(
    logits_TK: Tensor, outputs_TKO: Tensor, target_TO: Tensor, valid: list[bool]
) -> dict[str, Tensor]:
    """Cooperative, competitive and negative log likelihood (unit variance), summed over tokens."""
    total = {name: number(0.0) for name in ("cooperative", "competitive", "mixture_nll")}
    for t, counts in enumerate(valid):
        if not counts:
            continue
        p, d = softmax(list(logits_TK[t].unbind())), target_TO[t]
        used = [i for i in range(len(p)) if logits_TK[t, i].item() > -math.inf]
        pooled = sum((p[i] * outputs_TKO[t, i] for i in used), torch.zeros_like(d))
        errors = {i: squared(d, outputs_TKO[t, i]) for i in used}
        total["cooperative"] = total["cooperative"] + squared(d, pooled)
        total["competitive"] = total["competitive"] + sum((p[i] * errors[i] for i in used), number(0.0))
        density = log_sum([torch.log(p[i]) - errors[i] / 2 for i in used if p[i].item() > 0])
        total["mixture_nll"] = total["mixture_nll"] - density
    return total


def similarity(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Squared cosine, lengths at least 1e-8; or exp(-|a - b|^2 / 2)."""
    if kind == "rbf":
        return torch.exp(-squared(a, b) / 2)
    zero = torch.zeros_like(a)
    lengths = [
        torch.sqrt(squared(v, zero)) if squared(v, zero).item() > 1e-16 else number(1e-8) for v in (a, b)
    ]
    dot = sum((x * y for x, y in zip(a.unbind(), b.unbind(), strict=True)), number(0.0))
    return (dot / (lengths[0] * lengths[1])) ** 2


def edd(
    logits_TK: Tensor,
    outputs_TKO: Tensor,
    loss_TK: Tensor,
    evaluated: list[list[bool]],
    *,
    alpha: float,
    kind: str = "cosine",
    temperature: float | None = None,
) -> Tensor:
    """alpha * L_div + (1 - alpha) * L_disp. Tokens with fewer than two outputs are not in the first mean."""
    alike, dispatched = [], []
    for t, flags in enumerate(evaluated):
        used = [i for i, flag in enumerate(flags) if flag]
        pairs = [(i, j) for i in used for j in used if i < j]
        if pairs:
            values = [similarity(outputs_TKO[t, i], outputs_TKO[t, j], kind) for i, j in pairs]
            alike.append(sum(values, number(0.0)) / len(pairs))
        if not used:
            continue
        log_p = {i: logits_TK[t, i] - log_sum([logits_TK[t, j] for j in used]) for i in used}
        best = min(used, key=lambda i: (loss_TK[t, i].item(), i))
        if temperature is None:
            dispatched.append(-log_p[best])
            continue
        scores = softmax([-loss_TK[t, i].detach() / temperature for i in used])
        dispatched.append(-sum((s * log_p[i] for s, i in zip(scores, used, strict=True)), number(0.0)))
    means = [sum(v, number(0.0)) / max(len(v), 1) for v in (alike, dispatched)]
    return alpha * means[0] + (1 - alpha) * means[1]


def smoothed_probability(logits_TE: Tensor, noise_NTE: Tensor) -> list[list[float]]:
    """Share of the draws in which each expert wins."""
    shares = []
    for t in range(logits_TE.shape[0]):
        won = [0] * logits_TE.shape[1]
        for draw in noise_NTE:
            noisy = (logits_TE[t] + draw[t]).tolist()
            won[max(range(len(noisy)), key=lambda e: (noisy[e], -e))] += 1
        shares.append([count / noise_NTE.shape[0] for count in won])
    return shares
