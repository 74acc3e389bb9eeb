"""Averaging over noise: on the logits of a router, which makes its choice a smooth function, and on a layer's input."""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.config_routers import SmoothingOptions
from epmoe.ops import philox
from epmoe.types import Draws


def gate_noise(options: SmoothingOptions, draws: Draws, num_experts: int) -> Tensor:
    """What is added to the logits in training: U[0, 1) or N(0, gate_sigma) -> ``[T, E]``."""
    place = (draws.seed, philox.NOISE, draws.layer, draws.sample_T, draws.position_T, num_experts)
    if options.gate == "uniform":
        return philox.uniform(*place)
    return philox.normal(*place) * options.gate_sigma


def noisy_copy(x_TD: Tensor, draws: Draws, index: int, sigma: float) -> Tensor:
    """Copy ``index`` of the rows, each number with its own N(0, sigma) added -> ``[T, D]``."""
    width = x_TD.shape[1]
    noise_TD = philox.normal(
        draws.seed,
        philox.SMOOTHING,
        draws.layer,
        draws.sample_T,
        draws.position_T,
        width,
        first_lane=index * (-(-width // 4) * 4),
    )
    return x_TD + sigma * noise_TD.to(x_TD.dtype)


def smoothed_probability(logits_TE: Tensor, noise_NTE: Tensor) -> Tensor:
    """How often each expert has the largest noisy logit, over N draws of noise -> ``[T, E]``, no gradient.

    Monte-Carlo estimate of P(argmax(h + r) = e). For r uniform in [0, 1) the exact probability changes by at most
    E^2 max|h - h'| (arXiv:2208.02813). Of equal logits the lower expert wins.
    """
    best_NT1 = (logits_TE + noise_NTE).sort(dim=-1, descending=True, stable=True).indices[..., :1]
    won_NTE = best_NT1 == torch.arange(logits_TE.shape[1], device=logits_TE.device)
    return won_NTE.to(logits_TE.dtype).mean(0)
