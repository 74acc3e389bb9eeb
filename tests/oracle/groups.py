"""Routers that decide about the tokens of a group together: expert choice, strict balance, BASE, Sinkhorn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .deepseek import sigmoid
from .routing import Assignment, Decision, best_experts, in_slot_order, softmax, usable_tokens

STEPS = 2**30


def start(logits_TE: Tensor, valid: list[bool]) -> Decision:
    """Probabilities and logits of the usable tokens, and nothing chosen."""
    usable, nonfinite = usable_tokens(logits_TE, valid)
    rows = {t: list(logits_TE[t].unbind()) for t in usable}
    return Decision([], {t: softmax(row) for t, row in rows.items()}, rows, nonfinite)


def members(decision: Decision, group_of: list[int]) -> list[list[int]]:
    """Usable tokens of each group, in order."""
    return [
        [t for t in sorted(decision.probs) if group_of[t] == group]
        for group in range(max(group_of, default=-1) + 1)
    ]


def log_probability(row: list[float], e: int) -> int:
    """log p_e in steps of 2^-30."""
    top = max(row)
    return round((row[e] - top - math.log(sum(math.exp(h - top) for h in row))) * STEPS)


def taken(decision: Decision, tokens: list[int], experts: int, k: int) -> list[list[int]]:
    """Each expert's max(1, floor(n k / E)) most probable tokens, best first, at equality the earlier."""
    rows = {t: [h.item() for h in decision.logits[t]] for t in tokens}
    number = max(1, len(tokens) * k // experts)
    lists = []
    for e in range(experts):
        open_to = [t for t in tokens if rows[t][e] > -math.inf]
        lists.append(sorted(open_to, key=lambda t: (-log_probability(rows[t], e), t))[:number])
    return lists


def expert_choice(logits_TE: Tensor, valid: list[bool], *, k: int, group_of: list[int]) -> Decision:
    """Every expert's tokens with their raw probabilities: everybody's best, then everybody's second best, ..."""
    decision, experts = start(logits_TE, valid), logits_TE.shape[1]
    ranked: list[tuple[int, int, int, int]] = []
    for group, tokens in enumerate(members(decision, group_of)):
        for e, chosen in enumerate(taken(decision, tokens, experts, k)):
            ranked += [(rank, group, e, t) for rank, t in enumerate(chosen)]
    for _, _, e, t in sorted(ranked):
        row = [h.item() for h in decision.logits[t]]
        rivals = [i for _, _, i, other in ranked if other == t]
        choice = sorted(rivals, key=lambda i: (-row[i], i)).index(e)
        decision.assignments.append(Assignment(t, choice, e, decision.probs[t][e]))
    return decision


def strictly_balanced(
    logits_TE: Tensor,
    valid: list[bool],
    *,
    k: int,
    group_of: list[int],
    thresholds: Tensor,
    training: bool,
    slot_order: str = "choice_major",
) -> Decision:
    """Gates rescaled over the experts that kept the token (training) or whose threshold it is above."""
    decision, experts = start(logits_TE, valid), logits_TE.shape[1]
    decision.thresholds = list(thresholds.unbind())
    kept: dict[int, list[int]] = {t: [] for t in decision.probs}
    if training:
        for tokens in members(decision, group_of):
            for e, chosen in enumerate(taken(decision, tokens, experts, k)):
                for t in chosen:
                    kept[t].append(e)
    else:
        for t, p in decision.probs.items():
            kept[t] = [e for e in range(experts) if p[e].item() > thresholds[e].item()]
    for t, mine in kept.items():
        row = [h.item() for h in decision.logits[t]]
        mine = [e for e in sorted(mine, key=lambda e: (-row[e], e)) if row[e] > -math.inf]
        shares = softmax([decision.logits[t][e] for e in mine]) if mine else []
        for choice, (e, share) in enumerate(zip(mine, shares, strict=True)):
            decision.assignments.append(Assignment(t, choice, e, share))
    decision.assignments = in_slot_order(decision.assignments, slot_order)
    return decision


# ------------------------------------------------------------------------------------------- BASE
def whole(rows: list[list[float]]) -> list[list[int]]:
    """Affinities in steps of 2^-36 of the power of two above the largest; a forbidden one loses to all others."""
    largest = max(abs(h) for row in rows for h in row if h > -math.inf)
    exponent = math.frexp(largest)[1]
    forbidden = -(2**37) * (len(rows) + 1)
    return [
        [round(math.ldexp(h, 36 - exponent)) if h > -math.inf else forbidden for h in row] for row in rows
    ]


def hungarian(cost: list[list[int]]) -> list[int]:
    """The column of each row in the assignment of least cost; at least as many columns as rows. Exact."""
    rows, columns = len(cost), len(cost[0])
    endless = 1 + sum(abs(c) for row in cost for c in row) * 4
    u, v = [0] * (rows + 1), [0] * (columns + 1)
    owner, way = [0] * (columns + 1), [0] * (columns + 1)
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        least, used = [endless] * (columns + 1), [False] * (columns + 1)
        while owner[column]:
            used[column] = True
            here, delta, best = owner[column], endless, 0
            for j in range(1, columns + 1):
                if not used[j]:
                    reduced = cost[here - 1][j - 1] - u[here] - v[j]
                    if reduced < least[j]:
                        least[j], way[j] = reduced, column
                    if least[j] < delta:
                        delta, best = least[j], j
            for j in range(columns + 1):
                if used[j]:
                    u[owner[j]] += delta
                    v[j] -= delta
                else:
                    least[j] -= delta
            column = best
        while column:
            owner[column] = owner[way[column]]
            column = way[column]
    found = [0] * rows
    for j in range(1, columns + 1):
        if owner[j]:
            found[owner[j] - 1] = j - 1
    return found


def assignment(rows: list[list[float]]) -> list[int]:
    """The best assignment with at most ceil(n / E) tokens per expert; of equal ones the lowest, token 0 first.

    The second wish is written below the first as the digits of one long number in base E.
    """
    tokens, experts = len(rows), len(rows[0])
    room = -(-tokens // experts)
    base = experts**tokens
    value = whole(rows)
    digit = [experts ** (tokens - 1 - t) for t in range(tokens)]
    cost = [
        [-value[t][slot // room] * base + slot // room * digit[t] for slot in range(experts * room)]
        for t in range(tokens)
    ]
    return [slot // room for slot in hungarian(cost)]


def base(
    logits_TE: Tensor,
    valid: list[bool],
    *,
    group_of: list[int],
    training: bool,
    slot_order: str = "choice_major",
) -> Decision:
    """The balanced assignment (training) or the best expert, with the sigmoid of its logit."""
    decision = start(logits_TE, valid)
    for tokens in members(decision, group_of):
        rows = [[h.item() for h in decision.logits[t]] for t in tokens]
        experts = [best_experts(row, 1)[0] for row in rows]
        if training and tokens:
            experts = assignment(rows)
        for t, e in zip(tokens, experts, strict=True):
            h = decision.logits[t][e]
            if h.item() > -math.inf:
                decision.assignments.append(Assignment(t, 0, e, sigmoid(h)))
    decision.assignments = in_slot_order(decision.assignments, slot_order)
    return decision


# ------------------------------------------------------------------------------------------- Sinkhorn
def plan(rows: list[list[float]], tolerance: float, iterations: int) -> list[list[float]]:
    """log of d0_t exp(h_te) d1_e with rows summing to 1/n and columns to 1/E; -inf where h is."""

    def exp(x: float) -> float:
        return math.exp(x) if x < 700 else math.inf

    def log_sum(terms: list[float]) -> float:
        top = max(terms)
        return 0.0 if top == -math.inf else top + math.log(sum(math.exp(x - top) for x in terms))

    n, experts = len(rows), len(rows[0])
    v = [0.0] * experts
    u = [0.0] * n
    for _ in range(iterations):
        u = [-math.log(n) - log_sum([h + x for h, x in zip(row, v, strict=True)]) for row in rows]
        new = []
        for e in range(experts):
            column = [row[e] + y for row, y in zip(rows, u, strict=True)]
            new.append(0.0 if max(column) == -math.inf else -math.log(experts) - log_sum(column))
        change = sum(abs(exp(a) - exp(b)) for a, b in zip(new, v, strict=True)) / experts
        v = new
        if change < tolerance:
            break
    return [[h + y + x for h, x in zip(row, v, strict=True)] for row, y in zip(rows, u, strict=True)]


def sinkhorn(
    logits_TE: Tensor,
    valid: list[bool],
    *,
    k: int,
    group_of: list[int],
    tolerance: float,
    iterations: int,
    training: bool,
    slot_order: str = "choice_major",
) -> Decision:
    """The k best of the plan (training) or of the logits; sigmoid of the logit for k = 1, else its probability."""
    decision = start(logits_TE, valid)
    for tokens in members(decision, group_of):
        rows = [[h.item() for h in decision.logits[t]] for t in tokens]
        scores: list[list[float]] = rows
        if training and tokens:
            scores = [
                [round(x * STEPS) if x > -math.inf else x for x in row]
                for row in plan(rows, tolerance, iterations)
            ]
        for t, row in zip(tokens, scores, strict=True):
            for choice, e in enumerate(best_experts(row, k)):
                weight = sigmoid(decision.logits[t][e]) if k == 1 else decision.probs[t][e]
                decision.assignments.append(Assignment(t, choice, e, weight))
    decision.assignments = in_slot_order(decision.assignments, slot_order)
    return decision


# ------------------------------------------------------------------------------------------- tables, units
def hashed(
    logits_TE: Tensor,
    valid: list[bool],
    *,
    ids: list[int],
    table: list[int] | None,
    slot_order: str = "choice_major",
) -> Decision:
    """The table's expert of the token's id, id modulo E without a table; weight 1. Logits are zeros or broken."""
    usable, nonfinite = usable_tokens(logits_TE, valid)
    decision, experts = Decision([], {}, {}, nonfinite), logits_TE.shape[1]
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in usable:
        e = ids[t] % experts if table is None else table[ids[t]]
        decision.logits[t] = list(logits_TE[t].unbind())
        decision.probs[t] = [one if i == e else zero for i in range(experts)]
        decision.assignments.append(Assignment(t, 0, e, one))
    decision.assignments = in_slot_order(decision.assignments, slot_order)
    return decision


def unit_mean(logits_TE: Tensor, valid: list[bool], unit_of: list[int]) -> Tensor:
    """Every usable token's logits replaced by the mean over the usable tokens of its unit."""
    usable, _ = usable_tokens(logits_TE, valid)
    rows = list(logits_TE.unbind())
    for unit in sorted(set(unit_of)):
        mine = [t for t in usable if unit_of[t] == unit]
        if mine:
            mean = sum((logits_TE[t] for t in mine[1:]), logits_TE[mine[0]]) / len(mine)
            for t in mine:
                rows[t] = mean
    return torch.stack(rows) if rows else logits_TE


def firsts(unit_of: list[int], valid: list[bool]) -> list[int]:
    """The first real token of each token's unit; of one that is nothing but padding, its first."""
    real = {unit: t for t, unit in reversed(list(enumerate(unit_of))) if valid[t]}
    return [real.get(unit, unit_of.index(unit)) for unit in unit_of]


def greedy_table(counts: list[int], experts: int) -> list[int]:
    """Ids by descending count, each to the least loaded expert: by counts, then by ids, then the lower one."""
    table, load, ids = [0] * len(counts), [0] * experts, [0] * experts
    left = list(range(len(counts)))
    while left:
        token = max(left, key=lambda i: (counts[i], -i))
        left.remove(token)
        e = min(range(experts), key=lambda e: (load[e], ids[e], e))
        table[token] = e
        load[e] += counts[token]
        ids[e] += 1
    return table


# ------------------------------------------------------------------------------------------- Soft MoE
def soft_moe(
    x_GSD: list[list[Tensor]], usable: list[list[bool]], phi: list[list[Tensor]], scale: Tensor, experts: list
) -> list[list[Tensor]]:
    """y_t = sum_ep W_tep f_e(sum_s D_sep x_s), D a softmax over tokens, W over slots, of scale * cosine."""

    def unit(x_D: Tensor) -> Tensor:
        return x_D / torch.sqrt((x_D * x_D).sum() + 1e-6)

    out = []
    for xs, good in zip(x_GSD, usable, strict=True):
        mine = [t for t in range(len(xs)) if good[t]]
        logit = {
            (t, e, p): scale * (unit(xs[t]) * unit(phi[e][p])).sum()
            for t in mine
            for e in range(len(phi))
            for p in range(len(phi[e]))
        }
        result = {}
        for e in range(len(phi)):
            for p in range(len(phi[e])):
                shares = softmax([logit[t, e, p] for t in mine]) if mine else []
                slot = sum(
                    (s * xs[t] for s, t in zip(shares, mine, strict=True)), torch.zeros_like(phi[e][p])
                )
                result[e, p] = experts[e](slot)
        ys = []
        for t in range(len(xs)):
            y = torch.zeros_like(xs[t])
            if good[t]:
                weights = softmax([logit[t, *place] for place in result])
                y = sum((w * r for w, r in zip(weights, result.values(), strict=True)), y)
            ys.append(y)
        out.append(ys)
    return out
