"""Hash layers, arXiv:2106.04426: a token's id decides; nothing is learned and nothing has to be balanced."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from epmoe.config_routers import HashOptions
from epmoe.errors import ConfigError
from epmoe.moe.inputs import numbers_of_valid
from epmoe.moe.routers.common import Choices, as_routing
from epmoe.moe.routers.family import Family, RouterTensor
from epmoe.ops.reference import usable_rows
from epmoe.types import RouterInputs, Routing

NUM_IDS = 2**31
"""More than any vocabulary has."""


def route(inputs: RouterInputs, options: HashOptions, top_k: int = 1) -> Routing:
    """The expert of the token's id, with weight 1, in training and evaluation alike.

    Raises:
        ValueError: Without token ids.
    """
    if inputs.token_T is None:
        raise ValueError(
            "router hash goes by token ids and needs TokenContext.token_BS; pass ctx=TokenContext(token_BS=...)"
        )
    num_experts = inputs.logits_TE.shape[1]
    limit = NUM_IDS if inputs.table_V is None else inputs.table_V.shape[0]
    token_T = numbers_of_valid("token_BS", inputs.token_T, inputs.valid_T, limit)
    ids_T = token_T % num_experts if inputs.table_V is None else inputs.table_V.index_select(0, token_T)
    usable_T = usable_rows(inputs.logits_TE, inputs.valid_T)
    probs_TE = F.one_hot(ids_T, num_experts).to(inputs.logits_TE.dtype) * usable_T.unsqueeze(1)
    choices = Choices(
        probs_TE=probs_TE,
        ids_TK=ids_T.unsqueeze(1),
        weights_TK=usable_T.unsqueeze(1).to(probs_TE.dtype),
        active_TK=usable_T.unsqueeze(1),
    )
    return as_routing(inputs, options, choices)


def balanced_table(counts: Sequence[int], num_experts: int) -> npt.NDArray[np.int64]:
    """Ids by descending count, each to the expert with the smallest sum of counts so far -> int64 ``[V]``.

    Equal counts: the lower id first. Equal sums: the expert with fewer ids, then the lower one.
    """
    table = np.empty(len(counts), dtype=np.int64)
    load = [(0, 0, expert) for expert in range(num_experts)]
    for token in sorted(range(len(counts)), key=lambda i: -counts[i]):
        total, ids, expert = load[0]
        table[token] = expert
        heapq.heapreplace(load, (total + counts[token], ids + 1, expert))
    return table


def read_counts(path: str, vocab_size: int) -> list[int]:
    """How often every id occurs, a whole number per line; ids after the last line do not occur.

    Raises:
        ConfigError: The file cannot be read, holds something else, or more lines than there are ids.
    """
    try:
        counts = [int(line) for line in Path(path).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"moe.router.counts: cannot read {path}: {error}",
            fix="give a text file with one whole number per line, the count of id 0 first",
        ) from error
    if len(counts) > vocab_size or min(counts, default=0) < 0:
        raise ConfigError(
            f"moe.router.counts: {path} has {len(counts)} numbers from {min(counts, default=0)} up",
            why=f"the vocabulary has {vocab_size} ids, and a count is at least 0",
            fix="count the token ids of the training text with this tokenizer",
        )
    return counts + [0] * (vocab_size - len(counts))


def _parts(options: HashOptions, num_experts: int) -> tuple[RouterTensor, ...]:
    if options.table == "mod":
        return ()
    vocab_size = options.vocab_size
    if vocab_size is None:
        raise ValueError(
            f"router hash with table={options.table} needs the number of token ids: set vocab_size, or table: mod"
        )

    def table(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        if options.counts is not None:
            return balanced_table(read_counts(options.counts, vocab_size), num_experts)
        return rng.permutation(vocab_size) % num_experts

    return (
        RouterTensor(
            name="table", field="table_V", num_rows=vocab_size, projects=False, init=table, dtype=torch.int64
        ),
    )


FAMILY = Family(route=route, parts=_parts, has_weight=False)
