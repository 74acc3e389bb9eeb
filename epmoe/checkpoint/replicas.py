"""Whether what several ranks hold is the same on all of them: a checkpoint takes one replica of each tensor, any."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from epmoe.parallel.mesh import ExpertMesh
from epmoe.process.runtime import gather_text

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element: what its bits are added up as."""


def differing_replicas(entries: Mapping[str, Tensor], mesh: ExpertMesh) -> list[str]:
    """The tensors whose replicas have other bits, one line each. A collective.

    Args:
        entries: Of a checkpoint: a DTensor where this rank holds a part.
    """
    if mesh.world_size == 1:
        return []
    sums = {_place(key, tensor): _sum_of_bits(tensor) for key, tensor in entries.items()}
    ranks_by_sum: dict[str, dict[int, list[int]]] = {}
    for rank, text in enumerate(gather_text(json.dumps(sums))):
        for place, value in json.loads(text).items():
            ranks_by_sum.setdefault(place, {}).setdefault(value, []).append(rank)
    return [
        f"{place} is one on rank(s) {' and another on '.join(map(str, ranks.values()))}"
        for place, ranks in sorted(ranks_by_sum.items())
        if len(ranks) > 1
    ]


def _place(key: str, tensor: Tensor) -> str:
    """The same text on the ranks that hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return key
    coordinates: Sequence[int] = tensor.device_mesh.get_coordinate() or []
    part = [
        at
        for at, placement in zip(coordinates, tensor.placements, strict=True)
        if not placement.is_replicate()
    ]
    return f"{key} (part {', '.join(map(str, part))})" if part else key


def _sum_of_bits(tensor: Tensor) -> int:
    """Of this rank's part; as fast as its memory can be read."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    bits = local.detach().contiguous().reshape(-1).view(INTEGERS[local.element_size()])
    return int(bits.sum(dtype=torch.int64))
