"""Dense weights on every rank, experts on their owners."""

from __future__ import annotations

from torch import Tensor, nn

from epmoe.config import OptimizerConfig
from epmoe.engines.optimizer import Optimizer
from epmoe.engines.protocol import ParameterRows, expert_part
from epmoe.parallel.gradients import Gradients
from epmoe.parallel.mesh import ExpertMesh
from epmoe.parallel.norm import global_norm, scale


class NativeEngine:
    """Dense weights on every rank, experts on their owners; gradients in flat buffers, one all-reduce for each.

    Args:
        config: The ``optimizer`` section.
        model: With this rank's experts; the parameters that require gradients are trained.
        mesh: Who shares experts with whom.
    """

    def __init__(self, config: OptimizerConfig, model: nn.Module, mesh: ExpertMesh) -> None:
        self._mesh = mesh
        self._gradients = Gradients(model, mesh, masters=True)
        self._optimizer = Optimizer(config, model, self._gradients.views)

    def zero(self) -> None:
        """Sets every gradient to zero."""
        self._gradients.zero()

    def backward(self, objective: Tensor) -> None:
        """Adds to the buffers; nothing travels."""
        objective.backward()

    def reduce(self) -> None:
        """Dense gradients are summed over the world, those of experts over the ranks that hold the same ones."""
        self._gradients.reduce()

    def norm(self) -> Tensor:
        """One small gather over the ep group."""
        dense = [bucket.flat for bucket in self._gradients.dense]
        experts = [bucket.flat for bucket in self._gradients.experts]
        device = self._gradients.flats[0].device
        return global_norm(dense, experts, self._mesh.ep_group, device)

    def clip(self, coefficient: Tensor) -> None:
        """Scales the buffers."""
        scale(self._gradients.flats, coefficient)

    def step(self, lr: float) -> None:
        """AdamW or SGD, then masters are rounded into the parameters."""
        self._optimizer.step(lr)

    def gradients(self) -> dict[str, ParameterRows]:
        """Views of the buffers."""
        return {name: expert_part(name, view, self._mesh) for name, view in self._gradients.views.items()}

    def weights(self) -> dict[str, Tensor]:
        """See ``Engine``."""
        return self._optimizer.weights()

    def state(self) -> dict[str, Tensor]:
        """See ``Engine``."""
        return self._optimizer.state()

    def publish(self) -> None:
        """Rounds the masters into the parameters."""
        self._optimizer.publish()
