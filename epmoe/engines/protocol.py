"""What the trainer asks of an engine.

The trainer keeps the data, the objective, what all ranks agree on, the decision about a step that is not finite, and
the learning rate; ``epmoe.train.build.build_engine`` chooses the engine. The objective is divided by the token count
of all ranks, so an engine sums gradients over ranks and never averages them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from epmoe.parallel.mesh import ExpertMesh, is_stacked


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRows:
    """What this rank holds of a tensor: rows of its dim 0, in place. All of them where every rank holds the same."""

    local: Tensor
    first_row: int
    shape: tuple[int, ...]
    """Of the whole tensor."""


class Engine(Protocol):
    """Gradients and optimizer state of a model. Every method is called on all ranks alike: any may communicate."""

    def zero(self) -> None:
        """Forgets the gradients; the start of an optimizer step."""

    def backward(self, objective: Tensor) -> None:
        """Adds the gradient of a micro-batch's objective (a scalar) to those of the step so far."""

    def reduce(self) -> None:
        """Ends the accumulation: every gradient is then its sum over all ranks, zero where nobody touched it."""

    def norm(self) -> Tensor:
        """L2 norm of the whole model's reduced gradient -> float64 scalar, the same bits on every rank."""

    def clip(self, coefficient: Tensor) -> None:
        """Multiplies every gradient by the coefficient, the same on all ranks."""

    def step(self, lr: float) -> None:
        """One update of the weights at a learning rate."""

    def gradients(self) -> dict[str, ParameterRows]:
        """This rank's part of every gradient, by the parameter's name. Asked for between ``reduce`` and ``step``."""

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model, in place: masters where there are some, else parameters and buffers.

        A tensor of which this rank holds rows is a DTensor, or this rank's stacked experts.
        """

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as ``<parameter name>.exp_avg`` and so on, in place and as ``weights`` has them."""

    def publish(self) -> None:
        """Tells the model what was read into ``weights``."""


def expert_part(name: str, tensor: Tensor, mesh: ExpertMesh) -> ParameterRows:
    """The part of a tensor that a rank holds which keeps dense tensors whole and its own experts stacked."""
    shape = tuple(tensor.shape)
    if not is_stacked(name, tensor):
        return ParameterRows(local=tensor, first_row=0, shape=shape)
    return ParameterRows(
        local=tensor, first_row=mesh.ep_rank * shape[0], shape=(mesh.ep_size * shape[0], *shape[1:])
    )
