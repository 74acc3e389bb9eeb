"""Layers to test, and the oracle's answer to the same question."""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.moe.build import build_moe_layer
from epmoe.moe.layer import MoELayer
from epmoe.moe.plan import plan_local, plan_slots
from epmoe.types import DispatchPlan, Routing, TokenContext
from tests.oracle import capacity as oracle_capacity
from tests.oracle import philox, routing
from tests.oracle.layer import LayerResult, ffn_experts, router_logits, run_layer
from tests.oracle.routing import Decision

SEED, LAYER = 2**33 + 5, 3
SECOND_EXPERT, JITTER = 0, 1

ROUTERS: dict[str, dict] = {
    "gshard_all": {"router": {"name": "gshard_top2", "second_policy": "all"}},
    "gshard_random": {"router": {"name": "gshard_top2", "second_policy": "random", "tau": 0.4}},
    "gshard_threshold": {"router": {"name": "gshard_top2", "second_policy": "threshold", "tau": 0.3}},
    "gshard_none": {"router": {"name": "gshard_top2", "second_policy": "none"}},
    "switch": {"router": {"name": "switch", "jitter": 0.2}},
    "top1": {"router": "topk", "top_k": 1},
    "top1_normalized": {"router": {"name": "topk", "normalize": True}, "top_k": 1},
    "top2": {"router": "topk", "top_k": 2},
    "top3_raw": {"router": {"name": "topk", "normalize": False}, "top_k": 3},
}


def config(router: str, *, slot_order: str = "choice_major", **fields) -> MoEConfig:
    """The MoE section of a named router."""
    values = {**ROUTERS[router], **fields}
    options = values["router"]
    options = {"name": options} if isinstance(options, str) else dict(options)
    values["router"] = {**options, "slot_order": slot_order}
    return MoEConfig.model_validate(values)


def make_layer(moe: MoEConfig, d_model: int = 4, d_ff: int = 3, scale: float = 1.0) -> MoELayer:
    """A float64 layer with reproducible weights; the router's are large enough to have opinions."""
    generator = torch.Generator().manual_seed(moe.num_experts)
    layer = build_moe_layer(moe, d_model=d_model, d_ff=d_ff, layer=LAYER, seed=SEED).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return layer


def tokens(num_sequences: int, seq_len: int, d_model: int = 4, seed: int = 0) -> Tensor:
    """float64 vectors [B, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_sequences, seq_len, d_model, generator=generator, dtype=torch.float64)


def context(x_BSD: Tensor, padding: str = "none") -> TokenContext:
    """Sample numbers, one of them above 2**32, and a padding mask."""
    num_sequences, seq_len = x_BSD.shape[:2]
    valid_BS = torch.ones(num_sequences, seq_len, dtype=torch.bool)
    if padding == "some":
        valid_BS = (torch.arange(num_sequences * seq_len) % 5 != 3).view(num_sequences, seq_len)
    if padding == "all":
        valid_BS[:] = False
    sample_B = torch.arange(num_sequences) * 2**31 + 9
    return TokenContext(valid_BS=None if padding == "none" else valid_BS, sample_B=sample_B)


def local_plan(routing: Routing, *, num_experts: int, group_size: int, capacity: int) -> DispatchPlan:
    """The plan of a rank that holds all experts."""
    slots = plan_slots(routing, num_experts=num_experts, group_size=group_size, capacity=capacity)
    return plan_local(routing, slots)


def oracle_decision(logits_TE: Tensor, valid: list[bool], moe: MoEConfig, uniform: list[float]) -> Decision:
    """What the configured router decides in training."""
    options = moe.router
    if options.name == "gshard_top2":
        return routing.gshard_top2(
            logits_TE,
            valid,
            policy=options.second_policy,
            tau=options.tau,
            uniform=uniform,
            slot_order=options.slot_order,
        )
    if options.name == "switch":
        return routing.switch(logits_TE, valid, slot_order=options.slot_order)
    normalize = moe.top_k > 1 if options.normalize is None else options.normalize
    return routing.topk(logits_TE, valid, k=moe.top_k, normalize=normalize, slot_order=options.slot_order)


def oracle_slots(moe: MoEConfig, group_size: int) -> int | None:
    """Capacity in training."""
    if moe.capacity_factor is None:
        return None
    return oracle_capacity.capacity(
        moe.capacity_factor,
        group_size=group_size,
        num_experts=moe.num_experts,
        k=moe.top_k,
        unit=moe.capacity_unit,
        minimum=moe.min_capacity,
        multiple=moe.capacity_multiple,
    )


def oracle_layer(x_BSD: Tensor, weights: dict[str, Tensor], moe: MoEConfig, ctx: TokenContext) -> LayerResult:
    """The training forward pass of a layer, for leaves ``x_BSD`` and ``weights``."""
    num_sequences, seq_len = x_BSD.shape[:2]
    x_TD = x_BSD.flatten(0, 1)
    places = [(int(sample), s) for sample in ctx.sample_B for s in range(seq_len)]
    uniform = [philox.draw(SEED, SECOND_EXPERT, LAYER, sample, s, 0) for sample, s in places]
    seen_TD = x_TD
    if moe.router.jitter > 0:
        draws = [
            [philox.draw(SEED, JITTER, LAYER, sample, s, lane) for lane in range(x_TD.shape[1])]
            for sample, s in places
        ]
        seen_TD = routing.jittered(x_TD, moe.router.jitter, draws)
    valid = [True] * len(places) if ctx.valid_BS is None else ctx.valid_BS.flatten().tolist()
    decision = oracle_decision(router_logits(seen_TD, weights["router.weight"]), valid, moe, uniform)
    by_sequence = moe.group == "sequence"
    count = moe.balance_count
    if count == "auto":
        count = "all" if moe.router.name == "topk" else "top1"
    return run_layer(
        x_TD,
        ffn_experts(weights["experts.w_in"], weights["experts.w_out"], moe.activation),
        decision,
        group_of=[t // seq_len if by_sequence else 0 for t in range(len(places))],
        groups=num_sequences if by_sequence else 1,
        slots=oracle_slots(moe, seq_len if by_sequence else len(places)),
        k=moe.top_k,
        balance_count=count,
    )


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance`` times the largest wanted value (at least 1)."""
    assert got.shape == wanted.shape
    scale = max(wanted.abs().max().item(), 1.0) if wanted.numel() else 1.0
    difference = (got.double() - wanted).abs().max().item() if wanted.numel() else 0.0
    assert difference <= tolerance * scale, f"differs by {difference:.3g}, allowed {tolerance * scale:.3g}"
