"""Clipping by the norm of the whole model's gradient, for models of your own in any wrapper."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from epmoe.parallel.deepspeed import MARKER
from epmoe.parallel.gradients import gradient_of
from epmoe.parallel.layers import expert_parameters
from epmoe.parallel.mesh import ExpertMesh
from epmoe.parallel.norm import clip_coefficient, in_order, scale, sum_of_squares

Groups = tuple[dist.ProcessGroup, ...]


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, mesh: ExpertMesh, max_norm: float) -> Tensor:
    """Scales the gradients of all ranks so that their common L2 norm is at most ``max_norm``. A collective.

    Every number of the model counts once: dense ones that all ranks hold, the experts of every rank, and the shards of
    FSDP2. So the norm is that of one process with all experts, the same bits on all ranks. Call it after the gradients
    are reduced: after ``Gradients.reduce``, or after ``backward`` under DDP and FSDP2.

    Args:
        model: After ``shard_experts``, and ``prepare`` or ``Gradients``; wrapped or not.
        mesh: The one ``shard_experts`` was given.
        max_norm: Above it gradients are scaled. ``inf`` only measures.

    Returns:
        The norm before, a float64 scalar; NaN and infinities are in it, and then in the gradients, as in torch's own.

    Raises:
        TypeError: Parameters instead of the model.
        ValueError: The model is DeepSpeed's, which keeps its gradients elsewhere.
    """
    if not isinstance(model, nn.Module):
        raise TypeError("clip_grad_norm_ takes the model, whose layers know which parameters are experts'")
    if any(name.rpartition(".")[2] == MARKER for name, _ in model.named_modules()):
        raise ValueError("DeepSpeed clips by itself: gradient_clipping in its configuration")
    experts = {id(parameter) for parameter in expert_parameters(model).values()}
    gradients: dict[Groups, list[Tensor]] = defaultdict(list)
    copies: list[Tensor] = []  # rounded ones, which the optimizer reads
    for parameter in model.parameters():  # frozen ones too: all ranks come to the same groups
        groups = _shard_groups(parameter)
        if id(parameter) in experts and mesh.ep_size > 1:
            groups = (*groups, mesh.ep_group)
        gradient = gradient_of(parameter)
        gradients[groups] += [] if gradient is None else [_here(gradient)]
        if parameter.grad is not None and parameter.grad is not gradient:
            copies.append(_here(parameter.grad))
    device = torch.device(mesh.device_mesh.device_type)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for groups, held in gradients.items():
        total += _over(groups, sum_of_squares(held, device))
    norm = total.sqrt()
    coefficient = clip_coefficient(norm, max_norm)
    for held in (*gradients.values(), copies):
        scale(held, coefficient)
    return norm


def _shard_groups(parameter: Tensor) -> Groups:
    """The ranks over which a parameter is cut; copies are not among them."""
    if not isinstance(parameter, DTensor):
        return ()
    over = parameter.device_mesh
    return tuple(over.get_group(axis) for axis, p in enumerate(parameter.placements) if isinstance(p, Shard))


def _here(gradient: Tensor) -> Tensor:
    local: Tensor = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return local


def _over(groups: Groups, square: Tensor) -> Tensor:
    """Added up in rank order: an all-reduce may add in another order on each rank."""
    for group in groups:
        parts = [torch.empty_like(square) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, square, group=group)
        square = in_order(parts)
    return square
