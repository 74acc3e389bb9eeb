"""Layers to test, and the oracle's answer to the same question."""

from __future__ import annotations

from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields

import torch
from torch import Tensor

from epmoe.config import MoEConfig, router_classes
from epmoe.moe.build import build_moe_layer
from epmoe.moe.layer import MoELayer, balance_count
from epmoe.moe.plan import plan_local, plan_slots
from epmoe.types import DispatchPlan, LayerSums, Limits, Routing, TokenContext
from tests.oracle import capacity as oracle_capacity
from tests.oracle import cases, deepseek, groups, mixture, noisy, philox, routing
from tests.oracle.layer import LayerResult, ffn_experts, router_logits, run_layer
from tests.oracle.routing import Decision

SEED, LAYER = 2**33 + 5, 3
SECOND_EXPERT, JITTER, NOISE, GUMBEL, _, PRIORITY = range(6)

IDS, TASKS = 11, 3
NOISY_LOSSES = {"balance": 0.01, "z": 0.001, "importance": 0.1, "load": 0.1}
ROUTERS: dict[str, dict] = {
    "gshard_all": {"router": {"name": "gshard_top2", "second_policy": "all"}},
    "gshard_random": {"router": {"name": "gshard_top2", "second_policy": "random", "tau": 0.4}},
    "gshard_threshold": {"router": {"name": "gshard_top2", "second_policy": "threshold", "tau": 0.3}},
    "gshard_none": {"router": {"name": "gshard_top2", "second_policy": "none"}},
    "gshard_sampling": {"router": {"name": "gshard_top2", "second_policy": "sampling"}},
    "gshard_relative": {"router": {"name": "gshard_top2", "second_policy": "relative", "ratio": 0.4}},
    "gshard_literal": {"router": {"name": "gshard_top2", "literal_alg1": True}},
    "switch": {"router": {"name": "switch", "jitter": 0.2}},
    "switch_retry": {"router": {"name": "switch", "jitter": 0.0, "attempts": 3}},
    "top1": {"router": "topk", "top_k": 1},
    "top1_normalized": {"router": {"name": "topk", "normalize": True}, "top_k": 1},
    "top2": {"router": "topk", "top_k": 2},
    "top2_by_gate": {"router": {"name": "topk", "priority": "batch_prioritized"}, "top_k": 2},
    "top2_shuffled": {"router": {"name": "topk", "priority": "random"}, "top_k": 2},
    "top3_raw": {"router": {"name": "topk", "normalize": False, "scale": 2.5}, "top_k": 3},
    "noisy1": {"router": {"name": "noisy_topk", "noise_floor": 0.01}, "top_k": 1, "losses": NOISY_LOSSES},
    "noisy1_normalized": {"router": {"name": "noisy_topk", "normalize": True}, "top_k": 1},
    "noisy2": {"router": "noisy_topk", "top_k": 2, "losses": NOISY_LOSSES},
    "noisy2_raw": {"router": {"name": "noisy_topk", "normalize": False}, "top_k": 2},
    "vmoe2": {
        "router": {"name": "noisy_topk", "load_estimator": "vmoe", "priority": "batch_prioritized"},
        "top_k": 2,
        "losses": NOISY_LOSSES,
    },
    "vmoe2_normalized": {
        "router": {"name": "noisy_topk", "load_estimator": "vmoe", "normalize": True},
        "top_k": 2,
    },
    "v2": {
        "router": {
            "name": "deepseek",
            "score": "softmax",
            "num_groups": 2,
            "groups_kept": 1,
            "group_score": "max",
            "bias_rate": None,
            "normalize": False,
            "scale": 16.0,
        },
        "top_k": 2,
        "losses": {"balance": 0.003, "device_balance": 0.05, "communication_balance": 0.02},
    },
    "v3": {
        "router": {"name": "deepseek", "num_groups": 4, "groups_kept": 2, "scale": 2.5},
        "top_k": 3,
        "losses": {"sequence_balance": 0.0001},
    },
    "sigmoid1": {"router": "deepseek", "top_k": 1},
    "two_levels": {"router": "hierarchical", "top_k": 2, "losses": NOISY_LOSSES},
    "two_levels_wide": {
        "router": {"name": "hierarchical", "groups_per_token": 2, "noise_floor": 0.3},
        "top_k": 4,
        "losses": NOISY_LOSSES,
    },
    "expert_choice": {"router": "expert_choice", "losses": {"balance": 0.01, "z": 0.001}},
    "base": {"router": "base", "losses": {"z": 0.001}},
    "sinkhorn1": {"router": "sinkhorn", "top_k": 1},
    "sinkhorn2": {"router": {"name": "sinkhorn", "iterations": 8}, "top_k": 2},
    "strict2": {"router": "strictly_balanced", "losses": {"batchwise_threshold": 0.1, "z": 0.001}},
    "hash": {"router": "hash"},
    "hash_table": {"router": {"name": "hash", "table": "random", "vocab_size": IDS}},
    "sentence": {"router": {"name": "sentence", "tau": 0.4}},
    "sentence_drawn": {"router": {"name": "sentence", "second_policy": "sampling"}},
    "task": {"router": {"name": "task", "num_tasks": TASKS, "tau": 0.4}},
    "dense": {"router": "dense"},
    "dense_scaled": {"router": {"name": "dense", "pooling": "max_scaled"}},
    "dense_pick": {"router": {"name": "dense", "pooling": "max_pick", "router_loss": True}},
    "dense_groups": {"router": {"name": "dense", "num_groups": 2}},
    "top2_smooth": {"router": {"name": "topk", "smoothing": {"gate": "uniform"}}, "top_k": 2},
    "choice_smooth": {"router": {"name": "expert_choice", "smoothing": {"gate": "uniform"}}},
    "top1_smooth": {
        "router": {"name": "topk", "smoothing": {"gate": "normal", "gate_sigma": 0.3}},
        "top_k": 1,
    },
}
UNNAMED = set(router_classes()) - {
    MoEConfig.model_validate(values).router.name for values in ROUTERS.values()
}
EVERY = {**ROUTERS, **{name: {"router": name} for name in sorted(UNNAMED)}}
"""Those of every family, also where it makes no list or has no oracle."""
GROUPED = ("expert_choice", "base", "sinkhorn", "strictly_balanced")
"""Names of the families that decide about the tokens of a group together."""


def config(router: str, *, slot_order: str = "choice_major", **fields) -> MoEConfig:
    """The MoE section of a named router. Retries know one slot order only; groups are as even as E allows; a family
    without capacity has none."""
    values = {**EVERY[router], **fields}
    options = values["router"]
    options = {"name": options} if isinstance(options, str) else dict(options)
    family = router_classes()[options["name"]]
    if family.no_capacity:
        values |= {"capacity_factor": None, "capacity_factor_eval": None}
    if options["name"] == "hierarchical" or router == "dense_groups":
        options["num_groups"] = 1 if values.get("num_experts", 8) % 2 else 2
    if router == "v3" and values.get("num_experts", 8) == 4:
        options["num_groups"] = 2
    fixed_order = "attempts" in options or "slot_order" in family.without
    order = "choice_major" if fixed_order else slot_order
    values["router"] = {**options, "slot_order": order}
    return MoEConfig.model_validate(values)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a router gets besides logits: random numbers, and the products of the learned extra parts."""

    uniform: list[float] | None = None
    gumbel: Tensor | None = None
    order: list[float] | None = None
    normal: Tensor | None = None
    group_normal: Tensor | None = None
    noise_logits_TE: Tensor | None = None
    group_logits_TP: Tensor | None = None
    group_noise_logits_TP: Tensor | None = None
    bias_E: Tensor | None = None
    threshold_E: Tensor | None = None
    ids: list[int] | None = None
    table: list[int] | None = None
    unit: list[int] | None = None
    """Document or task of each token."""
    task_logits: Tensor | None = None
    """``[tasks * E]``"""
    seq_len: int = 0

    def fields(self) -> dict[str, Tensor]:
        """As fields of ``RouterInputs``."""
        numbers = {
            "uniform_T": self.uniform,
            "uniform_TE": self.gumbel,
            "order_T": self.order,
            "normal_TE": self.normal,
            "group_normal_TP": self.group_normal,
        }
        found = {key: torch.as_tensor(value).double() for key, value in numbers.items() if value is not None}
        for key in ("noise_logits_TE", "group_logits_TP", "group_noise_logits_TP", "bias_E", "threshold_E"):
            if getattr(self, key) is not None:
                found[key] = getattr(self, key)
        integers = {"token_T": self.ids, "table_V": self.table}
        integers["segment_T" if self.task_logits is None else "task_T"] = self.unit
        found |= {key: torch.tensor(value).long() for key, value in integers.items() if value is not None}
        if self.task_logits is not None:
            found["task_logits_X"] = self.task_logits
        return {**found, "seq_len": self.seq_len}

    def rows(self, start: int, stop: int) -> Extras:
        """Those of some tokens."""
        values = {field.name: getattr(self, field.name) for field in dataclass_fields(self)}
        whole = {"bias_E", "threshold_E", "table", "task_logits", "seq_len"}
        return Extras(
            **{
                key: value if key in whole or value is None else value[start:stop]
                for key, value in values.items()
            }
        )


def listed(numbers: Tensor | None) -> list[list[float]] | None:
    """As nested lists."""
    return None if numbers is None else numbers.tolist()


def needs(moe: MoEConfig) -> set[str]:
    """Which random numbers a router draws in training, and what else it goes by."""
    options, found = moe.router, set()
    if options.name in ("gshard_top2", "sentence", "task"):
        found |= {"random": {"uniform"}, "sampling": {"gumbel"}}.get(options.second_policy, set())
    if options.name in ("noisy_topk", "hierarchical"):
        found.add("normal")
    if options.name == "hierarchical":
        found.add("group_normal")
    if options.priority == "random":
        found.add("order")
    if options.name == "hash":
        found |= {"ids"} if options.table == "mod" else {"ids", "table"}
    if options.name in ("sentence", "task"):
        found.add("unit")
    return found


def extras(moe: MoEConfig, tokens: int, seed: int = 0) -> Extras:
    """Reproducible extras of every kind the router needs in training."""
    generator = torch.Generator().manual_seed(31 + seed)
    experts, groups = moe.num_experts, moe.router.expert_groups

    def normals(width: int) -> Tensor:
        return torch.randn(tokens, width, generator=generator, dtype=torch.float64)

    made = {
        "uniform": cases.uniforms(tokens, seed),
        "gumbel": torch.rand(tokens, experts, generator=generator),
        "order": torch.rand(tokens, generator=generator).tolist(),
        "normal": normals(experts),
        "group_normal": normals(groups),
    }
    learned = {}
    if moe.router.name == "hierarchical" or getattr(moe.router, "load_estimator", "") == "paper":
        learned["noise_logits_TE"] = normals(experts)
    if moe.router.name == "hierarchical":
        learned |= {"group_logits_TP": normals(groups), "group_noise_logits_TP": normals(groups)}
    if moe.router.name == "dense" and groups > 1:
        learned["group_logits_TP"] = normals(groups)
    if getattr(moe.router, "bias_rate", None) is not None:
        learned["bias_E"] = 0.3 * torch.randn(experts, generator=generator, dtype=torch.float64)
    name = moe.router.name
    if name == "strictly_balanced":
        learned["threshold_E"] = torch.rand(experts, generator=generator, dtype=torch.float64) * 2 / experts
    if name == "hash":
        made |= {"ids": [7 * t % IDS for t in range(tokens)], "table": [3 * i % experts for i in range(IDS)]}
    if name == "sentence":
        made["unit"] = [t // 3 for t in range(tokens)]
    if name == "task":
        made["unit"] = [t // 4 % TASKS for t in range(tokens)]
        learned["task_logits"] = _task_logits(experts, generator)
    return Extras(**{key: made[key] for key in needs(moe)}, **learned)


def _task_logits(experts: int, generator: torch.Generator) -> Tensor:
    return torch.randn(TASKS * experts, generator=generator, dtype=torch.float64)


def make_layer(moe: MoEConfig, d_model: int = 4, d_ff: int = 3, scale: float = 1.0) -> MoELayer:
    """A float64 layer with reproducible weights; the router's are large enough to have opinions."""
    generator = torch.Generator().manual_seed(moe.num_experts)
    layer = build_moe_layer(moe, d_model=d_model, d_ff=d_ff, layer=LAYER, seed=SEED).double()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if not tensor.is_floating_point():
                continue
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale)
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
    place_BS = torch.arange(seq_len).expand(num_sequences, seq_len) + 2 * torch.arange(
        num_sequences
    ).unsqueeze(1)
    return TokenContext(
        valid_BS=None if padding == "none" else valid_BS,
        sample_B=sample_B,
        token_BS=(5 * place_BS % IDS),
        segment_BS=torch.arange(seq_len).expand(num_sequences, seq_len) // 3,
        task_B=torch.arange(num_sequences) % TASKS,
    )


NEW_NAMES = torch.tensor([5, 4, 6, 7, 2, 3, 1, 0])
"""New expert j is old expert NEW_NAMES[j]; groups of two and of four consecutive experts stay together."""


def renamed(value_X: Tensor) -> Tensor:
    """What belongs to eight experts, to groups of them, or to the experts of each task, under new names; a table's
    numbers are names."""
    if not value_X.is_floating_point():
        return NEW_NAMES.argsort()[value_X]
    size = max(len(NEW_NAMES) // value_X.shape[0], 1)
    names = NEW_NAMES[::size] // size
    return value_X.unflatten(0, (-1, len(names)))[:, names].flatten(0, 1)


def draws_by_expert(moe: MoEConfig) -> bool:
    """Whether every expert has random numbers of its own in training."""
    smoothing = moe.router.smoothing
    return bool(needs(moe) & {"normal", "gumbel"}) or (smoothing is not None and smoothing.gate != "none")


def by_name(metrics: LayerSums) -> dict[str, Tensor]:
    """What a router did, by name."""
    pairs = ((field.name, getattr(metrics, field.name)) for field in dataclass_fields(metrics))
    return {name: value for name, value in pairs if value is not None}


def local_plan(routing: Routing, *, num_experts: int, group_size: int, capacity: int) -> DispatchPlan:
    """The plan of a rank that holds all experts."""
    slots = plan_slots(routing, Limits(num_experts=num_experts, group_size=group_size, capacity=capacity))
    return plan_local(routing, slots)


def oracle_decision(
    logits_TE: Tensor,
    valid: list[bool],
    moe: MoEConfig,
    given: Extras,
    *,
    group_of: list[int] | None = None,
    slots: int | None = None,
    training: bool = True,
) -> Decision:
    """What the configured router decides in training (or, of those that look at groups, in evaluation).

    Groups matter to those, and, with slots, to a router that retries.
    """
    options = moe.router
    if options.name in GROUPED:
        return _decision_of_groups(logits_TE, valid, moe, given, group_of or [0] * len(valid), training)
    decision = _decision_by_position(logits_TE, valid, moe, given)
    turn = routing.turns(options.priority, decision, given.order)
    if options.name == "switch" and options.attempts > 1:
        group_of = group_of or [0] * len(valid)
        return routing.no_token_left_behind(
            decision, options.attempts, moe.num_experts, group_of, slots, turn
        )
    if turn is not None:
        decision.assignments = routing.in_slot_order(decision.assignments, options.slot_order, turn)
    return decision


def _decision_of_groups(
    logits_TE: Tensor, valid: list[bool], moe: MoEConfig, given: Extras, group_of: list[int], training: bool
) -> Decision:
    options, k, order = moe.router, moe.top_k, moe.router.slot_order
    shared = {"group_of": group_of, "training": training, "slot_order": order}
    if options.name == "expert_choice":
        return groups.expert_choice(logits_TE, valid, k=k, group_of=group_of)
    if options.name == "strictly_balanced":
        return groups.strictly_balanced(logits_TE, valid, k=k, thresholds=given.threshold_E, **shared)
    if options.name == "base":
        return groups.base(logits_TE, valid, **shared)
    return groups.sinkhorn(
        logits_TE, valid, k=k, tolerance=options.tolerance, iterations=options.iterations, **shared
    )


def _of_units(logits_TE: Tensor, valid: list[bool], moe: MoEConfig, given: Extras) -> tuple[Tensor, Extras]:
    """Logits and random numbers of each token's unit: its document, or its sequence for a task."""
    if moe.router.name == "sentence":
        logits_TE, first = groups.unit_mean(logits_TE, valid, given.unit), groups.firsts(given.unit, valid)
    else:
        table = given.task_logits.view(TASKS, -1)
        if given.unit:
            logits_TE = logits_TE + torch.stack([table[task] for task in given.unit])
        first = [t // (given.seq_len or len(valid)) * (given.seq_len or 0) for t in range(len(valid))]
    return logits_TE, replace(
        given,
        uniform=None if given.uniform is None else [given.uniform[t] for t in first],
        gumbel=None if given.gumbel is None else given.gumbel[first],
    )


def _decision_by_position(logits_TE: Tensor, valid: list[bool], moe: MoEConfig, given: Extras) -> Decision:
    options, k, order = moe.router, moe.top_k, moe.router.slot_order
    if options.name == "hash":
        return groups.hashed(logits_TE, valid, ids=given.ids, table=given.table, slot_order=order)
    if options.name in ("sentence", "task"):
        logits_TE, given = _of_units(logits_TE, valid, moe, given)
    if options.name in ("gshard_top2", "sentence", "task"):
        return routing.gshard_top2(
            logits_TE,
            valid,
            policy=options.second_policy,
            tau=options.tau,
            uniform=given.uniform,
            gumbel_uniform=listed(given.gumbel),
            ratio=options.ratio,
            literal=options.literal_alg1,
            slot_order=order,
        )
    if options.name == "switch":
        return routing.topk(logits_TE, valid, k=options.attempts, normalize=False, slot_order=order)
    if options.name == "noisy_topk":
        paper = options.load_estimator == "paper"
        return noisy.noisy_topk(
            logits_TE,
            valid,
            k=k,
            variant=options.load_estimator,
            normalize=paper and k > 1 if options.normalize is None else options.normalize,
            noise_logits_TE=given.noise_logits_TE,
            normal=listed(given.normal),
            floor=options.noise_floor,
            slot_order=order,
        )
    if options.name == "hierarchical":
        scales = [
            [[noisy.noise_scale(z, options.noise_floor) for z in row.unbind()] for row in logits.unbind()]
            for logits in (given.noise_logits_TE, given.group_noise_logits_TP)
        ]
        return noisy.hierarchical(
            logits_TE,
            given.group_logits_TP,
            valid,
            groups_kept=options.groups_per_token,
            inside=k // options.groups_per_token,
            scale_TE=scales[0],
            scale_TP=scales[1],
            normal=listed(given.normal),
            group_normal=listed(given.group_normal),
            slot_order=order,
        )
    if options.name == "dense":
        return mixture.dense(
            logits_TE, valid, pooling=options.pooling, group_logits_TP=given.group_logits_TP, slot_order=order
        )
    normalize = k > 1 if options.normalize is None else options.normalize
    if options.name == "deepseek":
        return deepseek.deepseek(
            logits_TE,
            valid,
            k=k,
            score=options.score,
            bias=[0.0] * moe.num_experts if given.bias_E is None else given.bias_E.tolist(),
            groups=options.num_groups,
            kept=options.group_limit,
            group_score=options.group_score,
            normalize=normalize,
            scale=options.scale,
            slot_order=order,
        )
    return routing.topk(logits_TE, valid, k=k, normalize=normalize, scale=options.scale, slot_order=order)


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
    seen_TD = x_TD
    if moe.router.jitter > 0:
        seen_TD = routing.jittered(x_TD, moe.router.jitter, _draws(JITTER, places, x_TD.shape[1]))
    valid = [True] * len(places) if ctx.valid_BS is None else ctx.valid_BS.flatten().tolist()
    by_sequence = moe.group == "sequence"
    group_of = [t // seq_len if by_sequence else 0 for t in range(len(places))]
    slots = oracle_slots(moe, seq_len if by_sequence else len(places))
    logits_TE = _oracle_logits(seen_TD, weights.get("router.weight"), moe)
    decision = oracle_decision(
        logits_TE if moe.router.smoothing is None else logits_TE + _gate_noise(moe, places),
        valid,
        moe,
        _layer_extras(moe, seen_TD, weights, places, ctx),
        group_of=group_of,
        slots=slots,
    )
    return run_layer(
        x_TD,
        ffn_experts(weights["experts.w_in"], weights["experts.w_out"], moe.activation),
        decision,
        group_of=group_of,
        groups=num_sequences if by_sequence else 1,
        slots=slots,
        k=moe.top_k,
        balance_count=balance_count(moe),
        sequence_of=[t // seq_len for t in range(len(places))],
        devices=moe.router.expert_groups,
        limit=min(moe.router.group_limit, moe.top_k),
    )


def _oracle_logits(seen_TD: Tensor, weight_ED: Tensor | None, moe: MoEConfig) -> Tensor:
    """Zeros where the router has no weight."""
    if weight_ED is None:
        return torch.zeros(seen_TD.shape[0], moe.num_experts, dtype=torch.float64)
    return router_logits(seen_TD, weight_ED)


def _draws(stream: int, places: list[tuple[int, int]], lanes: int) -> list[list[float]]:
    return [
        [philox.draw(SEED, stream, LAYER, sample, s, lane) for lane in range(lanes)] for sample, s in places
    ]


def _gate_noise(moe: MoEConfig, places: list[tuple[int, int]]) -> Tensor:
    smoothing, experts = moe.router.smoothing, moe.num_experts
    uniform = _draws(NOISE, places, experts + experts % 2)
    if smoothing.gate == "normal":
        pairs = [[noisy.box_muller(pair) for pair in zip(u[::2], u[1::2], strict=True)] for u in uniform]
        uniform = [[smoothing.gate_sigma * z for pair in row for z in pair] for row in pairs]
    return torch.tensor(uniform, dtype=torch.float64).view(len(places), -1)[:, :experts]


def _layer_extras(
    moe: MoEConfig,
    seen_TD: Tensor,
    weights: dict[str, Tensor],
    places: list[tuple[int, int]],
    ctx: TokenContext,
) -> Extras:
    """The numbers a layer draws, and its learned extra parts applied to its tokens."""
    wanted, experts, groups = needs(moe), moe.num_experts, moe.router.expert_groups
    found = {}
    if "uniform" in wanted:
        found["uniform"] = [row[0] for row in _draws(SECOND_EXPERT, places, 1)]
    if "gumbel" in wanted:
        found["gumbel"] = torch.tensor(_draws(GUMBEL, places, experts)).double()
    if "order" in wanted:
        found["order"] = [row[0] for row in _draws(PRIORITY, places, 1)]
    if "normal" in wanted:
        lanes = experts + (groups if "group_normal" in wanted else 0)
        uniform = _draws(NOISE, places, lanes + lanes % 2)
        rows = [
            [z for pair in zip(u[::2], u[1::2], strict=True) for z in noisy.box_muller(pair)] for u in uniform
        ]
        normal_TE = torch.tensor(rows, dtype=torch.float64).view(len(places), -1)
        found["normal"] = normal_TE[:, :experts]
        if "group_normal" in wanted:
            found["group_normal"] = normal_TE[:, experts:lanes]
    parts = {
        "noise_logits_TE": "noise_weight",
        "group_logits_TP": "group_weight",
        "group_noise_logits_TP": "group_noise_weight",
    }
    learned = {
        field: router_logits(seen_TD, weights[f"router.{name}"])
        for field, name in parts.items()
        if f"router.{name}" in weights
    }
    bias_E = weights["router.bias"].detach() if "router.bias" in weights else None
    if "router.threshold" in weights:
        learned["threshold_E"] = weights["router.threshold"]
    if "ids" in wanted:
        found["ids"] = ctx.token_BS.flatten().tolist()
    if "table" in wanted:
        found["table"] = weights["router.table"].tolist()
    if moe.router.name == "sentence":
        pairs = [(t, int(unit)) for t, row in enumerate(ctx.segment_BS) for unit in row]
        found["unit"] = [sorted(set(pairs)).index(pair) for pair in pairs]
    if moe.router.name == "task":
        length = len(places) // max(len(ctx.task_B), 1)
        found |= {"unit": [int(task) for task in ctx.task_B for _ in range(length)], "seq_len": length}
        learned["task_logits"] = weights["router.task_logits"]
    return Extras(**found, **learned, bias_E=bias_E)


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance`` times the largest wanted value (at least 1)."""
    assert got.shape == wanted.shape
    scale = max(wanted.abs().max().item(), 1.0) if wanted.numel() else 1.0
    difference = (got.double() - wanted).abs().max().item() if wanted.numel() else 0.0
    assert difference <= tolerance * scale, f"differs by {difference:.3g}, allowed {tolerance * scale:.3g}"
