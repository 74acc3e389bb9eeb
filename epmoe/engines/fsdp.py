"""The FSDP2 engine: weights, gradients and optimizer state in shards, weights gathered for as long as they are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from epmoe.config import OptimizerConfig
from epmoe.engines.optimizer import Optimizer
from epmoe.engines.protocol import ParameterRows
from epmoe.parallel.fsdp import rows_here, shardings
from epmoe.parallel.mesh import ExpertMesh, is_expert
from epmoe.parallel.norm import scale, sharded_norm


class FSDPEngine:
    """Every parameter in shards; see ``epmoe.parallel.fsdp`` for which ranks hold which rows.

    Gradients are reduced in every micro-batch and added up in this rank's shards, so a whole gradient exists of one
    block at a time. The optimizer knows only this rank's rows, as plain tensors.

    Args:
        config: The ``optimizer`` section.
        model: From ``shard_model``; the parameters that require gradients are trained.
        mesh: Who shares experts with whom.
        hybrid: Whether dense parameters are the same on every edp rank.
    """

    def __init__(self, config: OptimizerConfig, model: nn.Module, mesh: ExpertMesh, *, hybrid: bool) -> None:
        self._mesh = mesh
        self._replicas = mesh.edp_size if hybrid else 1
        self._shardings = shardings(model, mesh)
        self._gradients: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # FSDP adds in place where there is a gradient already. One that is always there is zero, and never
                # None, for a parameter that nobody touched.
                gradient = torch.zeros_like(parameter.detach())
                parameter.grad = gradient
                self._gradients[name] = rows_here(gradient)
        self._optimizer = Optimizer(config, model, self._gradients)

    def zero(self) -> None:
        """Sets this rank's shards of the gradients to zero."""
        for gradient in self._gradients.values():
            gradient.zero_()

    def backward(self, objective: Tensor) -> None:
        """Reduces block by block while it goes. A collective."""
        objective.backward()

    def reduce(self) -> None:
        """Does nothing: ``backward`` has."""

    def norm(self) -> Tensor:
        """One small gather over the world."""
        dense = [gradient for name, gradient in self._gradients.items() if not is_expert(name)]
        experts = [gradient for name, gradient in self._gradients.items() if is_expert(name)]
        return sharded_norm(dense, experts, self._mesh.world_group, replicas=self._replicas)

    def clip(self, coefficient: Tensor) -> None:
        """Scales the shards."""
        scale(list(self._gradients.values()), coefficient)

    def step(self, lr: float) -> None:
        """AdamW or SGD on this rank's rows."""
        self._optimizer.step(lr)

    def gradients(self) -> dict[str, ParameterRows]:
        """This rank's shards."""
        return {
            name: ParameterRows(
                local=local, first_row=self._shardings[name].first_row, shape=self._shardings[name].shape
            )
            for name, local in self._gradients.items()
        }

    def weights(self) -> dict[str, Tensor]:
        """See ``Engine``. Gathers nothing."""
        return {
            name: self._shardings[name].place(rows_here(tensor)) if isinstance(tensor, DTensor) else tensor
            for name, tensor in self._optimizer.weights().items()
        }

    def state(self) -> dict[str, Tensor]:
        """See ``Engine``."""
        return {
            key: self._shardings[key.rpartition(".")[0]].place(tensor) if tensor.ndim else tensor
            for key, tensor in self._optimizer.state().items()
        }

    def publish(self) -> None:
        """Does nothing: the shards are what the model gathers from."""
