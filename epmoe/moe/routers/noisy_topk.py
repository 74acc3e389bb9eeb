"""Noisy top-k routing, arXiv:1701.06538 section 2.1, and V-MoE's variant of it, arXiv:2106.05974."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from epmoe.config_routers import NoisyTopKOptions
from epmoe.moe.routers.common import as_routing, choose, drawn_normal, numbers_given, probabilities, top_ids
from epmoe.moe.routers.family import Family, RouterTensor, zeros
from epmoe.moe.routers.topk import normalizes
from epmoe.ops import philox
from epmoe.types import RouterInputs, Routing

SMALLEST_SCALE = 1e-6
"""Noise narrower than this counts as this wide where a load is estimated, which divides by it."""


def route(inputs: RouterInputs, options: NoisyTopKOptions, top_k: int) -> Routing:
    """The k largest of logits + normal * scale, in training; of the logits alone in evaluation.

    ``load_E`` is the expected number of tokens that would choose each expert if its own noise were drawn anew; where
    nothing is random (evaluation, k = E) it is None and choices are counted.
    """
    clean_TE = inputs.logits_TE
    num_experts = clean_TE.shape[1]
    paper = options.load_estimator == "paper"
    scale_TE = _scale(inputs.noise_logits_TE, options.noise_floor) if paper else None
    noisy_TE, load_E, importance_E = clean_TE, None, None
    if inputs.training:
        normal_TE = numbers_given(inputs, "normal_TE", tuple(clean_TE.shape), "noise")
        if normal_TE is None:
            normal_TE = drawn_normal(inputs, philox.NOISE, num_experts)
        scale_TE = torch.full_like(clean_TE, 1.0 / num_experts) if scale_TE is None else scale_TE
        noisy_TE = clean_TE + normal_TE * scale_TE
    normalize = normalizes(options.normalize, top_k) if paper else bool(options.normalize)
    choices = choose(inputs, top_k, normalize=normalize, logits_TE=noisy_TE)
    usable_T = choices.active_TK[:, 0]
    if inputs.training and scale_TE is not None and top_k < num_experts:
        load_TE = win_probability(clean_TE, noisy_TE, scale_TE, top_k, usable_T, own=paper)
        load_E = load_TE.sum(0)
    if not paper:
        importance_E = probabilities(clean_TE, usable_T)[1].sum(0)
    return as_routing(inputs, options, choices, logits_TE=noisy_TE, load_E=load_E, importance_E=importance_E)


def _scale(noise_logits_TE: Tensor | None, floor: float) -> Tensor:
    assert noise_logits_TE is not None  # a part of the family
    return F.softplus(noise_logits_TE) + floor


def win_probability(
    clean_TX: Tensor, noisy_TX: Tensor, scale_TX: Tensor, top_k: int, usable_T: Tensor, *, own: bool
) -> Tensor:
    """Probability that a column is among the k largest when its own noise alone is drawn anew -> ``[T, X]``.

    Phi((clean - threshold) / scale). The threshold is the k-th largest noisy value of the other columns: the (k+1)-th
    of all for a column that is chosen now, else the k-th (the paper's P(x, i)); with ``own=False`` the k-th of all for
    every column (V-MoE). Differentiable in all three. Zero for unusable tokens and unavailable columns.

    Args:
        top_k: Below the number of columns.
        own: Whether a column is left out of its own threshold.
    """
    usable_T1 = usable_T.unsqueeze(1)
    available_TX = usable_T1 & (clean_TX != -torch.inf)
    masked_TX = noisy_TX.masked_fill(~usable_T1, 0.0)
    ids_TK = top_ids(masked_TX, top_k + 1)
    best_TK = masked_TX.gather(1, ids_TK)
    threshold_TX = best_TK[:, top_k - 1 : top_k].expand_as(masked_TX)
    if own:
        chosen_TX = torch.zeros_like(available_TX).scatter(1, ids_TK[:, :top_k], True)
        threshold_TX = torch.where(chosen_TX, best_TK[:, top_k:], threshold_TX)
    # Fewer than k others are available: nothing to win against. Kept out of the formula, whose gradient would be NaN.
    contested_TX = available_TX & threshold_TX.isfinite()
    gap_TX = torch.where(contested_TX, clean_TX, 0.0) - torch.where(contested_TX, threshold_TX, 0.0)
    scale_TX = torch.where(contested_TX, scale_TX, 1.0).clamp(min=SMALLEST_SCALE)
    wins_TX = 0.5 * torch.erfc(-gap_TX / scale_TX / math.sqrt(2.0))
    return torch.where(contested_TX, wins_TX, available_TX.to(wins_TX.dtype))


def _parts(options: NoisyTopKOptions, num_experts: int) -> tuple[RouterTensor, ...]:
    if options.load_estimator == "vmoe":
        return ()
    noise = RouterTensor(name="noise_weight", field="noise_logits_TE", num_rows=num_experts, projects=True)
    return (noise,)


FAMILY = Family(route=route, parts=_parts, weight_init=zeros)
