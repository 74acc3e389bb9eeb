"""The tensors of a checkpoint: their keys, who holds which experts, and how a model and a checkpoint differ.

model.blocks.1.moe.experts.w_in             [E, D, F], of which this rank holds [L, D, F]: a DTensor over (edp, ep)
optim.blocks.1.moe.experts.w_in.exp_avg     the same
model.head.experts.experts.5.weight         an expert that is a module: its global id is in the name
optim.embed.weight.step                     everything else: the same tensor on every rank
model.embed.weight                          or, of an engine with shards, some rows of it: a DTensor
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from epmoe.checkpoint.manifest import TensorRecord
from epmoe.checkpoint.safetensors_writer import DTYPES
from epmoe.engines.optimizer import named_weights
from epmoe.engines.protocol import Engine
from epmoe.parallel.mesh import ExpertMesh, is_stacked, split_expert_id

MAX_LISTED = 10
"""Differences shown in an error."""


class Held(NamedTuple):
    """What one rank holds under one key. Travels between ranks as a JSON list."""

    dtype: str
    shape: list[int]
    """Of the whole tensor, also where this rank holds a shard, or of one expert."""
    experts: list[int] | None
    """Global ids, ascending; None = the same on every rank, or in shards that an engine cut."""
    num_experts: int
    """Experts there should be over the ep group; 0 where ``experts`` is None."""


WEIGHTS = "model."
"""How the checkpoint keys of a model's own tensors begin."""


def local_tensors(model: nn.Module, engine: Engine | None) -> dict[str, Tensor]:
    """This rank's tensors by checkpoint key; without an engine only the model's."""
    weights = named_weights(model) if engine is None else engine.weights()
    tensors = {f"{WEIGHTS}{name}": tensor.detach() for name, tensor in weights.items()}
    if engine is not None:
        tensors |= {f"optim.{name}": tensor.detach() for name, tensor in engine.state().items()}
    return tensors


def as_entries(tensors: Mapping[str, Tensor], mesh: ExpertMesh | None) -> dict[str, Tensor]:
    """The tensors as DCP sees them: stacked experts as shards of one tensor, dim 0 = global expert id. No copies.

    What an engine cut into shards itself is a DTensor of the whole tensor already.
    """
    if mesh is None:
        return dict(tensors)
    placements = [Replicate(), Shard(0)]
    return {
        key: DTensor.from_local(tensor, mesh.device_mesh, placements, run_check=False)
        if is_stacked(key, tensor) and not isinstance(tensor, DTensor)
        else tensor
        for key, tensor in tensors.items()
    }


def held_by_this_rank(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Held]:
    """What this rank would write. Experts that are modules are listed together, ``*`` in place of their ids."""
    owners = {
        f"{name}.": (module.first_expert, module.num_experts)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "first_expert", None), int)
    }
    held: dict[str, Held] = {}
    for key, tensor in tensors.items():
        template, expert = split_expert_id(key)
        dtype, shape = DTYPES[tensor.dtype], list(tensor.shape)
        if isinstance(tensor, DTensor) or (expert is None and not is_stacked(key, tensor)):
            held[key] = Held(dtype, shape, None, 0)
            continue
        first, num_experts = next(numbers for prefix, numbers in owners.items() if prefix in key)
        if expert is None:
            held[key] = Held(dtype, shape[1:], list(range(first, first + shape[0])), num_experts)
        else:
            others = held[template].experts or [] if template in held else []
            held[template] = Held(dtype, shape, sorted([*others, expert]), num_experts)
    return held


def layout_problems(ranks: Sequence[Mapping[str, Held]], ep_size: int) -> list[str]:
    """What keeps the ranks from holding every tensor, and every expert of each ep group, exactly once."""
    problems = []
    for key in sorted(set().union(*ranks)):
        lacking = [rank for rank, held in enumerate(ranks) if key not in held]
        if lacking:
            problems.append(f"{key} is missing on rank(s) {lacking}")
            continue
        kinds = {(held[key].dtype, tuple(held[key].shape), held[key].num_experts) for held in ranks}
        if len(kinds) > 1:
            problems.append(f"{key} differs between ranks: {sorted(kinds)}")
            continue
        for start in range(0, len(ranks), ep_size) if ranks[0][key].experts is not None else ():
            members = ranks[start : start + ep_size]
            problem = _expert_problem(
                [held[key].experts or [] for held in members], ranks[0][key].num_experts
            )
            if problem:
                problems.append(f"{key}, ranks {start} to {start + ep_size - 1}: {problem}")
    return problems


def _expert_problem(ids_by_rank: Sequence[Sequence[int]], num_experts: int) -> str | None:
    """Why the ids are not 0 to E-1 in rank order, the same number on every rank."""
    ids = [expert for rank_ids in ids_by_rank for expert in rank_ids]
    twice = sorted({expert for expert in ids if ids.count(expert) > 1})
    missing = sorted(set(range(num_experts)) - set(ids))
    if twice or missing:
        return f"experts {twice} are held twice, experts {missing} by no rank"
    if ids != list(range(num_experts)) or len({len(rank_ids) for rank_ids in ids_by_rank}) > 1:
        return f"experts are not in rank order, the same number on each: {[list(i) for i in ids_by_rank]}"
    return None


def whole_tensors(held: Mapping[str, Held]) -> dict[str, TensorRecord]:
    """Every tensor of the checkpoint over all ranks, from what one rank holds."""
    tensors: dict[str, TensorRecord] = {}
    for key, entry in held.items():
        if "*" in key:
            for expert in range(entry.num_experts):
                tensors[key.replace("*", str(expert))] = TensorRecord(
                    dtype=entry.dtype, shape=tuple(entry.shape)
                )
            continue
        shape = entry.shape if entry.experts is None else [entry.num_experts, *entry.shape]
        tensors[key] = TensorRecord(dtype=entry.dtype, shape=tuple(shape))
    return tensors


def differences(
    stored: Mapping[str, TensorRecord], wanted: Mapping[str, TensorRecord], *, same_dtype: bool
) -> list[str]:
    """How the tensors of a checkpoint differ from the ones a model wants, one line each."""
    lines: list[str] = []
    for key, want in wanted.items():
        have = stored.get(key)
        if have is None:
            lines.append(
                f"{key} is not in the checkpoint{_nearest(key, stored.keys() - wanted.keys(), lines)}"
            )
        elif have.shape != want.shape:
            lines.append(f"{key} is {list(have.shape)} in the checkpoint, {list(want.shape)} in the model")
        elif have.dtype != want.dtype and (same_dtype or not (_is_float(have) and _is_float(want))):
            lines.append(f"{key} is {have.dtype} in the checkpoint, {want.dtype} in the model")
    for key in stored.keys() - wanted.keys():
        lines.append(f"{key} is in the checkpoint only{_nearest(key, wanted.keys() - stored.keys(), lines)}")
    return lines


def _nearest(key: str, others: Iterable[str], lines: Sequence[str]) -> str:
    """The most similar name, for the lines that will be shown."""
    if len(lines) >= MAX_LISTED:
        return ""
    close = difflib.get_close_matches(key, list(others), n=1)
    return f" (nearest: {close[0]})" if close else ""


def _is_float(record: TensorRecord) -> bool:
    return "F" in record.dtype
