"""BASE layers, arXiv:2103.16716: in training the balanced assignment of tokens to experts with the largest affinity.

The assignment is exact. Tokens start at their best expert; then one unit at a time leaves an overfull expert along the
cheapest chain of moves (token a from expert 0 to 1, token b from 1 to 2, ...) to one with room: successive shortest
paths, on a graph that has only the experts as nodes. Affinities are whole numbers, so that "cheapest" and "equally
good" mean the same on every machine.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epmoe.config_routers import BaseOptions
from epmoe.moe.routers.common import Choices, as_routing, groups_of, probabilities, top_ids
from epmoe.moe.routers.family import Family, FloatArray
from epmoe.ops.reference import usable_rows
from epmoe.types import RouterInputs, Routing

BITS = 36
"""Affinities of a group are rounded to steps of the power of two above the largest, divided by 2**BITS."""
NOBODY = -1
FAR = np.iinfo(np.int64).max // 4

IntArray = npt.NDArray[np.int64]


def route(inputs: RouterInputs, options: BaseOptions, top_k: int = 1) -> Routing:
    """One expert per token, weighted by the sigmoid of its logit, which alone carries gradient.

    In training no expert gets more than ceil(n / E) of a group's n valid tokens (exactly n / E where E divides n); in
    evaluation a token goes where its logit is largest. A token without room at any available expert has none.
    """
    logits_TE = inputs.logits_TE
    usable_T = usable_rows(logits_TE, inputs.valid_T)
    clean_TE, probs_TE = probabilities(logits_TE, usable_T)
    if inputs.training:
        ids_T1 = _assigned(inputs, clean_TE.detach(), usable_T).unsqueeze(1)
    else:
        ids_T1 = top_ids(clean_TE, 1)
    chosen_T1 = clean_TE.gather(1, ids_T1)
    active_T1 = usable_T.unsqueeze(1) & chosen_T1.isfinite()
    choices = Choices(
        probs_TE=probs_TE,
        ids_TK=ids_T1,
        weights_TK=chosen_T1.sigmoid() * active_T1,
        active_TK=active_T1,
    )
    return as_routing(inputs, options, choices, usable_T=usable_T)


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """0.1 times orthonormal rows (columns, where there are more experts than dimensions), as in the paper's code."""
    drawn = rng.standard_normal((max(shape), min(shape)))
    unit, triangle = np.linalg.qr(drawn)
    unit *= np.sign(np.diag(triangle))
    return (0.1 * (unit if shape[0] >= shape[1] else unit.T)).astype(np.float32)


def _assigned(inputs: RouterInputs, clean_TE: Tensor, usable_T: Tensor) -> Tensor:
    """The assignment of every group -> int64 ``[T]``."""
    num_groups, size = groups_of(inputs)
    # The host solves it: one copy there and one back, for which it waits.
    logits = clean_TE.to("cpu", torch.float64).numpy()
    usable = usable_T.cpu().numpy()
    expert = np.zeros(len(usable), dtype=np.int64)
    for group in range(num_groups):
        rows = group * size + np.flatnonzero(usable[group * size : (group + 1) * size])
        expert[rows] = balanced_assignment(logits[rows])
    return torch.from_numpy(expert).to(clean_TE.device)


def balanced_assignment(affinity: npt.NDArray[np.float64]) -> IntArray:
    """The expert of each of n tokens, none with more than ceil(n / E), with the largest sum of affinities -> ``[n]``.

    -inf forbids a pair; where that leaves a token no place, it gets a forbidden one, as few tokens as possible. Of
    equally good assignments it is the one where token 0 has the lowest expert, then token 1, and so on.

    Args:
        affinity: ``[n, E]``, finite or -inf.
    """
    num_tokens, num_experts = affinity.shape
    if num_tokens == 0:
        return np.zeros(0, dtype=np.int64)
    value = _whole(affinity)
    capacity = -(-num_tokens // num_experts)
    expert: IntArray = value.argmax(1)
    load = np.bincount(expert, minlength=num_experts)
    cost = np.full((num_experts, num_experts), FAR)
    for e in range(num_experts):
        cost[e] = _cheapest(value, expert, e)
    while (load > capacity).any():
        path = _shortest_path(cost, load > capacity, load < capacity)
        moves = list(pairwise(path))
        movers = [_best_mover(value, expert, source, target) for source, target in moves]
        for (_, target), token in zip(moves, movers, strict=True):
            expert[token] = target
        load[path[0]] -= 1
        load[path[-1]] += 1
        for e in path:
            cost[e] = _cheapest(value, expert, e)
    return _lowest(value, expert, load, capacity, cost)


def _whole(affinity: npt.NDArray[np.float64]) -> IntArray:
    """Affinities as whole numbers; a forbidden pair costs more than all others together could win."""
    finite = np.isfinite(affinity)
    known = np.where(finite, affinity, 0.0)
    _, exponent = np.frexp(np.abs(known).max())
    value: IntArray = np.rint(np.ldexp(known, BITS - int(exponent))).astype(np.int64)
    value[~finite] = -(2 << BITS) * (len(affinity) + 1)
    return value


def _best_mover(value: IntArray, expert: IntArray, source: int, target: int) -> int:
    """The token that moves at the lowest cost, the first of several."""
    tokens = np.flatnonzero(expert == source)
    return int(tokens[(value[tokens, source] - value[tokens, target]).argmin()])


def _cheapest(value: IntArray, expert: IntArray, e: int) -> IntArray:
    """What it costs to move one token, whichever costs least, from expert ``e`` to each of the others."""
    mine = value[expert == e]
    if not len(mine):
        return np.full(value.shape[1], FAR)
    cost: IntArray = (mine[:, e : e + 1] - mine).min(0)
    return cost


def _through(distance: IntArray, cost: IntArray) -> IntArray:
    """Distances over one more move, by the expert it leaves and the one it reaches."""
    unreached = (distance == FAR)[:, None] | (cost == FAR)
    return np.where(unreached, FAR, distance[:, None] + cost)


def _shortest_path(cost: IntArray, sources: npt.NDArray[np.bool_], sinks: npt.NDArray[np.bool_]) -> list[int]:
    """Cheapest way from a source to a sink (Bellman-Ford: a move may also win something) -> the experts on it."""
    distance = np.where(sources, 0, FAR)
    before = np.full(len(distance), -1)
    while True:  # at most one round per expert: no cycle of moves wins anything
        through = _through(distance, cost)
        better = through.min(0) < distance
        if not better.any():
            break
        before[better] = through.argmin(0)[better]
        distance[better] = through.min(0)[better]
    path = [int(np.where(sinks, distance, FAR).argmin())]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]


def _lowest(value: IntArray, expert: IntArray, load: IntArray, capacity: int, cost: IntArray) -> IntArray:
    """The first, in the order of experts token by token, of all assignments that are as good as this one.

    Distances in the graph of moves are prices, with which every token is where its value plus price is largest. A move
    between two experts that are equal in this costs nothing; only chains of such moves, of tokens that are not settled
    yet, are tried.
    """
    price = np.where(load > 0, 0, FAR)
    for _ in range(len(price)):
        price = np.minimum(price, _through(price, cost).min(0))
    worth = value + price
    tight = worth == worth.max(1, keepdims=True)
    loose = np.flatnonzero(tight.sum(1) > 1)
    for place, token in enumerate(loose):
        home = int(expert[token])
        # At price 0 a group may have one token more or less here, where there is room or something to take.
        free = (price == 0) & (load < capacity), (price == 0) & (load > 0)
        for target in np.flatnonzero(tight[token, :home]):
            chain = _chain(tight, expert, loose[place + 1 :], int(target), home, *free)
            if chain is None:
                continue
            for mover, to in ((int(token), int(target)), *chain):
                load[expert[mover]] -= 1
                load[to] += 1
                expert[mover] = to
            break
    return expert


def _chain(
    tight: npt.NDArray[np.bool_],
    expert: IntArray,
    tokens: IntArray,
    start: int,
    home: int,
    takes: npt.NDArray[np.bool_],
    gives: npt.NDArray[np.bool_],
) -> list[tuple[int, int]] | None:
    """Moves that cost nothing, of ``tokens`` alone, that take one from ``start`` and bring one to ``home``.

    Instead of passing one on, an expert that ``takes`` may keep it, and one that ``gives`` pass on one of its own.

    Returns:
        Each token and its new expert; None when there is no such chain.
    """
    reached: dict[int, tuple[int, int] | None] = {
        start: None
    }  # expert -> the one before it and the token that moves
    queue = [start]
    for here in queue:
        if here == home:
            break
        for token in tokens[expert[tokens] == here].tolist():
            for there in np.flatnonzero(tight[token]).tolist():
                if there not in reached:
                    reached[there] = (here, token)
                    queue.append(there)
        if takes[here]:
            for there in np.flatnonzero(gives).tolist():
                if there not in reached:
                    reached[there] = (here, NOBODY)
                    queue.append(there)
    if home not in reached:
        return None
    moves = []
    step, there = reached[home], home
    while step is not None:
        if step[1] != NOBODY:
            moves.append((step[1], there))
        there, step = step[0], reached[step[0]]
    return moves


FAMILY = Family(route=route, weight_init=_orthogonal)
