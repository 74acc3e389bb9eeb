"""Experts that are spread over ranks in a model under PyTorch's DistributedDataParallel."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from epmoe.parallel.layers import spread_layers, take_over
from epmoe.parallel.mesh import ExpertMesh


def prepare(model: nn.Module, mesh: ExpertMesh) -> None:
    """Makes a model whose experts are spread over ranks ready for ``DistributedDataParallel``. A collective.

    Call it after ``epmoe.shard_experts`` and before DDP is made; without it, training stops at the first forward pass.
    DDP alone would give every rank the experts of rank 0 and average gradients of different experts. Afterwards it
    leaves experts alone: their gradients are summed over the ranks that hold the same ones, in every backward pass, and
    divided by the size of the world, which is what DDP does with all others.

    Raises:
        ValueError: A layer does not hold this rank's share of the experts.
    """
    layers = spread_layers(model, mesh)
    take_over(model)
    if mesh.ep_size == 1:
        return  # every rank holds all experts, and DDP does the right thing

    def reduced(gradient: Tensor) -> Tensor:
        # An owner has the contributions of its ep group already, from the way back of the rows.
        total = gradient / mesh.world_size
        if mesh.edp_size > 1:
            dist.all_reduce(total, group=mesh.edp_group)
        return total

    ignored = []
    for name, layer in layers:
        for child, parameter in layer.experts.named_parameters():
            ignored.append(".".join(part for part in (name, "experts", child) if part))
            with torch.no_grad():
                dist.broadcast(parameter, group=mesh.edp_group, group_src=0)
            parameter.register_hook(reduced)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
