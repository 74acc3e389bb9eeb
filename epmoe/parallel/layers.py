"""The MoE layers of a model whose experts are spread over ranks, and whether somebody reduces their gradients."""

from __future__ import annotations

from torch import nn

from epmoe.moe.layer import MoELayer
from epmoe.parallel.mesh import ExpertMesh


def spread_layers(model: nn.Module, mesh: ExpertMesh) -> list[tuple[str, MoELayer]]:
    """Names and MoE layers of a model after ``epmoe.shard_experts``.

    Raises:
        ValueError: A layer does not hold this rank's share of the experts.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]
    for name, layer in layers:
        held, wanted = getattr(layer.experts, "num_local", None), layer.moe.num_experts // mesh.ep_size
        if held != wanted:
            raise ValueError(
                f"{name or 'the layer'} holds {held} experts, but {layer.moe.num_experts} over {mesh.ep_size} ranks "
                f"are {wanted} on each; call epmoe.shard_experts(model, mesh) first"
            )
    return layers


def take_over(model: nn.Module) -> None:
    """Lets the MoE layers of ``model`` train: whoever calls this reduces the gradients of their experts over the ranks
    that hold the same ones."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.unreduced = False
