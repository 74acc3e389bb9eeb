"""What a router family is: its decision, and the tensors it needs besides the router's weight."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epmoe.types import Routing

FloatArray = npt.NDArray[np.float32]
Init = Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray[Any]]
"""Values of a tensor of the given shape; the generator is keyed by the seed and the tensor's name."""

RouteFunction = Callable[..., Routing]
"""``(inputs: RouterInputs, options, top_k: int) -> Routing``, pure."""

Update = Callable[[Tensor, Tensor, Any, int], Tensor]
"""``(value, demand_E, options, step) -> value``: what an optimizer step makes of a buffer. ``demand_E`` counts the
assignments each expert was asked for in the step, over all ranks and micro-batches; the first step is 0."""


def zeros(_: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """All zero."""
    return np.zeros(shape, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterTensor:
    """A tensor that the router holds for a family, in checkpoints too, and the router input it becomes."""

    name: str
    """Of the parameter or buffer: ``router.<name>``."""
    field: str | None
    """Of ``RouterInputs``; None = the layer takes the tensor itself."""
    num_rows: int
    projects: bool
    """True: shape [num_rows, D], and the field is x times its transpose. False: [num_rows], the field itself."""
    init: Init = zeros
    update: Update | None = None
    """None: a parameter, trained with the dense ones. Else a buffer: no gradient touches it, this function does."""
    dtype: torch.dtype | None = None
    """Given: a buffer of this dtype that nothing changes, such as a table of integers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A router family: a line in ``build.ROUTERS``."""

    route: RouteFunction
    parts: Callable[[Any, int], tuple[RouterTensor, ...]] = lambda options, num_experts: ()
    """From the options and the number of experts."""
    weight_init: Init | None = None
    """Of the router's weight [E, D]; None = as the model's other matrices."""
    has_weight: bool = True
    """False: there is none, and the logits are zeros (NaN for a token whose vector is not finite)."""

    def __reduce__(self) -> str | tuple[Any, ...]:
        """A family that is its module's ``FAMILY`` is pickled as that name; its functions need none of their own."""
        module = self.route.__module__
        if getattr(sys.modules.get(module), "FAMILY", None) is self:
            return _family_of, (module,)
        return super().__reduce__()


def _family_of(module: str) -> Family:
    family: Family = import_module(module).FAMILY
    return family
