"""Sums over ranks of many small values in one all-reduce: of tensors in dicts, tuples and dataclasses."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor

Tree = TypeVar("Tree")


def add_sums(total: Tree | None, more: Tree) -> Tree:
    """Detached values added to a running total, in float64 (exact for counts below 2**53); None = the first."""
    wide: Tree = pytree.tree_map_only(Tensor, lambda value: value.detach().double(), more)
    if total is None:
        return wide
    added: Tree = pytree.tree_map(lambda old, new: None if new is None else old + new, total, wide)
    return added


def all_reduce_sums(local: Tree, group: dist.ProcessGroup | None) -> Tree:
    """Every value summed over the ranks of a group, float64 on the CPU.

    All ranks must pass the same trees. ``group`` None = the default group.
    """
    values, tree = pytree.tree_flatten(local)
    flat = torch.cat([value.double().reshape(-1) for value in values if value is not None])
    dist.all_reduce(flat, group=group)
    parts = iter(flat.cpu().split([value.numel() for value in values if value is not None]))
    summed = [None if value is None else next(parts).view(value.shape) for value in values]
    result: Tree = pytree.tree_unflatten(summed, tree)
    return result
