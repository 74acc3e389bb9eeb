"""The only place where a model meets a mesh."""

from __future__ import annotations

from torch import nn

from epmoe.moe.dispatcher import AllToAllDispatcher
from epmoe.moe.experts import FFNExperts
from epmoe.moe.layer import MoELayer
from epmoe.parallel.mesh import ExpertMesh


def shard_experts(model: nn.Module, mesh: ExpertMesh) -> None:
    """Leaves every MoE layer of ``model`` only this rank's experts and connects it to the ranks with the others.

    Expert parameters are new objects afterwards: build optimizers later. With one rank per expert group nothing
    changes, unless the configuration asks for the all-to-all dispatcher.

    Raises:
        ValueError: ``dispatcher: local`` while the experts are spread over several ranks, or experts that are not
            stacked (give each rank its own ``ModuleExperts`` instead).
    """
    for layer in model.modules():
        if not isinstance(layer, MoELayer):
            continue
        wanted = layer.moe.dispatcher
        if wanted == "local" and mesh.ep_size > 1:
            raise ValueError(
                f"dispatcher 'local' needs all experts on every rank, but ep_size={mesh.ep_size}; "
                f"use 'auto' or 'all_to_all'"
            )
        if mesh.ep_size > 1:
            if not isinstance(layer.experts, FFNExperts):
                raise ValueError(f"cannot spread {type(layer.experts).__name__} over {mesh.ep_size} ranks")
            num_local = layer.experts.num_experts // mesh.ep_size
            layer.experts.keep(mesh.ep_rank * num_local, num_local)
        if mesh.ep_size > 1 or wanted == "all_to_all":
            layer.dispatcher = AllToAllDispatcher(mesh.ep_group)
