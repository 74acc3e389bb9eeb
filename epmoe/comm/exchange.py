"""Rows and counts between the ranks that share the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epmoe import env

Group = dist.ProcessGroup | None
"""The ranks that take part; None = all of the job, as in torch.distributed."""
Splits = tuple[int, ...]


def num_ranks(group: Group) -> int:
    """Ranks in the group, W."""
    return dist.get_world_size(group)


class _ExchangeRows(torch.autograd.Function):
    """All-to-all of ragged blocks of rows; its backward is itself with the splits swapped."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, send_splits: Splits, recv_splits: Splits, group: Group) -> Tensor:
        ctx.splits, ctx.group = (send_splits, recv_splits), group
        return _all_to_all(rows_ND, send_splits, recv_splits, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        send_splits, recv_splits = ctx.splits
        return _all_to_all(grads[0], recv_splits, send_splits, ctx.group), None, None, None


def _all_to_all(rows_ND: Tensor, send_splits: Splits, recv_splits: Splits, group: Group) -> Tensor:
    env.fault("dispatch.exchange")
    rows_RD = rows_ND.new_empty(sum(recv_splits), rows_ND.shape[1])
    dist.all_to_all_single(rows_RD, rows_ND.contiguous(), list(recv_splits), list(send_splits), group=group)
    return rows_RD


def exchange_rows(rows_ND: Tensor, send_splits: Splits, recv_splits: Splits, group: Group) -> Tensor:
    """Sends consecutive blocks of rows to the ranks of ``group`` and receives theirs, in rank order.

    Args:
        rows_ND: Rows, the block for rank 0 first.
        send_splits: Rows for each rank.
        recv_splits: Rows from each rank.

    Returns:
        rows_RD: what the other ranks (and this one) sent here, differentiable.
    """
    apply: Callable[..., Tensor] = _ExchangeRows.apply
    return apply(rows_ND, send_splits, recv_splits, group)


def sum_counts(count_X: Tensor, group: Group) -> Tensor:
    """Integers added up over the ranks of ``group``: an all-reduce of a few numbers, no gradient."""
    total_X = count_X.clone()
    dist.all_reduce(total_X, group=group)
    return total_X


def exchange_counts(tokens_per_expert_E: Tensor, group: Group) -> Tensor:
    """Tells every rank how many rows each rank sends to each of its experts -> int64 ``[W, L]``."""
    received_E = torch.empty_like(tokens_per_expert_E)
    dist.all_to_all_single(received_E, tokens_per_expert_E.contiguous(), group=group)
    return received_E.view(num_ranks(group), -1)
