"""One gradient norm for the whole model, the same bits on every rank, and clipping by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = {"cpu": 2**16, "cuda": 2**24}
"""Elements squared at a time: what fits a core's cache, and what keeps a GPU busy."""


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of x*x over all elements -> float64 scalar.

    In float64, because float32 sums of millions of squares are visibly wrong: torch's float32 norm of 25 million
    normal draws is off by 0.14% on a CPU.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        for chunk in tensor.detach().reshape(-1).split(CHUNK.get(device.type, 2**20)):
            wide = chunk.double()
            total += torch.dot(wide, wide)
    return total


def global_norm(
    dense: Sequence[Tensor],
    experts: Sequence[Tensor],
    ep_group: dist.ProcessGroup,
    device: torch.device,
) -> Tensor:
    """L2 norm of the whole model's gradient -> float64 scalar, bit-equal on all ranks, no host sync. A collective.

    Call it after the gradients are reduced. A rank without expert gradients passes an empty ``experts``.

    Args:
        dense: Gradients every rank holds: counted once.
        experts: Gradients of this rank's experts: squares are summed over the ep group, so each expert counts once.
        ep_group: The ranks that together hold all experts.
        device: Where the result lives.
    """
    squares = sum_of_squares(dense, device)
    local = sum_of_squares(experts, device)
    ep_size = dist.get_world_size(ep_group)
    if ep_size == 1:
        return (squares + local).sqrt()
    # Gathered and added here, in rank order: an all-reduce may add in another order on each rank.
    parts = [torch.empty_like(local) for _ in range(ep_size)]
    dist.all_gather(parts, local, group=ep_group)
    return in_order([squares, *parts]).sqrt()


def sharded_norm(
    dense: Sequence[Tensor], experts: Sequence[Tensor], world_group: dist.ProcessGroup, *, replicas: int
) -> Tensor:
    """``global_norm`` of gradients in shards. A collective over the world.

    Args:
        dense: This rank's shards.
        experts: This rank's shards, which no other rank has.
        world_group: All ranks.
        replicas: How many sets of consecutive ranks hold all dense shards, each the same ones.
    """
    device = (*dense, *experts)[0].device
    local_2 = torch.stack((sum_of_squares(dense, device), sum_of_squares(experts, device)))
    parts = [torch.empty_like(local_2) for _ in range(dist.get_world_size(world_group))]
    dist.all_gather(parts, local_2, group=world_group)
    size = len(parts) // replicas
    sums = [
        in_order([part[0] for part in parts[start : start + size]]) for start in range(0, len(parts), size)
    ]
    # The replicas agree. Were one of them damaged, the largest (and NaN counts as that) would tell every rank.
    return (torch.stack(sums).amax() + in_order([part[1] for part in parts])).sqrt()


def in_order(parts: Sequence[Tensor]) -> Tensor:
    """Sum from the first to the last, the same bits wherever it is computed."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def clip_coefficient(norm: Tensor, max_norm: float | None) -> Tensor:
    """Factor in (0, 1] that brings the norm down to ``max_norm``; 1 when it is below, or without a limit.

    Not finite when the norm is NaN: the caller skips such steps.
    """
    if max_norm is None:
        return torch.ones_like(norm)
    return (max_norm / norm).clamp(max=1.0)


def scale(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies every tensor by the coefficient, in place."""
    for tensor in tensors:
        tensor.mul_(coefficient)
