"""One cell, trained for two steps by the real trainer: what it computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from epmoe.config import Config, MoEConfig, loss_coefficients
from epmoe.engines.protocol import Engine, ParameterRows, expert_part
from epmoe.moe.router import Router
from epmoe.parallel.mesh import ExpertMesh, is_expert
from epmoe.parallel.norm import clip_coefficient
from epmoe.parallel.reduce_sums import all_reduce_sums
from epmoe.process.runtime import Runtime
from epmoe.process.stop_signals import StopFlag
from epmoe.train.build import build_model
from epmoe.train.trainer import Trainer
from epmoe.types import Routing
from epmoe.verify.cases import Cell, cell_config
from epmoe.verify.count_collectives import counting
from epmoe.verify.small_config import Subject
from epmoe.verify.synthetic_data import Samples

NUM_STEPS = 2
KNOWN_NORM = math.sqrt(120.0)
"""Of four experts with one gradient each, 2, 4, 6 and 8: 10.954451."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one rank saw of a cell; lists have an entry for every step."""

    losses: list[float]
    """Nats per token, over all ranks."""
    auxiliary: dict[str, list[float]]
    """Auxiliary losses per routed token, over all ranks, without coefficients."""
    demand: list[list[list[float]]]
    """Assignments that each layer's experts were asked for, over all ranks: ``[layer][step][expert]``;"""
    kept: list[list[list[float]]]
    """and those that they got."""
    objectives: list[float]
    """What was differentiated, summed over all ranks and micro-batches,"""
    meant: list[float]
    """and what it should be: mean loss plus coefficients times mean auxiliary losses."""
    norms: list[float]
    clips: list[float]
    gradients: dict[str, ParameterRows]
    """Of the first step, reduced and not clipped."""
    weights: dict[str, ParameterRows]
    """After the first step."""
    micro_collectives: list[dict[str, int]]
    """Of each micro-batch of the last step."""
    end_collectives: dict[str, int]
    """From the last backward pass to the weights of the next step."""
    known_norm: float | None
    """The engine's answer where ``KNOWN_NORM`` is right; None where gradients cannot be set."""
    clipped_norm: float | None
    """And after clipping that to 1."""
    margin: float
    """Smallest gap between a token's best router logits, where it was asked for."""


class ObservedEngine:
    """An engine, and what went through it."""

    def __init__(self, engine: Engine, counter: Counter[str]) -> None:
        self._engine, self._counter = engine, counter
        self.first_gradients: dict[str, ParameterRows] = {}
        self.micro: list[dict[str, int]] = []
        self.objectives: list[float] = []
        """This rank's part, by step."""

    def zero(self) -> None:
        """Counting starts here."""
        self._engine.zero()
        self.micro = []
        self.objectives.append(0.0)
        self._counter.clear()

    def backward(self, objective: Tensor) -> None:
        """Notes the collectives of a micro-batch."""
        self.objectives[-1] += float(objective.detach())
        self._engine.backward(objective)
        self.micro.append(dict(self._counter))
        self._counter.clear()

    def reduce(self) -> None:
        """Keeps a copy of the first step's gradients before they are clipped. Asking for them may communicate."""
        self._engine.reduce()
        if not self.first_gradients:
            parts = self._engine.gradients()
            self.first_gradients = {name: copy_of(part) for name, part in parts.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def copy_of(part: ParameterRows) -> ParameterRows:
    """The same rows, in memory of their own."""
    return ParameterRows(local=part.local.detach().clone(), first_row=part.first_row, shape=part.shape)


def make_trainer(
    config: Config, subject: Subject, samples: Samples, place: Runtime, mesh: ExpertMesh
) -> Trainer:
    """The real trainer over made-up data."""
    model = build_model(config, subject.vocab_size, device=place.device, mesh=mesh)
    return Trainer(config, place, mesh, model=model, data=cast(Any, samples), stop=StopFlag())


def samples_for(subject: Subject, cell: Cell, seed: int) -> Samples:
    """The data of a cell."""
    kinds: Mapping[str, Any] = {"half_empty": "half_empty", "one_token": "one_token"}
    return Samples(
        vocab_size=subject.vocab_size,
        seq_len=subject.config.data.seq_len,
        batch_size=subject.config.train.global_batch_size,
        kind=kinds.get(cell.scenario, "uneven"),
        seed=seed,
        num_tasks=subject.num_tasks,
        documents=not subject.config.data.cross_document,
    )


def measure(
    cell: Cell, subject: Subject, place: Runtime, mesh: ExpertMesh, *, seed: int, margins: bool = False
) -> Measurement:
    """Trains a cell and looks at everything. A collective.

    Args:
        seed: Of the data.
        margins: Also look how clearly the routers decided.
    """
    config = cell_config(subject, cell)
    trainer = make_trainer(config, subject, samples_for(subject, cell, seed), place, mesh)
    weights: dict[str, ParameterRows] = {}
    results = []
    with counting() as counter, _margins(trainer.model if margins else None) as gaps:
        engine = ObservedEngine(trainer.engine, counter)
        trainer.engine = cast(Engine, engine)
        for step in range(NUM_STEPS):
            results.append(trainer.step())
            if step == 0:
                parts = named_parts(trainer, trainer.engine.weights())
                weights = {name: copy_of(part) for name, part in parts.items()}
        end = dict(counter)
    # DeepSpeed hands out copies of its gradients (ZeRO 1, 2), and only before an update: not to be written into.
    known, clipped = (None, None) if cell.engine == "deepspeed" else probe_norm(trainer.engine)
    sums = [result.sums for result in results]
    tokens = [max(result.num_tokens, 1) for result in results]
    routed = [max(int(step.layers[0].valid_tokens) if step.layers else 0, 1) for step in sums]
    own = {"objectives": torch.tensor(engine.objectives, dtype=torch.float64)}
    losses = [float(s.loss) / n for s, n in zip(sums, tokens, strict=True)]
    auxiliary = {
        name: [float(s.aux[name]) / n for s, n in zip(sums, routed, strict=True)] for name in sums[0].aux
    }
    by_layer = [*zip(*(step.layers for step in sums), strict=True)]
    return Measurement(
        losses=losses,
        auxiliary=auxiliary,
        demand=[[did.demand_E.tolist() for did in steps] for steps in by_layer],
        kept=[[did.kept_E.tolist() for did in steps] for steps in by_layer],
        objectives=all_reduce_sums(own, mesh.world_group)["objectives"].tolist(),
        meant=_objectives(losses, auxiliary, config.moe),
        norms=[result.grad_norm for result in results],
        clips=[result.clip for result in results],
        gradients=in_order(trainer.model, engine.first_gradients),
        weights=weights,
        micro_collectives=engine.micro,
        end_collectives=end,
        known_norm=known,
        clipped_norm=clipped,
        margin=gaps.smallest,
    )


def _objectives(
    losses: list[float], auxiliary: Mapping[str, list[float]], moe: MoEConfig | None
) -> list[float]:
    meant = []
    for step, loss in enumerate(losses):
        coefficients = loss_coefficients(moe, step)
        meant.append(loss + sum(coefficients[name] * values[step] for name, values in auxiliary.items()))
    return meant


def in_order(model: nn.Module, parts: Mapping[str, ParameterRows]) -> dict[str, ParameterRows]:
    """By the order of the model's parameters, so that the first wrong one is the first to look at."""
    return {name: parts[name] for name, _ in model.named_parameters() if name in parts}


def named_parts(trainer: Trainer, tensors: Mapping[str, Tensor]) -> dict[str, ParameterRows]:
    """Weights, or optimizer state (``<parameter>.<key>``), as the rows this rank holds of each."""
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    shards = trainer.engine.gradients() if sharded else {}
    parts = {}
    for name, tensor in tensors.items():
        local = tensor.detach()
        if isinstance(local, DTensor):
            shard = shards.get(name) or shards[name.rpartition(".")[0]]
            parts[name] = ParameterRows(local=local.to_local(), first_row=shard.first_row, shape=shard.shape)
        else:
            parts[name] = expert_part(name, local, trainer.mesh)
    return parts


def probe_norm(engine: Engine) -> tuple[float, float]:
    """The engine's norm of gradients whose norm is ``KNOWN_NORM``, as it is and clipped to 1. A collective."""
    parts = engine.gradients()
    names = [name for name, part in parts.items() if is_expert(name) and part.shape[0] >= 4]
    names += [name for name, part in parts.items() if len(part.shape) > 1 and part.shape[0] >= 4]
    for name, part in parts.items():
        part.local.zero_()
        for row in range(4) if name == names[0] else ():
            if part.first_row <= row < part.first_row + part.local.shape[0]:
                part.local[row - part.first_row].view(-1)[0] = 2.0 * (row + 1)
    norm = engine.norm()
    engine.clip(clip_coefficient(norm, 1.0))
    return float(norm), float(engine.norm())


# ------------------------------------------------------------------------------------------- margins
@dataclass(slots=True)
class _Gaps:
    smallest: float = math.inf


@contextmanager
def _margins(model: nn.Module | None) -> Iterator[_Gaps]:
    """Watches the routers' logits: the smallest gap between neighbours among a token's best k + 1."""
    gaps = _Gaps()

    def look(router: nn.Module, _: object, routing: Routing) -> None:
        assert isinstance(router, Router)
        best_TK = routing.logits_TE[routing.valid_T].detach().sort(dim=-1, descending=True).values
        gap_TK = (best_TK[:, :-1] - best_TK[:, 1:])[:, : router.top_k]
        gap_TK = gap_TK[gap_TK.isfinite()]
        if gap_TK.numel():
            gaps.smallest = min(gaps.smallest, float(gap_TK.min()))

    modules = model.modules() if model is not None else ()
    routers = [m for m in modules if isinstance(m, Router) and m.weight is not None]
    hooks = [router.register_forward_hook(look) for router in routers if not router.options.every_expert]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()
