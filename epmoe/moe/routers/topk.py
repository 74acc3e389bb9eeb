"""Plain top-k routing, as in Mixtral (normalised weights) and OLMoE (raw probabilities)."""

from __future__ import annotations

from dataclasses import replace

from epmoe.config_routers import TopKOptions
from epmoe.moe.routers.common import as_routing, choose
from epmoe.moe.routers.family import Family
from epmoe.types import RouterInputs, Routing


def normalizes(normalize: bool | None, top_k: int) -> bool:
    """Whether the weights of a token's k experts sum to 1; by default where that still trains the router."""
    return top_k > 1 if normalize is None else normalize


def route(inputs: RouterInputs, options: TopKOptions, top_k: int) -> Routing:
    """K experts per token, all of them always used."""
    choices = choose(inputs, top_k, normalize=normalizes(options.normalize, top_k))
    if options.scale != 1.0:
        choices = replace(choices, weights_TK=choices.weights_TK * options.scale)
    return as_routing(inputs, options, choices)


FAMILY = Family(route=route)
