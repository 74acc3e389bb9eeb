"""One choice for all tokens of a document (lingvo's sentence gating, see arXiv:2110.03742)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from epmoe.config_routers import SentenceOptions
from epmoe.moe.routers import gshard_top2
from epmoe.moe.routers.common import numbers_given
from epmoe.moe.routers.family import Family
from epmoe.ops import combine, permute
from epmoe.ops.reference import usable_rows
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: SentenceOptions, top_k: int = 2) -> Routing:
    """``gshard_top2`` of the mean logits of each document's usable tokens, the same as the logits of their mean.

    Without document numbers a sequence is one document. Every random number is that of the document's first token,
    so that its tokens share the second expert too. Slots are the tokens' own: a document may be dropped in part.
    """
    first_T, unit_T = _units(inputs)
    usable_T = usable_rows(inputs.logits_TE, inputs.valid_T)
    clean_TE = inputs.logits_TE.masked_fill(~usable_T.unsqueeze(1), 0.0)
    num_tokens = unit_T.shape[0]
    count_T1 = combine(usable_T.to(clean_TE.dtype).unsqueeze(1), None, unit_T, num_tokens)
    mean_TE = permute(combine(clean_TE, None, unit_T, num_tokens) / count_T1.clamp(min=1.0), unit_T)
    logits_TE = torch.where(usable_T.unsqueeze(1), mean_TE, inputs.logits_TE)
    return gshard_top2.route(of_units(inputs, first_T, logits_TE), options, top_k)


def of_units(inputs: RouterInputs, first_T: Tensor, logits_TE: Tensor) -> RouterInputs:
    """The inputs with other logits, and with the random numbers of each token's unit.

    Args:
        first_T: First token of the unit that each token belongs to.
    """
    tokens, width = inputs.logits_TE.shape
    shapes = {"uniform_T": (tokens,), "uniform_TE": (tokens, width), "order_T": (tokens,)}
    given: dict[str, Any] = {
        name: numbers_given(inputs, name, shape, "shared by a unit")
        for name, shape in shapes.items()
        if getattr(inputs, name) is not None
    }
    shared = {name: numbers[first_T] for name, numbers in given.items()}
    draws = inputs.draws
    if draws is not None:
        draws = replace(draws, sample_T=draws.sample_T[first_T], position_T=draws.position_T[first_T])
    return replace(inputs, logits_TE=logits_TE, draws=draws, **shared)


def _units(inputs: RouterInputs) -> tuple[Tensor, Tensor]:
    """Each token's document: its first token, and a number below T. Documents are stretches of a sequence."""
    num_tokens = inputs.valid_T.shape[0]
    token_T = torch.arange(num_tokens, device=inputs.valid_T.device)
    starts_T = token_T % max(inputs.seq_len or num_tokens, 1) == 0
    if inputs.segment_T is not None:
        starts_T = starts_T | _changes(
            inputs.segment_T, inputs.valid_T, token_T // max(inputs.seq_len or num_tokens, 1)
        )
    first_T = token_T.where(starts_T, 0).cummax(0).values
    return first_T, starts_T.cumsum(0) - 1


def _changes(segment_T: Tensor, valid_T: Tensor, sequence_T: Tensor) -> Tensor:
    """Real tokens of another document than the real token before them. Padding ends none, whatever it says."""
    if segment_T.numel() == 0:
        return valid_T
    place_T = torch.arange(segment_T.shape[0], device=segment_T.device)
    before_T = place_T.where(valid_T, -1).cummax(0).values.roll(1).index_fill(0, place_T[:1], -1)
    known_T = before_T.clamp(min=0)
    other_T = (segment_T != segment_T[known_T]) | (sequence_T != sequence_T[known_T]) | (before_T < 0)
    return valid_T & other_T


FAMILY = Family(route=route)
