"""The one place where parts have names: a line here adds a router, a loss or a dispatcher.

The names a configuration may use are listed in ``epmoe.config``, which does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from epmoe.comm.exchange import Group
from epmoe.config import MoEConfig
from epmoe.moe.dispatcher import AllToAllDispatcher, Dispatcher, LocalDispatcher, PaddedDispatcher
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


def _balance(moe: MoEConfig) -> LossFunction:
    count = moe.balance_count
    if count == "auto":
        count = "all" if moe.router.name == "topk" else "top1"

    def all_choices(routing: Routing, plan: DispatchPlan) -> Tensor:
        return balance_loss(routing.probs_TE, plan.demand_GE, routing.valid_T, count_per_token=moe.top_k)

    def first_choices(routing: Routing, plan: DispatchPlan) -> Tensor:
        first_GE = first_choice_counts(routing, *plan.demand_GE.shape)
        return balance_loss(routing.probs_TE, first_GE, routing.valid_T, count_per_token=1)

    return all_choices if count == "all" else first_choices


def _z(_: MoEConfig) -> LossFunction:
    return lambda routing, plan: z_loss(routing.logits_TE, routing.valid_T)


LOSSES: dict[str, Callable[[MoEConfig], LossFunction]] = {"balance": _balance, "z": _z}

DISPATCHERS: dict[str, Callable[..., Dispatcher]] = {
    "local": lambda _group, *, local, weigh_rows: LocalDispatcher(weigh_rows=weigh_rows),
    "all_to_all": lambda group, *, local, weigh_rows: AllToAllDispatcher(group, weigh_rows=weigh_rows),
    "padded": PaddedDispatcher,
}
"""Name -> dispatcher for the ranks of a group that share the experts (``local``: this one holds all of them)."""


def build_dispatcher(moe: MoEConfig, group: Group, *, ep_size: int, device_type: str) -> Dispatcher:
    """The configured dispatcher for the ``ep_size`` ranks of ``group``.

    Raises:
        ValueError: ``dispatcher: local`` while the experts are spread over several ranks.
    """
    name = moe.dispatcher
    if name == "local" and ep_size > 1:
        raise ValueError(
            f"dispatcher 'local' needs all experts on every rank, but ep_size={ep_size}; "
            f"use 'auto', 'all_to_all' or 'padded'"
        )
    if name == "auto" and device_type == "cuda" and moe.capacity_factor is not None:
        name = "padded"
    elif name == "auto":
        name = "all_to_all" if ep_size > 1 else "local"
    return DISPATCHERS[name](group, local=ep_size == 1, weigh_rows=moe.save == "hidden")


def build_moe_layer(
    moe: MoEConfig,
    *,
    d_model: int,
    d_ff: int | None = None,
    experts: nn.Module | None = None,
    layer: int = 0,
    seed: int = 0,
) -> MoELayer:
    """Builds a layer that holds all experts; ``epmoe.shard_experts`` spreads them over ranks.

    Args:
        moe: Router, capacity, losses.
        d_model: Width, D.
        d_ff: Hidden width of an expert when ``moe.d_ff`` is None.
        experts: Experts to use instead of feed-forward ones, e.g. ``ModuleExperts([...])``.
        layer: Number of the layer in the model; keeps the random draws of layers apart.
        seed: Seed of the random draws.

    Raises:
        ValueError: No hidden width, or ``experts`` of another number than ``moe.num_experts``.
    """
    if experts is None:
        hidden = moe.d_ff or d_ff
        if hidden is None:
            raise ValueError("the experts need a hidden width: set moe.d_ff or pass d_ff")
        experts = FFNExperts(moe.num_experts, d_model, hidden, moe.activation)
    num_experts = getattr(experts, "num_experts", None)
    if num_experts != moe.num_experts:
        raise ValueError(
            f"experts.num_experts={num_experts} must be moe.num_experts={moe.num_experts}, the number of experts "
            f"over all ranks"
        )
    router = Router(
        d_model,
        moe.num_experts,
        top_k=moe.top_k,
        route=ROUTERS[moe.router.name],
        options=moe.router,
        layer=layer,
        seed=seed,
    )
    moe_layer = MoELayer(router, experts, moe, {name: LOSSES[name](moe) for name in moe.losses})
    if moe.dispatcher == "padded":
        moe_layer.dispatcher = PaddedDispatcher(None, local=True, weigh_rows=moe.save == "hidden")
    return moe_layer
