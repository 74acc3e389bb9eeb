"""Losses of classical mixtures, made from every expert's own output: cooperative, competitive, likelihood, EDD.

Pure functions, sums over tokens, of what ``epmoe.moe.expert_outputs.run_experts`` returns. ``z`` are the logits of the
K experts that were evaluated for a token, ``p = softmax(z)``, so that p sums to 1 over those. An expert that was not
evaluated has the logit -inf; a token without any, or with a logit that is NaN or +inf, counts as padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from epmoe.config_routers import EddOptions
from epmoe.types import compute_dtype

EDD_PRESETS: Mapping[str, EddOptions] = MappingProxyType(
    {"gentle": EddOptions(weight=0.1, alpha=0.1), "strong": EddOptions(weight=0.5, alpha=0.7)}
)

NORM_EPS = 1e-8
"""Shortest length of an output in a cosine."""


def squared_errors(outputs_TKO: Tensor, target_TO: Tensor) -> Tensor:
    """|d - o_i|^2 of every expert -> ``[T, K]``."""
    outputs_TKO = outputs_TKO.to(compute_dtype(outputs_TKO.dtype))
    return (target_TO.unsqueeze(1) - outputs_TKO).square().sum(-1)


def cross_entropies(outputs_TKO: Tensor, target_T: Tensor) -> Tensor:
    """-log softmax(o_i)[y] of every expert, nats -> ``[T, K]``.

    Args:
        outputs_TKO: Logits of the classes (not probabilities).
        target_T: int64 class of each token.
    """
    outputs_TKO = outputs_TKO.to(compute_dtype(outputs_TKO.dtype))
    index_TK1 = target_T.view(-1, 1, 1).expand(-1, outputs_TKO.shape[1], 1)
    return -outputs_TKO.log_softmax(-1).gather(-1, index_TK1).squeeze(-1)


def cooperative_loss(logits_TK: Tensor, outputs_TKO: Tensor, target_TO: Tensor) -> Tensor:
    """Sum over tokens of |d - sum_i p_i o_i|^2 -> scalar: experts correct each other (Jacobs et al. 1991, eq. 1)."""
    logits_TK, present_TK = _clean(logits_TK)
    weight_TK1 = logits_TK.softmax(-1).unsqueeze(-1)
    outputs_TKO = torch.where(present_TK.unsqueeze(-1), outputs_TKO, 0.0)
    error_T = (target_TO - (weight_TK1 * outputs_TKO).sum(1)).square().sum(-1)
    return torch.where(present_TK.any(-1), error_T, 0.0).sum()


def competitive_loss(logits_TK: Tensor, error_TK: Tensor) -> Tensor:
    """Sum over tokens of sum_i p_i e_i -> scalar; dE/dz_i = p_i (e_i - sum p e) (Jacobs et al. 1991, eq. 2).

    Args:
        error_TK: Error of every expert alone: ``squared_errors`` or ``cross_entropies``.
    """
    logits_TK, present_TK = _clean(logits_TK)
    return (logits_TK.softmax(-1) * torch.where(present_TK, error_TK, 0.0)).sum()


def mixture_nll(logits_TK: Tensor, nll_TK: Tensor) -> Tensor:
    """Sum over tokens of -log sum_i p_i exp(-nll_i) -> scalar; dE/dz_i = p_i - h_i, with h the ``posterior``.

    Args:
        nll_TK: Each expert's negative log-likelihood of the target: ``squared_errors / 2`` for Gaussians of unit
            variance (Jacobs et al. 1991, eq. 3, and Jordan and Jacobs 1994 for two levels), ``cross_entropies`` for
            classes.
    """
    logits_TK, present_TK = _clean(logits_TK)
    density_T = (logits_TK.log_softmax(-1) - torch.where(present_TK, nll_TK, 0.0)).logsumexp(-1)
    return -torch.where(present_TK.any(-1), density_T, 0.0).sum()


def posterior(logits_TK: Tensor, nll_TK: Tensor) -> Tensor:
    """h_i = p_i exp(-nll_i) / sum: whose token it is, now that the target is known -> ``[T, K]``, zeros for padding."""
    logits_TK, present_TK = _clean(logits_TK)
    share_TK = (logits_TK - torch.where(present_TK, nll_TK, 0.0)).softmax(-1)
    return torch.where(present_TK, share_TK, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EddTerms:
    """Both parts of EDD as sums over tokens, which add up over ranks and micro-batches."""

    diversification: Tensor
    """Differentiable sum of every token's mean similarity of its experts' outputs."""
    diverse_tokens: Tensor
    """int64: tokens in that sum, which have at least two outputs."""
    dispatching: Tensor
    """Differentiable sum of the router's cross-entropies."""
    tokens: Tensor
    """int64: tokens in that sum, which have an output."""


def edd_terms(
    logits_TK: Tensor, outputs_TKO: Tensor, loss_TK: Tensor, options: EddOptions | None = None
) -> EddTerms:
    """Expert diversification and dispatching: experts that differ, and a router that knows the best of them.

    Diversification is the mean over pairs of a token's experts of cos(o_i, o_j)^2 in [0, 1], and trains the experts
    alone. Dispatching is -log p[b], where b is the expert with the smallest loss, and trains the router alone, with
    the gradient p - onehot(b).

    Args:
        outputs_TKO: Outputs of the experts; for classes logits, not probabilities.
        loss_TK: Task loss of every expert alone; no gradient reaches it. NaN counts as the worst.
        options: Similarity and temperature; None = the defaults.
    """
    options = options or EddOptions()
    logits_TK, present_TK = _clean(logits_TK)
    alike_T, diverse_T = _similarity(outputs_TKO, present_TK, options.similarity)
    log_p_TK = logits_TK.log_softmax(-1).masked_fill(~present_TK, 0.0)
    entropy_T = -(_best(loss_TK.detach(), present_TK, options.temperature) * log_p_TK).sum(-1)
    return EddTerms(
        diversification=alike_T.sum(),
        diverse_tokens=diverse_T.sum(),
        dispatching=entropy_T.sum(),
        tokens=present_TK.any(-1).sum(),
    )


def edd_loss(
    terms: EddTerms,
    options: EddOptions | None = None,
    *,
    diverse_tokens: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """alpha * mean similarity + (1 - alpha) * mean cross-entropy -> scalar, without ``options.weight``.

    Args:
        diverse_tokens, tokens: Divisors instead of the terms' own: their sums over all ranks and micro-batches, so
            that the losses of these add up to that of the whole batch.
    """
    options = options or EddOptions()
    diverse = terms.diverse_tokens if diverse_tokens is None else diverse_tokens
    total = terms.tokens if tokens is None else tokens
    diversification = terms.diversification / diverse.clamp(min=1)
    return options.alpha * diversification + (1 - options.alpha) * terms.dispatching / total.clamp(min=1)


def _clean(logits_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with zeros for padding, so that no softmax is empty, and which experts are there."""
    broken_T1 = (logits_TK.isnan() | (logits_TK == torch.inf)).any(-1, keepdim=True)
    present_TK = (logits_TK != -torch.inf) & ~broken_T1
    return logits_TK.masked_fill(~present_TK.any(-1, keepdim=True), 0.0), present_TK


def _similarity(outputs_TKO: Tensor, present_TK: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Mean similarity over each token's pairs of outputs, 0 where there is no pair, and whether there is one."""
    outputs_TKO = torch.where(present_TK.unsqueeze(-1), outputs_TKO, 0.0)
    outputs_TKO = outputs_TKO.to(compute_dtype(outputs_TKO.dtype))
    width = present_TK.shape[1]
    i_P, j_P = torch.triu_indices(width, width, offset=1, device=outputs_TKO.device)
    pair_TP = present_TK[:, i_P] & present_TK[:, j_P]
    if kind == "cosine":
        length_TK1 = outputs_TKO.square().sum(-1, keepdim=True).clamp(min=NORM_EPS**2).sqrt()
        unit_TKO = outputs_TKO / length_TK1
        alike_TP = (unit_TKO[:, i_P] * unit_TKO[:, j_P]).sum(-1).square()
    else:
        alike_TP = (-0.5 * (outputs_TKO[:, i_P] - outputs_TKO[:, j_P]).square().sum(-1)).exp()
    count_T = pair_TP.sum(-1)
    return (alike_TP * pair_TP).sum(-1) / count_T.clamp(min=1), count_T > 0


def _best(loss_TK: Tensor, present_TK: Tensor, temperature: float | None) -> Tensor:
    """What the router is to say: 1 for the expert with the smallest loss, or shares by loss; zeros for padding."""
    worst = torch.finfo(loss_TK.dtype).max
    loss_TK = loss_TK.nan_to_num(nan=worst, posinf=worst).masked_fill(~present_TK, torch.inf)
    if temperature is None:
        best_T = loss_TK.sort(dim=-1, stable=True).indices[
            :, 0
        ]  # the lowest of equals, which argmin may not give
        share_TK = F.one_hot(best_T, loss_TK.shape[1]).to(loss_TK.dtype)
    else:
        share_TK = (-loss_TK / temperature).masked_fill(~present_TK.any(-1, keepdim=True), 0.0).softmax(-1)
    return torch.where(present_TK, share_TK, 0.0)
