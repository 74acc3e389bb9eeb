"""Plain top-k routing, as in Mixtral (normalised weights) and OLMoE (raw probabilities)."""

from __future__ import annotations

from epmoe.config import TopKOptions
from epmoe.moe.routers.common import route_by_logits
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: TopKOptions, top_k: int) -> Routing:
    """K experts per token, all of them always used."""
    normalize = top_k > 1 if options.normalize is None else options.normalize
    return route_by_logits(inputs, options, top_k, normalize=normalize)
