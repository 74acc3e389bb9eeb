"""A model small enough to write down, with everything that matters to groups and checkpoints: stacked experts,
experts that are modules, tied embeddings, norms, a scalar, a buffer. Of MoE layers only the experts are needed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmoe.checkpoint.manifest import MANIFEST, TrainingRecord
from epmoe.config import OptimizerConfig
from epmoe.engines.native import NativeEngine
from epmoe.moe.layer import MoELayer
from epmoe.parallel.mesh import ExpertMesh

NUM_EXPERTS = 4


def draw(name: str, *shape: int) -> Tensor:
    """Values that depend on the name alone, so that every rank and every layout draws the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


class BareLayer(MoELayer):
    """A layer of which only the experts are there."""

    def __init__(self, experts: nn.Module) -> None:
        nn.Module.__init__(self)
        self.experts, self.before_training = experts, None


class StackedExperts(nn.Module):
    """Experts ``first`` to ``first + count - 1`` of ``NUM_EXPERTS``, as one tensor."""

    def __init__(self, first: int, count: int, num_experts: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.first_expert, self.num_experts = first, num_experts
        self.w_in = nn.Parameter(draw("w_in", num_experts, 3, 5)[first : first + count].clone())
        self.bias = nn.Parameter(draw("bias", num_experts, 5)[first : first + count].clone())


class ListedExperts(nn.Module):
    """The same as modules, whose names carry the global id."""

    def __init__(self, first: int, count: int, num_experts: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.first_expert, self.num_experts = first, num_experts
        self.experts = nn.ModuleDict()
        for expert in range(first, first + count):
            linear = nn.Linear(3, 2)
            linear.weight = nn.Parameter(draw(f"listed{expert}", 2, 3))
            linear.bias = nn.Parameter(draw(f"listed_bias{expert}", 2))
            self.experts[str(expert)] = linear


class Tiny(BareLayer):
    """Dense and expert parameters; nothing is ever computed with it."""

    steps_seen: Tensor

    def __init__(self, first: int, count: int, *, listed: bool = False, width: int = 3) -> None:
        super().__init__(StackedExperts(first, count))
        self.embed = nn.Embedding(7, width)
        self.embed.weight = nn.Parameter(draw("embed", 7, width))
        if listed:
            self.other = BareLayer(ListedExperts(first, count))
        self.norm = nn.Parameter(draw("norm", width))
        self.temperature = nn.Parameter(draw("temperature"))
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps_seen", torch.tensor([3, 1], dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def tiny_model(mesh: ExpertMesh, *, listed: bool = False) -> Tiny:
    """This rank's part."""
    count = NUM_EXPERTS // mesh.ep_size
    return Tiny(mesh.ep_rank * count, count, listed=listed)


def trained(model: nn.Module, mesh: ExpertMesh, steps: int) -> NativeEngine:
    """AdamW as if after some steps: weights and moments that depend on ``steps`` and their name alone. (Real steps
    would not do: torch's fused AdamW rounds by where an element lies in its tensor, hence by layout.)"""
    engine = NativeEngine(OptimizerConfig(), model, mesh)
    for name, tensor in {**engine.weights(), **engine.state()}.items() if steps else ():
        if name.endswith(".step"):
            tensor.fill_(steps)
        elif tensor.is_floating_point():
            tensor.detach().copy_(_own_rows(f"{steps} {name}", name, model, tensor))
    engine.publish()
    return engine


def _own_rows(key: str, name: str, model: nn.Module, tensor: Tensor) -> Tensor:
    """The rows of a whole tensor's draw that belong to this rank's experts."""
    if not name.startswith("experts."):
        return draw(key, *tensor.shape)
    owner = model.get_submodule("experts")
    whole = draw(key, NUM_EXPERTS, *tensor.shape[1:])
    return whole[owner.first_expert : owner.first_expert + tensor.shape[0]]


def record(step: int) -> TrainingRecord:
    """A record with something in every field."""
    return TrainingRecord(
        step=step,
        tokens=step * 100,
        samples=step * 8,
        config={"seed": 1},
        data_fingerprint="data",
        tokenizer_hash="tokenizer",
        trainer={"skipped": 2},
    )


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of a checkpoint as somebody who knows how its checksum is made."""
    value = json.loads((folder / MANIFEST).read_bytes())
    del value["crc32"]
    change(value)
    rest = json.dumps(value, indent=1).removeprefix("{\n").encode()
    (folder / MANIFEST).write_bytes(f'{{"crc32": "{zlib.crc32(rest):08x}",\n'.encode() + rest)
