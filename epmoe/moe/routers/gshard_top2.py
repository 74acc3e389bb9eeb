"""GShard's top-2 router with a random second expert, arXiv:2006.16668 Algorithm 1."""

from __future__ import annotations

from epmoe.config import GShardTop2Options
from epmoe.moe.routers.common import route_by_logits
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: GShardTop2Options, top_k: int = 2) -> Routing:
    """Two experts per token; the weights g1/(g1+g2) and g2/(g1+g2) are fixed before anything is dropped.

    In training the second expert is used with probability min(1, a2/tau), tau = 0.5 in the paper; a skipped second
    choice takes no slot and the first one's weight does not change.
    """
    policy = options.second_policy if inputs.training else options.second_policy_eval
    return route_by_logits(inputs, options, top_k, normalize=True, second_policy=policy, tau=options.tau)
