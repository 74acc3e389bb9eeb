"""Switch's top-1 router, arXiv:2101.03961 section 2.1."""

from __future__ import annotations

from epmoe.config import SwitchOptions
from epmoe.moe.routers.common import route_by_logits
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: SwitchOptions, top_k: int = 1) -> Routing:
    """One expert per token, weighted by its raw probability (normalised it would be 1 and train nothing)."""
    return route_by_logits(inputs, options, top_k, normalize=False)
