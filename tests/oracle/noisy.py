"""Routers with noise on their logits: Shazeer et al. 2017, flat and in two levels, and V-MoE's variant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .routing import Assignment, Decision, best_experts, in_slot_order, softmax, usable_tokens

Row = list[Tensor]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def noise_scale(noise_logit: Tensor, floor: float) -> Tensor:
    """ln(1 + e^z) + floor."""
    return (torch.log1p(torch.exp(noise_logit)) if noise_logit.item() < 40 else noise_logit) + floor


def normal_cdf(z: Tensor) -> Tensor:
    """Phi(z)."""
    return 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))


def box_muller(pair: tuple[float, float]) -> tuple[float, float]:
    """Two standard normal numbers from two uniform ones."""
    radius = math.sqrt(-2.0 * math.log1p(-pair[0]))
    return radius * math.cos(2 * math.pi * pair[1]), radius * math.sin(2 * math.pi * pair[1])


def win_probability(clean: Row, noisy: Row, scale: Row, k: int, i: int, *, own: bool) -> Tensor:
    """Chance that i is among the k best when only its own noise is drawn anew; own=False: i is its own rival too."""
    if clean[i].item() == -math.inf:
        return number(0.0)
    rivals = [j for j in range(len(noisy)) if noisy[j].item() > -math.inf and not (own and j == i)]
    rivals.sort(key=lambda j: -noisy[j].item())
    if len(rivals) < k:
        return number(1.0)
    width = scale[i] if scale[i].item() > 1e-6 else number(1e-6)
    return normal_cdf((clean[i] - noisy[rivals[k - 1]]) / width)


def shares(row: Row, experts: list[int], *, normalize: bool) -> Row:
    """The gates of the chosen: softmax over all, rescaled over the chosen if asked."""
    p = softmax(row)
    total = sum((p[e] for e in experts), number(0.0)) if normalize else number(1.0)
    return [p[e] / total for e in experts]


def noisy_topk(
    logits_TE: Tensor,
    valid: list[bool],
    *,
    k: int,
    variant: str,
    normalize: bool,
    noise_logits_TE: Tensor | None = None,
    normal: list[list[float]] | None = None,
    floor: float = 0.0,
    slot_order: str = "choice_major",
) -> Decision:
    """The k best of h + n * sigma; ``normal=None`` is evaluation. sigma = softplus (paper) or 1/E (vmoe)."""
    experts = logits_TE.shape[1]
    usable, nonfinite = usable_tokens(logits_TE, valid)
    decision = Decision([], {}, {}, nonfinite)
    load = [number(0.0) for _ in range(experts)]
    importance = [number(0.0) for _ in range(experts)]
    for token in usable:
        clean = list(logits_TE[token].unbind())
        noisy, scale = clean, [number(1.0 / experts)] * experts
        if variant == "paper":
            assert noise_logits_TE is not None
            scale = [noise_scale(z, floor) for z in noise_logits_TE[token].unbind()]
        if normal is not None:
            noisy = [h + n * s for h, n, s in zip(clean, normal[token], scale, strict=True)]
        decision.probs[token], decision.logits[token] = softmax(noisy), noisy
        chosen = best_experts([h.item() for h in noisy], k)
        for choice, (e, w) in enumerate(zip(chosen, shares(noisy, chosen, normalize=normalize), strict=True)):
            decision.assignments.append(Assignment(token, choice, e, w))
        clean_p = softmax(clean)
        for e in range(experts):
            importance[e] = importance[e] + clean_p[e]
            if normal is not None and k < experts:
                load[e] = load[e] + win_probability(clean, noisy, scale, k, e, own=variant == "paper")
    decision.load = load if normal is not None and k < experts else None
    decision.importance = importance if variant == "vmoe" else None
    decision.assignments = in_slot_order(decision.assignments, slot_order)
    return decision


def usable_in_two_levels(
    logits_TE: Tensor, group_logits_TP: Tensor, valid: list[bool]
) -> tuple[list[int], int]:
    """Tokens with at least one available expert in an available group, and how many are broken."""
    size = logits_TE.shape[1] // group_logits_TP.shape[1]
    usable, nonfinite = [], 0
    for token in range(len(valid)):
        row, groups = logits_TE[token].tolist(), group_logits_TP[token].tolist()
        if not valid[token]:
            continue
        if any(math.isnan(h) or h == math.inf for h in row + groups):
            nonfinite += 1
        elif any(h > -math.inf and groups[e // size] > -math.inf for e, h in enumerate(row)):
            usable.append(token)
    return usable, nonfinite


def hierarchical(
    logits_TE: Tensor,
    group_logits_TP: Tensor,
    valid: list[bool],
    *,
    groups_kept: int,
    inside: int,
    scale_TE: list[Row],
    scale_TP: list[Row],
    normal: list[list[float]] | None,
    group_normal: list[list[float]] | None,
    slot_order: str = "choice_major",
) -> Decision:
    """Best groups, best experts inside; weight = group gate times expert gate. ``normal=None`` is evaluation."""
    experts, groups = logits_TE.shape[1], group_logits_TP.shape[1]
    size = experts // groups
    usable, nonfinite = usable_in_two_levels(logits_TE, group_logits_TP, valid)
    decision = Decision([], {}, {}, nonfinite)
    group_load = [number(0.0) for _ in range(groups)]
    inner_load = [number(0.0) for _ in range(experts)]
    members = [0] * groups
    for token in usable:
        clean = list(logits_TE[token].unbind())
        outer = list(group_logits_TP[token].unbind())
        for i in range(groups):
            if all(h.item() == -math.inf for h in clean[i * size : (i + 1) * size]):
                outer[i] = number(-math.inf)
        noisy, noisy_outer = clean, outer
        if normal is not None and group_normal is not None:
            noisy = [h + n * s for h, n, s in zip(clean, normal[token], scale_TE[token], strict=True)]
            noisy_outer = [
                h + n * s for h, n, s in zip(outer, group_normal[token], scale_TP[token], strict=True)
            ]
        blocks = [noisy[i * size : (i + 1) * size] for i in range(groups)]
        p = softmax(noisy_outer)
        inner_p = [softmax(b) if p[i].item() > 0 else [number(0.0)] * size for i, b in enumerate(blocks)]
        decision.probs[token] = [p[e // size] * inner_p[e // size][e % size] for e in range(experts)]
        decision.logits[token] = [noisy[e] + noisy_outer[e // size] for e in range(experts)]
        best = best_experts([h.item() for h in noisy_outer], groups_kept)
        for rank, (i, gate) in enumerate(
            zip(best, shares(noisy_outer, best, normalize=groups_kept > 1), strict=True)
        ):
            members[i] += 1
            chosen = best_experts([h.item() for h in blocks[i]], inside)
            for place, (j, w) in enumerate(
                zip(chosen, shares(blocks[i], chosen, normalize=inside > 1), strict=True)
            ):
                decision.assignments.append(Assignment(token, rank * inside + place, i * size + j, gate * w))
            for j in range(size):
                e = i * size + j
                if inside == size:
                    inner_load[e] = inner_load[e] + (1.0 if clean[e].item() > -math.inf else 0.0)
                else:
                    block = slice(i * size, (i + 1) * size)
                    widths = scale_TE[token][block]
                    wins = win_probability(clean[block], blocks[i], widths, inside, j, own=True)
                    inner_load[e] = inner_load[e] + wins
        for i in range(groups):
            if groups_kept == groups:
                group_load[i] = group_load[i] + (1.0 if i in best else 0.0)
            else:
                wins = win_probability(outer, noisy_outer, scale_TP[token], groups_kept, i, own=True)
                group_load[i] = group_load[i] + wins
    if normal is not None:
        decision.load = [
            group_load[e // size] * inner_load[e] / members[e // size] if members[e // size] else number(0.0)
            for e in range(experts)
        ]
    decision.assignments = in_slot_order(decision.assignments, slot_order)
    return decision
