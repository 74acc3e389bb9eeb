"""Sums over ranks of many small values in one all-reduce."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

Sums = dict[str, Tensor]


def add_sums(total: Sums, more: Mapping[str, Tensor]) -> None:
    """Adds detached values to a running total, in place, in float64 (exact for counts below 2**53)."""
    for name, value in more.items():
        wide = value.detach().double()
        total[name] = total[name] + wide if name in total else wide


def all_reduce_sums(local: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> Sums:
    """Every value summed over the ranks of a group, on the CPU.

    All ranks must pass the same names and shapes. ``group`` None = the default group.
    """
    if not local:
        return {}
    flat = torch.cat([value.double().reshape(-1) for value in local.values()])
    dist.all_reduce(flat, group=group)
    parts = flat.cpu().split([value.numel() for value in local.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(local.items(), parts, strict=True)}
