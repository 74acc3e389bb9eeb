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
from epmoe.parallel.layers import expert_parameters, take_over
from epmoe.parallel.mesh import ExpertMesh
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

    ``zero`` starts a step; ``optimizer.zero_grad()`` in either form does too, for parameters of at least float32.
    Parameters may be frozen and trained again in between, on all ranks alike. Who makes this object last for a model
    has its gradients.

    Args:
        model: Its MoE layers may be trained from now on.
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
        self._model, self._mesh, self._bucket_bytes = model, mesh, bucket_bytes
        self.views: dict[str, Tensor] = {}
        """The gradient of each parameter that is or was trained, by its name."""
        self.dense: list[Bucket] = []
        self.experts: list[Bucket] = []
        self._held: dict[str, nn.Parameter] = {}
        self._adders: dict[str, _Adder] = {}
        self._frozen: set[str] = set()
        self._follow()

    def _follow(self) -> None:
        """Takes in what is trained for the first time, lets go of what is frozen, and brings back what was."""
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if new := {name: p for name, p in trained.items() if name not in self._held}:
            theirs = expert_parameters(self._model).keys()
            self.dense += self._allocate(
                [(n, p) for n, p in new.items() if n not in theirs], self._mesh.world_group
            )
            self.experts += self._allocate(
                [(n, p) for n, p in new.items() if n in theirs], self._mesh.edp_group
            )
            self._held |= new
            for name, parameter in new.items():
                self._attach(name, parameter)
        for name in self._held.keys() - trained.keys() - self._frozen:
            self._held[name].grad = None  # or an optimizer would go on moving it
            self._frozen.add(name)
        for name in self._frozen & trained.keys():
            self._frozen.remove(name)
            self.views[name].zero_()
            if name not in self._adders:
                _follow_up(self._held[name], self.views[name])

    def _allocate(self, named: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup) -> list[Bucket]:
        buckets = []
        for members in _split(named, self._bucket_bytes):
            starts, length = [], 0
            for _, parameter in members:
                starts.append(length)
                length += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            first = members[0][1]
            flat = torch.zeros(length, dtype=compute_dtype(first.dtype), device=first.device)
            for (name, parameter), start in zip(members, starts, strict=True):
                self.views[name] = _as_in_memory(parameter, flat[start : start + parameter.numel()])
            buckets.append(Bucket(flat=flat, group=group))
        return buckets

    def _attach(self, name: str, parameter: nn.Parameter) -> None:
        for hook_id, hook in list((parameter._post_accumulate_grad_hooks or {}).items()):
            if isinstance(hook, _Adder):  # of an object that was made before
                hook.replaced = True
                del parameter._post_accumulate_grad_hooks[hook_id]
        if parameter.dtype == self.views[name].dtype:
            _follow_up(parameter, self.views[name])
            return
        self._adders[name] = _Adder(self.views[name])
        self._adders[name](parameter)
        parameter.register_post_accumulate_grad_hook(self._adders[name])

    @property
    def flats(self) -> list[Tensor]:
        """Every buffer, dense ones first."""
        return [bucket.flat for bucket in (*self.dense, *self.experts)]

    def zero(self) -> None:
        """Sets every gradient to zero; the start of an optimizer step."""
        self._follow()
        for flat in self.flats:
            flat.zero_()
        for name in self._held.keys() - self._adders.keys() - self._frozen:
            self._held[name].grad = self.views[name]

    def reduce(self) -> None:
        """Sums every gradient over the ranks that hold its parameter. A collective, once per optimizer step.

        Raises:
            RuntimeError: Another ``Gradients`` of this model was made after this one.
        """
        self._follow()
        if any(adder.replaced for adder in self._adders.values()):
            raise RuntimeError(
                "another Gradients of this model was made later, and has the gradients; reduce with it"
            )
        for name in self._held.keys() - self._adders.keys() - self._frozen:
            _follow_up(self._held[name], self.views[name])
        pending = [
            dist.all_reduce(bucket.flat, group=bucket.group, async_op=True)
            for bucket in (*self.dense, *self.experts)
            if dist.get_world_size(bucket.group) > 1
        ]
        for work in pending:
            wait_for(work)


class _Adder:
    """Hook of a parameter below float32: adds what backward found to the wider view."""

    def __init__(self, view: Tensor) -> None:
        self.view, self.replaced = view, False

    def __call__(self, touched: Tensor) -> None:
        if touched.grad is not None:
            self.view.add_(touched.grad)
            touched.grad = None


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """Where a parameter's gradient is: in its ``grad``, or wider in the buffers of a ``Gradients``."""
    hooks = (parameter._post_accumulate_grad_hooks or {}).values()
    return next((hook.view for hook in hooks if isinstance(hook, _Adder)), parameter.grad)


def _follow_up(parameter: nn.Parameter, view: Tensor) -> None:
    """Brings a gradient back into its view after ``optimizer.zero_grad()`` has cut it off."""
    found = parameter.grad
    if found is view:
        return
    if found is None:  # nothing came since
        view.zero_()
    else:
        view.copy_(found)
    parameter.grad = view


def _as_in_memory(parameter: Tensor, flat: Tensor) -> Tensor:
    """The buffer in the shape and memory order of a parameter: fused optimizers read both in memory order."""
    strides = torch.empty_like(parameter, device="meta").stride()
    return flat.as_strided(parameter.shape, strides)


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
