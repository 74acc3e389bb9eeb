"""The one place where parts have names: add a line here to add a router, a loss or an activation."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from epmoe.config import MoEConfig
from epmoe.moe.experts import FFNExperts
from epmoe.moe.layer import LossFunction, MoELayer
from epmoe.moe.losses import balance_loss, first_choice_counts, z_loss
from epmoe.moe.router import RouteFunction, Router
from epmoe.moe.routers import gshard_top2, switch, topk
from epmoe.types import DispatchPlan, Routing

ROUTERS: dict[str, RouteFunction] = {
    "gshard_top2": gshard_top2.route,
    "switch": switch.route,
    "topk": topk.route,
}


def _balance(routing: Routing, plan: DispatchPlan, *, top_k: int, count: str) -> Tensor:
    if count == "all":
        return balance_loss(routing.probs_TE, plan.demand_GE, routing.valid_T, count_per_token=top_k)
    first_GE = first_choice_counts(routing, *plan.demand_GE.shape)
    return balance_loss(routing.probs_TE, first_GE, routing.valid_T, count_per_token=1)


def _z(routing: Routing, plan: DispatchPlan) -> Tensor:
    return z_loss(routing.logits_TE, routing.valid_T)


def build_losses(moe: MoEConfig) -> dict[str, LossFunction]:
    """The loss functions a configuration names.

    Raises:
        ValueError: An unknown loss; the message lists the known ones.
    """
    count = moe.balance_count
    if count == "auto":
        count = "all" if moe.router.name == "topk" else "top1"
    known: dict[str, LossFunction] = {
        "balance": partial(_balance, top_k=moe.top_k, count=count),
        "z": _z,
    }
    unknown = sorted(set(moe.losses) - set(known))
    if unknown:
        raise ValueError(f"unknown losses {unknown}; there are {sorted(known)}")
    return {name: known[name] for name in moe.losses}


def build_moe_layer(
    moe: MoEConfig,
    *,
    d_model: int,
    d_ff: int | None = None,
    experts: nn.Module | None = None,
    layer: int = 0,
    seed: int = 0,
) -> MoELayer:
    """Builds a layer that holds all experts; ``epmoe.parallel.shard_experts`` spreads them over ranks.

    Args:
        moe: Router, capacity, losses.
        d_model: Width, D.
        d_ff: Hidden width of an expert when ``moe.d_ff`` is None.
        experts: Experts to use instead of feed-forward ones, e.g. ``ModuleExperts([...])``.
        layer: Number of the layer in the model; keeps the random draws of layers apart.
        seed: Seed of the random draws.

    Raises:
        ValueError: No hidden width, top_k larger than the number of experts, or an unknown loss.
    """
    if experts is None:
        hidden = moe.d_ff or d_ff
        if hidden is None:
            raise ValueError("the experts need a hidden width: set moe.d_ff or pass d_ff")
        experts = FFNExperts(moe.num_experts, d_model, hidden, moe.activation)
    router = Router(
        d_model,
        moe.num_experts,
        top_k=moe.top_k,
        route=ROUTERS[moe.router.name],
        options=moe.router,
        layer=layer,
        seed=seed,
    )
    return MoELayer(router, experts, moe, build_losses(moe))
