"""The only place where a model meets a mesh."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from epmoe.comm.exchange import SumCounts
from epmoe.config import choose_ep_size
from epmoe.moe.build import build_dispatcher, refuse_batch_statistics
from epmoe.moe.experts import FFNExperts
from epmoe.moe.layer import MoELayer
from epmoe.parallel.ddp import leave_experts_to_us
from epmoe.parallel.deepspeed import mark_experts
from epmoe.parallel.layers import moe_layers, refuse_equal_numbers, refuse_if_unreduced, refuse_shared
from epmoe.parallel.mesh import ExpertMesh


def shard_experts(model: nn.Module, mesh: ExpertMesh) -> None:
    """Leaves every MoE layer of ``model`` only this rank's experts and connects it to the ranks with the others.

    Stacked experts are cut. Their parameters stay the objects that they are: what is frozen or shared, hooks, and an
    optimizer that was made before and has not stepped yet stay what they were. Experts that are modules must already be
    this rank's (``ModuleExperts(..., num_experts=E, first_expert=...)``). A layer whose experts are spread is not
    trained before something reduces their gradients: ``Gradients`` of ``epmoe.parallel.gradients``, or ``prepare`` of
    ``epmoe.parallel.ddp``, ``.fsdp`` or ``.deepspeed``.

    Raises:
        ValueError: ``dispatcher: local`` while the experts are spread over several ranks; experts that the ranks cannot
            share out evenly; modules that are not this rank's experts, the message says which ones are; an overlap with
            fewer experts on a rank than parts, or with experts of another kind; a parameter that experts share with the
            rest of the model or with each other; two layers with the same number; a model that DDP has wrapped already.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "shard_experts comes before DistributedDataParallel, which has taken all experts for the same"
        )
    if mesh.ep_size > 1:
        refuse_shared(model)
    refuse_equal_numbers(model)
    num_parts = mesh.parallel.overlap_chunks
    if num_parts == 1 and not mesh.parallel.overlap_shared:
        num_parts = 0
    for _, layer in moe_layers(model):
        choose_ep_size(mesh.ep_size, mesh.world_size, layer.moe.num_experts)
        dispatcher = build_dispatcher(
            layer.moe,
            replace(mesh.exchange, layer=layer.router.layer),
            device_type=mesh.device_mesh.device_type,
            num_parts=num_parts,
        )
        if num_parts and not hasattr(layer.experts, "in_parts"):
            raise ValueError(
                f"overlap_chunks and overlap_shared hand the experts their rows in parts, which "
                f"{type(layer.experts).__name__} does not understand; use FFNExperts or ModuleExperts, or "
                f"overlap_chunks=1 and overlap_shared=false"
            )
        _keep_local_experts(layer, mesh)
        layer.dispatcher = dispatcher
        refuse_batch_statistics(layer)
        if mesh.ep_size > 1:
            mark_experts(layer, mesh)
            layer.before_training = layer.before_training or refuse_if_unreduced
        if mesh.world_size > 1:
            layer.sum_over_ranks = SumCounts(mesh.world_group)
    if mesh.ep_size > 1:
        leave_experts_to_us(model)


def _keep_local_experts(layer: MoELayer, mesh: ExpertMesh) -> None:
    experts, num_experts = layer.experts, layer.moe.num_experts
    count = num_experts // mesh.ep_size
    first = mesh.ep_rank * count
    # Experts that do not say which they are, are all of them.
    held_first = getattr(experts, "first_expert", 0)
    held = getattr(experts, "num_local", num_experts)
    if (held_first, held) == (first, count):
        return
    if not isinstance(experts, FFNExperts) or held != num_experts:
        way_out = (
            "it was saved by another rank or for another number of them; load the file of this one, or build the layer "
            "anew with all experts"
            if isinstance(experts, FFNExperts)
            else f"pass ModuleExperts(modules, num_experts={num_experts}, first_expert={first}) with {count} modules"
        )
        raise ValueError(
            f"rank {mesh.ep_rank} of the {mesh.ep_size} that share {num_experts} experts needs the {count} from "
            f"number {first}, but its {type(experts).__name__} has {held} from number {held_first}; {way_out}"
        )
    experts.keep(first, count)
