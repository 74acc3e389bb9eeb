"""What the routers of the top-k family share."""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.config import RouterOptions
from epmoe.ops import route_topk
from epmoe.types import RouterInputs, Routing


def missing_draws(policy: str) -> ValueError:
    """The error of a random policy that was not told which samples the tokens belong to."""
    return ValueError(
        f"router policy {policy!r} draws random numbers in training and needs TokenContext.sample_B "
        f"(the sample number of each sequence); pass ctx=TokenContext(sample_B=...)"
    )


def route_by_logits(
    inputs: RouterInputs,
    options: RouterOptions,
    top_k: int,
    *,
    normalize: bool,
    second_policy: str = "all",
    tau: float = 0.5,
) -> Routing:
    """Top-k of the logits as a flat list of assignments in the order of ``options.slot_order``.

    Raises:
        ValueError: ``second_policy="random"`` without draws or with both kinds, or draws of the wrong shape.
    """
    draws, uniform_T = inputs.draws, inputs.uniform_T
    if second_policy == "random":
        _check_draws(inputs)
    sample_T, position_T = (
        (None, None) if draws is None or uniform_T is not None else (draws.sample_T, draws.position_T)
    )
    probs_TE, ids_TK, weights_TK, active_TK = route_topk(
        inputs.logits_TE,
        inputs.valid_T,
        uniform_T,
        sample_T,
        position_T,
        top_k,
        normalize,
        second_policy,
        tau,
        draws.seed if draws else 0,
        draws.layer if draws else 0,
    )
    usable_T = active_TK[:, 0]  # a token that can be routed uses its first choice
    unusable_T = ~usable_T
    num_tokens, device = usable_T.shape[0], usable_T.device
    token_TK = torch.arange(num_tokens, device=device).unsqueeze(1).expand(num_tokens, top_k)
    choice_TK = torch.arange(top_k, device=device).expand(num_tokens, top_k)
    # Logits that are all -inf say that no expert is available: nothing is broken.
    broken_T = inputs.valid_T & unusable_T & (inputs.logits_TE != -torch.inf).any(-1)

    def listed(values_TK: Tensor) -> Tensor:
        return (values_TK.t() if options.slot_order == "choice_major" else values_TK).reshape(-1)

    return Routing(
        token_A=listed(token_TK),
        expert_A=listed(ids_TK),
        weight_A=listed(weights_TK),
        active_A=listed(active_TK),
        choice_A=listed(choice_TK),
        probs_TE=probs_TE,
        logits_TE=inputs.logits_TE.masked_fill(unusable_T.unsqueeze(1), 0.0),
        valid_T=usable_T,
        nonfinite_tokens=broken_T.sum(),
    )


def _check_draws(inputs: RouterInputs) -> None:
    if inputs.draws is None and inputs.uniform_T is None:
        raise missing_draws("random")
    if inputs.draws is not None and inputs.uniform_T is not None:
        raise ValueError("give a random policy either counters (draws) or numbers (uniform_T), not both")
    if inputs.uniform_T is not None and inputs.uniform_T.shape != inputs.valid_T.shape:
        raise ValueError(
            f"uniform_T needs one number per token, shape {tuple(inputs.valid_T.shape)}, "
            f"got {tuple(inputs.uniform_T.shape)}"
        )
