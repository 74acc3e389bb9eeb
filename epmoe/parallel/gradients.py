"""Where gradients live, and how they become the same on every rank that holds a parameter.

The loss is already divided by the global token count, so every reduction is a SUM: dense gradients over the world,
expert gradients over the ranks that hold the same experts (an expert's owner has, by the backward of the exchange,
already received the contributions of its own ep group).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epmoe.comm.waiting import wait_for
from epmoe.parallel.layers import take_over
from epmoe.parallel.mesh import ExpertMesh, is_expert
from epmoe.types import compute_dtype

BUCKET_BYTES = 25 * 2**20
ALIGNMENT = 32
"""Views start at multiples of this many elements, so that vector kernels find them aligned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """One contiguous buffer of gradients and the ranks it is summed over."""

    flat: Tensor
    group: dist.ProcessGroup


class Gradients:
    """Gradients of a model as views into a few flat buffers.

    Nothing is copied to reduce them, a parameter that nobody touched has zero gradient (never None), and micro-batches
    accumulate in place. Gradients are at least float32: a bfloat16 parameter's gradient is added to its float32 view
    as soon as backward has it, and ``parameter.grad`` is None again.

    Args:
        model: Its parameters without ``requires_grad`` are left out. Its MoE layers may be trained from now on.
        mesh: The groups.
        bucket_bytes: Buffers are closed at this size, so that several reductions can be under way at once.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: ExpertMesh,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        take_over(model)
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        dense = [(name, p) for name, p in trainable if not is_expert(name)]
        experts = [(name, p) for name, p in trainable if is_expert(name)]
        self.views: dict[str, Tensor] = {}
        """The gradient of each parameter, by its name."""
        self.dense = self._allocate(dense, mesh.world_group, bucket_bytes)
        self.experts = self._allocate(experts, mesh.edp_group, bucket_bytes)
        for name, parameter in trainable:
            self._attach(parameter, self.views[name])

    def _allocate(
        self, named: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup, bucket_bytes: int
    ) -> list[Bucket]:
        buckets = []
        for members in _split(named, bucket_bytes):
            starts, length = [], 0
            for _, parameter in members:
                starts.append(length)
                length += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            first = members[0][1]
            flat = torch.zeros(length, dtype=compute_dtype(first.dtype), device=first.device)
            for (name, parameter), start in zip(members, starts, strict=True):
                self.views[name] = flat[start : start + parameter.numel()].view(parameter.shape)
            buckets.append(Bucket(flat=flat, group=group))
        return buckets

    def _attach(self, parameter: nn.Parameter, view: Tensor) -> None:
        if parameter.dtype == view.dtype:
            parameter.grad = view
            return

        def accumulate(touched: Tensor) -> None:
            if touched.grad is not None:
                view.add_(touched.grad)
                touched.grad = None

        parameter.register_post_accumulate_grad_hook(accumulate)

    @property
    def flats(self) -> list[Tensor]:
        """Every buffer, dense ones first."""
        return [bucket.flat for bucket in (*self.dense, *self.experts)]

    def zero(self) -> None:
        """Sets every gradient to zero; the start of an optimizer step."""
        for flat in self.flats:
            flat.zero_()

    def reduce(self) -> None:
        """Sums every gradient over the ranks that hold its parameter. A collective, once per optimizer step."""
        pending = [
            dist.all_reduce(bucket.flat, group=bucket.group, async_op=True)
            for bucket in (*self.dense, *self.experts)
            if dist.get_world_size(bucket.group) > 1
        ]
        for work in pending:
            wait_for(work)


def _split(named: list[tuple[str, nn.Parameter]], bucket_bytes: int) -> list[list[tuple[str, nn.Parameter]]]:
    """Parameters in backward order, cut into buckets of one gradient dtype and device."""
    buckets: list[list[tuple[str, nn.Parameter]]] = []
    filled = 0
    for name, parameter in reversed(named):
        dtype = compute_dtype(parameter.dtype)
        size = parameter.numel() * dtype.itemsize
        last = buckets[-1][0][1] if buckets else None
        fits = (
            last is not None
            and filled + size <= bucket_bytes
            and (compute_dtype(last.dtype), last.device) == (dtype, parameter.device)
        )
        if fits:
            buckets[-1].append((name, parameter))
            filled += size
        else:
            buckets.append([(name, parameter)])
            filled = size
    return buckets
