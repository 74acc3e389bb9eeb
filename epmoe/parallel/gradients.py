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
from torch.nn.parallel import DistributedDataParallel

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
    as soon as backward has it, and ``parameter.grad`` is None until ``reduce`` leaves the rounded sum there.

    ``zero`` starts a step; ``optimizer.zero_grad()`` in either form does too. Parameters may be frozen and trained
    again in between, on all ranks alike; convert or replace them before this object is made. Who makes it last for a
    model has its gradients.

    Args:
        model: Its MoE layers may be trained from now on.
        mesh: The groups.
        bucket_bytes: Buffers are closed at this size, so that several reductions can be under way at once.
        masters: The optimizer reads ``views``, so ``reduce`` leaves nothing in ``parameter.grad`` below float32.

    Raises:
        ValueError: The model is in DistributedDataParallel, or something else reduces the gradients of its experts.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: ExpertMesh,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        masters: bool = False,
    ) -> None:
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "DistributedDataParallel averages the gradients of this model already; leave Gradients out, and call "
                "epmoe.parallel.ddp.prepare(model, mesh)"
            )
        take_over(model, "Gradients")
        self._model, self._mesh, self._bucket_bytes, self._masters = model, mesh, bucket_bytes, masters
        self.views: dict[str, Tensor] = {}
        """The gradient of each parameter that is or was trained, by its name."""
        self.dense: list[Bucket] = []
        self.experts: list[Bucket] = []
        self._held: dict[str, nn.Parameter] = {}
        self._made_for: dict[str, tuple[object, ...]] = {}
        self._adders: dict[str, _Adder] = {}
        self._frozen: set[str] = set()
        self._follow()

    def _follow(self) -> None:
        """Takes in what is trained for the first time, lets go of what is frozen, and brings back what was."""
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        for name in trained.keys() & self._held.keys():
            if _kind(trained[name], self.views[name]) != self._made_for[name]:
                raise RuntimeError(
                    f"{name} has been converted, moved or replaced since Gradients was made, and its gradient is no "
                    f"longer in the buffers; make Gradients (and the optimizer) after model.to(...)"
                )
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
                self._made_for[name] = _kind(parameter, self.views[name])
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
        for name, adder in self._adders.items():
            self._held[name].grad, adder.old = None, False

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
        for name in self._adders.keys() - self._frozen:
            self._adders[name].settle(self._held[name])
        pending = [
            dist.all_reduce(bucket.flat, group=bucket.group, async_op=True)
            for bucket in (*self.dense, *self.experts)
            if dist.get_world_size(bucket.group) > 1
        ]
        for work in pending:
            wait_for(work)
        for name in self._adders.keys() - self._frozen:
            self._adders[name].old = True
            self._held[name].grad = None if self._masters else self.views[name].to(self._held[name].dtype)


class _Adder:
    """Hook of a parameter below float32: adds what backward found to the wider view."""

    def __init__(self, view: Tensor) -> None:
        self.view, self.replaced = view, False
        self.old = False
        """The view holds the sum of a step that ``reduce`` has ended; its rounded copy may have been cleared since."""

    def __call__(self, touched: Tensor) -> None:
        if touched.grad is None:
            return
        if self.old:  # backward has added to what was left there
            self.view.copy_(touched.grad)
        else:
            self.view.add_(touched.grad)
        touched.grad, self.old = None, False

    def settle(self, parameter: Tensor) -> None:
        """Where nothing came since ``reduce``: what was left, or zero if it has been cleared."""
        if self.old and parameter.grad is None:
            self.view.zero_()
        else:
            self(parameter)


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """Where a parameter's gradient is: in its ``grad``, or wider in the buffers of a ``Gradients``."""
    hooks = (parameter._post_accumulate_grad_hooks or {}).values()
    return next((hook.view for hook in hooks if isinstance(hook, _Adder)), parameter.grad)


def _kind(parameter: nn.Parameter, view: Tensor) -> tuple[object, ...]:
    """What must stay as it was for gradients to reach the buffers. ``model.to`` may move a view to another storage."""
    storage = view.untyped_storage().data_ptr()
    return id(parameter), parameter.dtype, parameter.device, parameter.shape, storage


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
