"""Inputs every router has to cope with, small and reproducible."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .routing import Decision

KINDS = ("random", "ties", "one_expert", "underflow", "broken", "all_padding")


def logits_and_valid(kind: str, tokens: int, experts: int, seed: int = 0) -> tuple[Tensor, list[bool]]:
    """float64 logits [T, E] and the validity of each token.

    ``ties``: few distinct values. ``one_expert``: everybody wants expert 0. ``underflow``: all probabilities but
    the first are exactly 0. ``broken``: rows with NaN, +inf, -inf, and padding, in between good ones.
    """
    generator = torch.Generator().manual_seed(1000 * tokens + 10 * experts + seed)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    valid = [True] * tokens
    if kind == "ties":
        logits = (logits * 1.5).round()
    if kind == "one_expert" and experts > 0:
        logits[:, 0] += 10.0
    if kind == "underflow":
        for token in range(tokens):
            logits[token, token % experts] += 2000.0
    if kind == "all_padding":
        valid = [False] * tokens
    if kind == "broken":
        for token in range(tokens):
            _break_row(logits[token], token % 8)
            valid[token] = token % 8 != 6
    return logits, valid


def _break_row(row_E: Tensor, how: int) -> None:
    """Spoils a row in place, in one of eight ways (0, 6 and 7 leave it whole)."""
    experts = row_E.shape[0]
    if how == 1:
        row_E[experts // 2] = math.nan
    elif how == 2:
        row_E[-1] = math.inf
    elif how == 3:
        row_E[:] = -math.inf
    elif how == 4:
        row_E[1:] = -math.inf  # one expert left
    elif how == 5:
        row_E[0] = -math.inf
        if experts > 1:
            row_E[1] = math.nan if experts == 2 else -math.inf


def uniforms(tokens: int, seed: int = 0) -> list[float]:
    """Draws in [0, 1), with a 0 at every seventh token."""
    generator = torch.Generator().manual_seed(77 + seed)
    draws = torch.rand(tokens, generator=generator).tolist()
    return [0.0 if token % 7 == 6 else draw for token, draw in enumerate(draws)]


def decision_list(decision: Decision) -> list[tuple[int, int, int]]:
    """(token, choice, expert) in priority order."""
    return [(a.token, a.choice, a.expert) for a in decision.assignments]
