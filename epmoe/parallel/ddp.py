"""Experts that are spread over ranks in a model under PyTorch's DistributedDataParallel."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from epmoe.parallel.layers import moe_layers, spread_layers, take_over
from epmoe.parallel.mesh import ExpertMesh


def prepare(model: nn.Module, mesh: ExpertMesh) -> None:
    """Makes a model whose experts are spread over ranks ready for ``DistributedDataParallel``. A collective.

    Call it after ``epmoe.shard_experts``, before or after the model is wrapped; without it, training stops at the first
    forward pass. DDP leaves experts alone, as ``shard_experts`` has told it. Their gradients are summed over the ranks
    that hold the same ones, in every backward pass, and divided by the size of the world, which is what DDP does with
    all others. Experts on several ranks that are frozen now may be trained later; of all other parameters DDP itself
    follows only those that require gradients when it is made. A second call changes nothing.

    Raises:
        ValueError: A layer does not hold this rank's share of the experts, or something else reduces their gradients.
    """
    spread_layers(model, mesh)
    fresh = take_over(model, "ddp")
    if mesh.ep_size == 1:
        return  # every rank holds all experts, and DDP does the right thing

    def reduced(gradient: Tensor) -> Tensor:
        # An owner has the contributions of its ep group already, from the way back of the rows.
        total = gradient / mesh.world_size
        if mesh.edp_size > 1:
            dist.all_reduce(total, group=mesh.edp_group)
        return total

    tensors = dict.fromkeys(tensor for layer in fresh for tensor in _tensors(layer.experts))
    for tensor in tensors:
        with torch.no_grad():
            dist.broadcast(tensor, group=mesh.edp_group, group_src=0)
    for parameter in (tensor for tensor in tensors if isinstance(tensor, nn.Parameter)):
        trainable = parameter.requires_grad
        parameter.requires_grad_(True).register_hook(reduced)  # there also for one that is trained later
        parameter.requires_grad_(trainable)


def leave_experts_to_us(model: nn.Module) -> None:
    """Tells a ``DistributedDataParallel`` that is made of this model that its experts, and what they keep in buffers,
    are not the same on all ranks."""
    experts = {id(tensor) for _, layer in moe_layers(model) for tensor in _tensors(layer.experts)}
    # DDP may meet a shared one by any of its names.
    every_name: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    every_name += model.named_buffers(remove_duplicate=False)
    ignored = {name for name, tensor in every_name if id(tensor) in experts}
    ignored |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
