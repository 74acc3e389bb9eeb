"""The one place where parts have names: a line here adds a router, a loss or a dispatcher.

The names a configuration may use are listed in ``epmoe.config``, which does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from epmoe.comm.exchange import Exchange, Group, flat, hierarchical
from epmoe.config import MoEConfig
from epmoe.moe import soft_layer as soft
from epmoe.moe.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher, PaddedDispatcher
from epmoe.moe.expert_dropout import HiddenDropout
from epmoe.moe.experts import FFNExperts
from epmoe.moe.layer import MoELayer, balance_count
from epmoe.moe.losses import (
    LossInputs,
    affinity_counts,
    balance_loss,
    batchwise_threshold_loss,
    choice_counts,
    communication_balance_loss,
    device_balance_loss,
    global_balance_loss,
    importance,
    importance_loss,
    load_loss,
    tokens_per_device,
    z_loss,
)
from epmoe.moe.overlap import OverlapDispatcher
from epmoe.moe.router import Router
from epmoe.moe.routers.family import Family
from epmoe.moe.smoothed_layer import SmoothedMoELayer

FILES = (
    "gshard_top2",
    "switch",
    "topk",
    "noisy_topk",
    "hierarchical",
    "deepseek",
    "expert_choice",
    "base",
    "sinkhorn",
    "strictly_balanced",
    "hash",
    "sentence",
    "task",
    "dense",
)
"""The families in ``epmoe/moe/routers``, a file each; a line here adds one."""
ROUTERS: dict[str, Family] = {name: import_module(f"epmoe.moe.routers.{name}").FAMILY for name in FILES}
ROUTERS["soft"] = soft.FAMILY


def _balance(moe: MoEConfig, inputs: LossInputs) -> Tensor:
    routing, count_GE = inputs.routing, inputs.plan.demand_GE
    first_only = balance_count(moe) == "top1"
    count_per_token = 1 if first_only else moe.top_k
    if moe.balance_scope == "global":
        count_E, num_tokens = inputs.global_count_E, inputs.global_tokens
        assert count_E is not None  # the layer counts for this scope
        assert num_tokens is not None
        return global_balance_loss(routing.probs_TE, count_E, num_tokens, count_per_token=count_per_token)
    scopes = {"group": count_GE.shape[0], "sequence": _num_sequences(inputs), "micro_batch": 1}
    num_groups = scopes[moe.balance_scope]
    if first_only or num_groups != count_GE.shape[0]:
        count_GE = choice_counts(routing, num_groups, moe.num_experts, first_only=first_only)
    return balance_loss(routing.probs_TE, count_GE, routing.valid_T, count_per_token=count_per_token)


def _num_sequences(inputs: LossInputs) -> int:
    return inputs.routing.valid_T.shape[0] // max(inputs.seq_len, 1)


def _z(_: MoEConfig, inputs: LossInputs) -> Tensor:
    return z_loss(inputs.routing.logits_TE, inputs.routing.valid_T)


def _importance(moe: MoEConfig, inputs: LossInputs) -> Tensor:
    return importance_loss(importance(inputs.routing, moe.num_experts), inputs.routing.valid_T)


def _load(_: MoEConfig, inputs: LossInputs) -> Tensor:
    routing = inputs.routing
    return load_loss(routing.load_E, inputs.plan.demand_GE, routing.valid_T, routing.probs_TE.dtype)


def _sequence_balance(moe: MoEConfig, inputs: LossInputs) -> Tensor:
    routing = inputs.routing
    count_GE = affinity_counts(routing.logits_TE, routing.valid_T, _num_sequences(inputs), moe.top_k)
    return balance_loss(routing.probs_TE, count_GE, routing.valid_T, count_per_token=moe.top_k)


def _device_balance(moe: MoEConfig, inputs: LossInputs) -> Tensor:
    return device_balance_loss(
        inputs.routing.probs_TE,
        inputs.plan.demand_GE.sum(0),
        inputs.routing.valid_T,
        num_devices=moe.router.expert_groups,
        top_k=moe.top_k,
    )


def _communication_balance(moe: MoEConfig, inputs: LossInputs) -> Tensor:
    groups = moe.router.expert_groups
    return communication_balance_loss(
        inputs.routing.probs_TE,
        tokens_per_device(inputs.routing, groups, moe.num_experts),
        inputs.routing.valid_T,
        limit=min(moe.router.group_limit, moe.top_k),
    )


def _batchwise_threshold(_: MoEConfig, inputs: LossInputs) -> Tensor:
    return batchwise_threshold_loss(inputs.routing)


LOSSES: dict[str, Callable[[MoEConfig, LossInputs], Tensor]] = {
    "balance": _balance,
    "z": _z,
    "importance": _importance,
    "load": _load,
    "sequence_balance": _sequence_balance,
    "device_balance": _device_balance,
    "communication_balance": _communication_balance,
    "batchwise_threshold": _batchwise_threshold,
}

DISPATCHERS: dict[str, Callable[..., Any]] = {
    "local": lambda _exchange, *, weigh_rows, num_parts=1: LocalDispatcher(weigh_rows=weigh_rows),
    "all_to_all": AllToAllDispatcher,
    "padded": PaddedDispatcher,
}
"""Name -> dispatcher for the ranks that an exchange joins (None, for ``local`` and ``padded``: this one holds all
experts)."""

EXCHANGES: dict[str, Callable[[Group, tuple[Group, Group] | None], Exchange]] = {
    "flat": lambda group, _nodes: flat(group),
    "hierarchical": lambda group, nodes: hierarchical(*nodes) if nodes else flat(group),
}
"""Name -> exchange for the ranks of a group and, where it has several nodes, their groups (node, rail)."""


def build_dispatcher(
    moe: MoEConfig, exchange: Exchange | None, *, device_type: str, num_parts: int = 0
) -> Dispatcher:
    """The configured dispatcher for the ranks that an exchange joins; None = this one, without a process group.

    Args:
        num_parts: Of the exchange, one of which travels while another is computed; 0 = nothing overlaps.

    Raises:
        ValueError: ``dispatcher: local``, or a loss of every expert's own output, while the experts are spread over
            several ranks; or more parts than experts on a rank.
    """
    ep_size = 1 if exchange is None else exchange.num_ranks
    if ep_size > 1 and getattr(moe.router, "router_loss", False):
        raise ValueError(
            f"router_loss=true announces EDD or a loss of mixtures, which compares what a token's experts say each on "
            f"its own; with ep_size={ep_size} these lie on several ranks and come back as one sum; use ep_size=1, or "
            f"leave router_loss out with pooling weighted_sum or max_scaled"
        )
    num_local = moe.num_experts // ep_size
    if num_parts > num_local:
        raise ValueError(
            f"overlap_chunks={num_parts} needs as many experts on each rank, and {moe.num_experts} experts over "
            f"ep_size={ep_size} are {num_local}; valid values: 1 to {num_local}"
        )
    name = "padded" if moe.router.no_capacity and moe.dispatcher == "auto" else moe.dispatcher
    if name == "local" and ep_size > 1:
        raise ValueError(
            f"dispatcher 'local' needs all experts on every rank, but ep_size={ep_size}; "
            f"use 'auto', 'all_to_all' or 'padded'"
        )
    if name == "auto" and device_type == "cuda" and moe.capacity_factor is not None:
        name = "padded"
    elif name == "auto":
        name = "all_to_all" if ep_size > 1 else "local"
    if name != "all_to_all" and ep_size == 1:
        exchange = None
    dispatcher = DISPATCHERS[name](exchange, weigh_rows=moe.save == "hidden", num_parts=max(num_parts, 1))
    overlaps = num_parts > 0 and exchange is not None
    found: Dispatcher = OverlapDispatcher(dispatcher) if overlaps else dispatcher
    return found


def build_moe_layer(
    moe: MoEConfig,
    *,
    d_model: int,
    d_ff: int | None = None,
    experts: nn.Module | None = None,
    layer: int = 0,
    seed: int = 0,
    vocab_size: int | None = None,
) -> MoELayer:
    """Builds a layer that holds all experts; ``epmoe.shard_experts`` spreads them over ranks.

    Args:
        moe: Router, capacity, losses.
        d_model: Width, D.
        d_ff: Hidden width of an expert when ``moe.d_ff`` is None.
        experts: Experts to use instead of feed-forward ones, e.g. ``ModuleExperts([...])``.
        layer: Number of the layer in the model; keeps the random draws of layers apart.
        seed: Seed of the random draws.
        vocab_size: Token ids, for a router that has a table of them.

    Raises:
        ValueError: No hidden width, or ``experts`` that are a list, or of another number than ``moe.num_experts``.
    """
    if isinstance(experts, nn.ModuleList | list | tuple):
        raise ValueError(f"experts is a {type(experts).__name__}; wrap the modules: ModuleExperts([...])")
    if experts is None:
        hidden = moe.d_ff or d_ff
        if hidden is None:
            raise ValueError("the experts need a hidden width: set moe.d_ff or pass d_ff")
        experts = FFNExperts(moe.num_experts, d_model, hidden, moe.activation)
    if moe.expert_dropout:
        if not isinstance(experts, FFNExperts):
            raise ValueError(
                f"expert_dropout={moe.expert_dropout} is for feed-forward experts; into modules of yours put nn.Dropout"
            )
        experts.dropout = HiddenDropout(probability=moe.expert_dropout, seed=seed, layer=layer)
    num_experts = getattr(experts, "num_experts", None)
    if num_experts != moe.num_experts:
        raise ValueError(
            f"experts.num_experts={num_experts} must be moe.num_experts={moe.num_experts}, the number of experts "
            f"over all ranks"
        )
    options = moe.router if vocab_size is None else moe.router.for_vocabulary(vocab_size)
    router = Router(
        d_model,
        moe.num_experts,
        top_k=moe.top_k,
        family=ROUTERS[moe.router.name],
        options=options,
        layer=layer,
        seed=seed,
    )
    moe_layer = _layer_class(moe)(
        router, experts, moe, {name: partial(LOSSES[name], moe) for name in moe.losses}
    )
    if moe.dispatcher != "all_to_all":  # which needs ranks; until then the layer keeps its local one
        moe_layer.dispatcher = build_dispatcher(moe, None, device_type="cpu")
    refuse_batch_statistics(moe_layer)
    return moe_layer


def _layer_class(moe: MoEConfig) -> type[MoELayer]:
    if moe.router.name == "soft":
        return soft.SoftMoELayer
    smoothing = moe.router.smoothing
    return SmoothedMoELayer if smoothing is not None and smoothing.draws else MoELayer


def refuse_batch_statistics(layer: MoELayer) -> None:
    """Raises ValueError where blocks with rows of zeros would meet experts that look at their rows together."""
    if not layer.dispatcher.static or isinstance(layer, soft.SoftMoELayer):
        return
    for name, module in layer.experts.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a {type(module).__name__}, and padded dispatch gives experts rows of zeros in unfilled "
                f"slots, which its statistics would count; use moe.dispatcher='all_to_all' (on one rank 'local'), or a "
                f"norm of single rows"
            )
