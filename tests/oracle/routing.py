"""Who goes where: the routers, token by token, for logits given as a float64 tensor [T, E]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Assignment:
    """One wish of one token: its ``choice``-th expert, with the weight it would get in the output."""

    token: int
    choice: int
    expert: int
    weight: Tensor


@dataclass
class Decision:
    """What a router says. Only wishes that are really made are listed, in priority order."""

    assignments: list[Assignment]
    probs: dict[int, list[Tensor]]
    """token -> softmax of its logits, for routed tokens only."""
    logits: dict[int, list[Tensor]]
    """token -> its logits, for routed tokens only."""
    nonfinite: int
    """Real tokens that cannot be routed because a logit is NaN or +inf."""
    load: list[Tensor] | None = None
    """Expected number of tokens that choose each expert; None = only what was chosen is known."""
    importance: list[Tensor] | None = None
    """Sum of each expert's gates, where that is not the sum of its weights."""
    thresholds: list[Tensor] | None = None
    """Learned limit of each expert's probability."""


def softmax(row: list[Tensor]) -> list[Tensor]:
    """exp(h_e) / sum exp(h_i), shifted by the largest logit; an unavailable expert (-inf) has 0."""
    shift = max(h.item() for h in row)
    zero = torch.zeros((), dtype=torch.float64)
    powers = [zero if h.item() == -math.inf else torch.exp(h - shift) for h in row]
    total = sum(powers, zero)
    return [power / total for power in powers]


def usable_tokens(logits_TE: Tensor, valid: list[bool]) -> tuple[list[int], int]:
    """Tokens that can be routed, and how many real tokens cannot because of NaN or +inf."""
    usable, nonfinite = [], 0
    for token, row in enumerate(logits_TE.tolist()):
        if not valid[token]:
            continue
        if any(math.isnan(h) or h == math.inf for h in row):
            nonfinite += 1
        elif any(h > -math.inf for h in row):
            usable.append(token)
    return usable, nonfinite


def best_experts(row: list[float], k: int) -> list[int]:
    """The k experts with the largest logits, the lower number first at equality, unavailable ones never."""
    available = [e for e in range(len(row)) if row[e] > -math.inf]
    return sorted(available, key=lambda e: (-row[e], e))[:k]


def in_slot_order(
    assignments: list[Assignment], slot_order: str, turn: dict[int, int] | None = None
) -> list[Assignment]:
    """choice_major: all first choices in token order, then all second choices; token_major: token by token.

    ``turn`` says which token comes when; None = as they stand.
    """
    if slot_order == "choice_major":
        return sorted(assignments, key=lambda a: (a.choice, turn[a.token] if turn else a.token))
    return sorted(assignments, key=lambda a: (turn[a.token] if turn else a.token, a.choice))


def turns(priority: str, decision: Decision, order: list[float] | None) -> dict[int, int] | None:
    """When each token may ask for slots: by position, by its largest probability, or by a random number."""
    tokens = sorted(decision.probs)
    if priority == "batch_prioritized":
        score = {t: round(max(p.item() for p in decision.probs[t]) * 2**30) for t in tokens}
        tokens = sorted(tokens, key=lambda t: (-score[t], t))
    elif priority == "random" and order is not None:
        tokens = sorted(tokens, key=lambda t: (order[t], t))
    else:
        return None
    return {t: place for place, t in enumerate(tokens)}


def second_is_used(
    policy: str, first: float, second: float, tau: float, u: float | None, ratio: float = 0.2
) -> bool:
    """GShard's decision about the second expert, from the two logits; a2 = p2 / (p1 + p2)."""
    difference = first - second
    a2 = 1.0 / (1.0 + math.exp(difference)) if difference < 700 else math.exp(-difference)
    if policy in ("all", "sampling"):
        return True
    if policy == "relative":
        return second - first >= math.log(ratio)
    if policy == "none":
        return False
    if policy == "threshold":
        return a2 > tau
    assert policy == "random"
    assert u is not None
    return min(1.0, a2 / tau) > u


def gshard_top2(
    logits_TE: Tensor,
    valid: list[bool],
    *,
    policy: str,
    tau: float = 0.5,
    uniform: list[float] | None = None,
    gumbel_uniform: list[list[float]] | None = None,
    ratio: float = 0.2,
    literal: bool = False,
    slot_order: str = "choice_major",
) -> Decision:
    """Best and second best expert; the weights share 1 between both whether or not the second is used.

    ``literal``: a second choice that is not used is listed all the same, with weight 0.
    """
    usable, nonfinite = usable_tokens(logits_TE, valid)
    decision = Decision([], {}, {}, nonfinite)
    values = logits_TE.tolist()
    for token in usable:
        row = list(logits_TE[token].unbind())
        p = softmax(row)
        decision.probs[token], decision.logits[token] = p, row
        experts = best_experts(values[token], 2)
        if len(experts) == 1:
            decision.assignments.append(Assignment(token, 0, experts[0], p[experts[0]] / p[experts[0]]))
            continue
        first, second = experts
        if policy == "sampling":
            assert gumbel_uniform is not None
            second = drawn_second(values[token], first, gumbel_uniform[token])
        both = p[first] + p[second]
        decision.assignments.append(Assignment(token, 0, first, p[first] / both))
        u = None if uniform is None else uniform[token]
        if second_is_used(policy, values[token][first], values[token][second], tau, u, ratio):
            decision.assignments.append(Assignment(token, 1, second, p[second] / both))
        elif literal:
            decision.assignments.append(Assignment(token, 1, second, 0.0 * both))
    decision.assignments = in_slot_order(decision.assignments, slot_order)
    return decision


def drawn_second(row: list[float], first: int, uniform: list[float]) -> int:
    """An available expert other than the first, where h_e - ln(-ln u_e) is largest."""
    noisy = [h - math.log(-math.log(u + 2.0**-25)) for h, u in zip(row, uniform, strict=True)]
    others = [e for e in range(len(row)) if e != first and row[e] > -math.inf]
    return max(others, key=lambda e: noisy[e])


def topk(
    logits_TE: Tensor,
    valid: list[bool],
    *,
    k: int,
    normalize: bool,
    scale: float = 1.0,
    slot_order: str = "choice_major",
) -> Decision:
    """The k best experts with raw probabilities, or with probabilities rescaled so that the chosen sum to 1."""
    usable, nonfinite = usable_tokens(logits_TE, valid)
    decision = Decision([], {}, {}, nonfinite)
    values = logits_TE.tolist()
    for token in usable:
        row = list(logits_TE[token].unbind())
        p = softmax(row)
        decision.probs[token], decision.logits[token] = p, row
        experts = best_experts(values[token], k)
        total = sum((p[e] for e in experts), torch.zeros((), dtype=torch.float64)) if normalize else 1.0
        for choice, expert in enumerate(experts):
            decision.assignments.append(Assignment(token, choice, expert, scale * p[expert] / total))
    decision.assignments = in_slot_order(decision.assignments, slot_order)
    return decision


def switch(logits_TE: Tensor, valid: list[bool], *, slot_order: str = "choice_major") -> Decision:
    """The best expert, with its raw probability."""
    return topk(logits_TE, valid, k=1, normalize=False, slot_order=slot_order)


def no_token_left_behind(
    best: Decision,
    attempts: int,
    experts: int,
    group_of: list[int],
    slots: int | None,
    turn: dict[int, int] | None,
) -> Decision:
    """Every token tries its experts, best first, until one has room: attempt 1 of all, then attempt 2 of the rest.

    ``best`` lists the wishes. Those a token really made stay, refused ones included. Importance is that of the first
    ones, whatever room there is.
    """
    best.importance = [torch.zeros((), dtype=torch.float64) for _ in range(experts)]
    for wish in best.assignments:
        if wish.choice == 0:
            best.importance[wish.expert] = best.importance[wish.expert] + wish.weight
    taken: dict[tuple[int, int], int] = {}
    served: set[int] = set()
    made = []
    for wish in in_slot_order(best.assignments, "choice_major", turn):
        if wish.choice >= attempts or wish.token in served:
            continue
        made.append(wish)
        place = (group_of[wish.token], wish.expert)
        if slots is None or taken.get(place, 0) < slots:
            taken[place] = taken.get(place, 0) + 1
            served.add(wish.token)
    best.assignments = made
    return best


def jittered(x_TD: Tensor, jitter: float, uniform_TD: list[list[float]]) -> Tensor:
    """What Switch's router (and only the router) sees in training: x times U[1 - jitter, 1 + jitter)."""
    rows = []
    for x_D, u_D in zip(x_TD.unbind(), uniform_TD, strict=True):
        low, high = 1.0 - jitter, 1.0 + jitter
        rows.append(
            torch.stack([x * (low + (high - low) * u) for x, u in zip(x_D.unbind(), u_D, strict=True)])
        )
    return torch.stack(rows) if rows else x_TD
