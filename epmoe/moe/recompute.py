"""Less memory between forward and backward: decisions that are replayed, and cheap tensors that are made again.

Both work with the hooks that autograd calls for every tensor an operator wants to keep, so the graph of the first pass
is the one that is differentiated, whatever is computed a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count, repeat
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from epmoe.types import DispatchPlan, Routing


class Remake(Protocol):
    """Calls a function of tensors whose result, and all it keeps inside, is cheap to compute again."""

    def __call__(self, fn: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``fn(*inputs)``, which must not depend on autocast or on anything that changes until backward."""


def plain(fn: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The ``Remake`` that keeps everything."""
    return fn(*inputs)


class Recompute:
    """How a pass through a layer comes by what its backward pass needs: this one keeps everything."""

    routing: Routing | None = None
    """The decision of a first pass, in the second one."""
    remake: Remake = staticmethod(plain)
    """Computes what need not be kept."""

    def plan_of_first_pass(self) -> DispatchPlan | None:
        """None in the first pass itself."""
        return None

    def of_copies(self) -> Iterator[Recompute]:
        """The same for every copy of the input, where a layer routes each on its own (``smoothing.reroute``)."""
        return repeat(self)

    def remember(self, routing: Routing, plan: DispatchPlan) -> None:
        """Called at the end of the first pass."""

    def kept(self) -> AbstractContextManager[object]:
        """Inside, operators keep what they need, although the pass will be computed again."""
        return nullcontext()

    def same_random_numbers(self, experts: nn.Module) -> AbstractContextManager[object]:
        """Around a call of the experts: a second pass finds torch's generators as the first did."""
        return nullcontext()


KEEP = Recompute()


# ------------------------------------------------------------------------------------------- replay
@dataclass
class Replay(Recompute):
    """What a layer decided about a micro-batch in the first pass, for the pass that recomputes its activations.

    Routing again could break a tie another way, and then other rows would travel than the first pass has counted. So
    the second pass takes the routing and the plan from here; it exchanges no counts, and makes neither losses nor
    metrics. One object belongs to one layer and one micro-batch:

        checkpoint(layer, x_BSD, ctx, recompute=Replay(), use_reentrant=False)

    Experts that are modules and draw random numbers (dropout) draw the same ones again, whatever checkpoint preserves.
    """

    routing: Routing | None = None
    plan: DispatchPlan | None = None
    copies: list[Replay] = field(default_factory=list)
    """Of the noisy copies of the input, where the layer routes each on its own (``smoothing.reroute``)."""

    random_states: list[tuple[Tensor, ...]] = field(default_factory=list)
    """Of torch's generators before each call of experts that may draw from them."""
    _next_call: int = 0

    def of_copies(self) -> Iterator[Replay]:
        """That of every copy in its order, as many as are asked for."""
        for number in count():
            if number == len(self.copies):
                self.copies.append(Replay())
            yield self.copies[number]

    def plan_of_first_pass(self) -> DispatchPlan | None:
        """None in the first pass itself.

        Raises:
            ValueError: There was one, and this is not the second: no backward pass asks for it.
        """
        if self.plan is not None and torch._C._current_graph_task_id() == -1:
            raise ValueError(
                "this Replay holds the decision of an earlier call, and no backward pass asks for that one again; "
                "pass a new Replay() to every call of a layer"
            )
        return self.plan

    def remember(self, routing: Routing, plan: DispatchPlan) -> None:
        """Keeps both, cut off from the graph: it would hold this object, and this object the graph."""
        if self.plan is None:
            self.routing, self.plan = pytree.tree_map_only(Tensor, _cut, (routing, plan))

    def kept(self) -> AbstractContextManager[object]:
        """Checkpoint's own hooks do not see what is kept here."""
        return saved_tensors_hooks(_held, _unpack)

    @contextmanager
    def same_random_numbers(self, experts: nn.Module) -> Iterator[None]:
        """A second pass leaves no trace in torch's generators."""
        if not getattr(experts, "draws", True):
            yield
            return
        call = self._next_call
        if self.plan is None:  # the first pass
            self.random_states.append(_random_state())
            yield
            return
        self._next_call = (call + 1) % len(self.random_states)
        now = _random_state()
        _set_random_state(self.random_states[call])
        try:
            yield
        finally:
            _set_random_state(now)


def _random_state() -> tuple[Tensor, ...]:
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else (cpu,)


def _set_random_state(state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    for of_device in state[1:]:
        torch.cuda.set_rng_state(of_device)


def _cut(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _held(tensor: Tensor) -> Tensor:
    """Without its graph: a result that its own operator keeps would hold the operator, and so itself, for ever."""
    return tensor if tensor.is_leaf else tensor.detach()


# ------------------------------------------------------------------------------------------- cheap tensors
@dataclass(slots=True)
class _Recipe:
    """A result that can be made again, and what was kept while it was made."""

    fn: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    """As ``CheapTensors`` packs them: tensors, other recipes' results, or anything else."""
    uses: int = 0
    """Tensors that operators have kept of it."""
    left: int = 0
    """Of these, the ones that have not asked since it was made again."""
    tensors: list[Tensor] = field(default_factory=list)
    """While some have not: what was kept inside, then the result."""

    def take(self, index: int) -> Tensor:
        """What was kept inside as number ``index``; -1 = the result."""
        if not self.tensors:
            self.left = self.uses
            with torch.enable_grad(), saved_tensors_hooks(self._collect, _unpack):
                inputs = [_fresh(packed) for packed in self.inputs]
                result = self.fn(*inputs)
            self.tensors.append(result.detach())
        tensor = self.tensors[index]
        self.left -= 1
        if self.left == 0:
            self.tensors = []
        return tensor

    def _collect(self, tensor: Tensor) -> Tensor:
        self.tensors.append(_held(tensor))
        return self.tensors[-1]


@dataclass(frozen=True, slots=True)
class _Part:
    """A view of a recipe's result, or a tensor kept inside it."""

    recipe: _Recipe
    index: int
    requires_grad: bool
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None
    """Sizes, strides and offset in the storage; None = the tensor as it is."""

    def tensor(self) -> Tensor:
        """Made again, unless the recipe still has it."""
        whole = self.recipe.take(self.index)
        return whole if self.view is None else whole.as_strided(*self.view)


def _fresh(packed: Any) -> Any:
    if isinstance(packed, _Part):
        return packed.tensor().requires_grad_(packed.requires_grad)
    return packed


class CheapTensors(saved_tensors_hooks, Recompute):
    """While it is entered, operators do not keep the results of the functions it is called with; backward makes them
    again from the functions' inputs, once for all operators that need them, to the same bits.

        with CheapTensors() as cheap:
            y = linear(cheap.remake(norm, x))      # keeps x, and not norm(x)
    """

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._made: dict[int, tuple[Tensor, _Recipe]] = {}
        """By address of the storage. The tensor is held so that no other takes its place."""

    def __enter__(self) -> CheapTensors:  # type: ignore[override]
        super().__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._made.clear()

    def remake(self, fn: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``fn(*inputs)``, not to be kept."""
        recipe = _Recipe(fn=fn, inputs=tuple(map(self._pack_input, inputs)))
        number = 0

        def inside(tensor: Tensor) -> _Part:
            nonlocal number
            number += 1
            recipe.uses += 1
            return _Part(recipe, number - 1, tensor.requires_grad, None)

        with saved_tensors_hooks(inside, _unpack):
            result = fn(*inputs)
        address = _address(result)
        given = {_address(value) for value in inputs if isinstance(value, Tensor)}
        if address and address not in given:
            self._made[address] = (result, recipe)
        return result

    def _pack(self, tensor: Tensor) -> Tensor | _Part:
        _, recipe = self._made.get(_address(tensor), (None, None))
        if recipe is None:
            return _held(tensor)
        recipe.uses += 1
        view = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return _Part(recipe, -1, tensor.requires_grad, view)

    def _pack_input(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        packed = self._pack(value)
        if isinstance(packed, Tensor):
            return value if value.is_leaf else _cut(value)
        return _Part(packed.recipe, packed.index, value.requires_grad, packed.view)


def _address(tensor: Tensor) -> int:
    """Of its storage; 0 for an empty one."""
    return tensor.untyped_storage().data_ptr()


def _unpack(packed: Tensor | _Part) -> Tensor:
    return packed.tensor() if isinstance(packed, _Part) else packed
