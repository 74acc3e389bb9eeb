"""The only place where a model meets a mesh."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from epmoe.comm.exchange import sum_counts
from epmoe.moe.build import build_dispatcher
from epmoe.moe.experts import FFNExperts, ModuleExperts
from epmoe.moe.layer import MoELayer
from epmoe.parallel.deepspeed import mark_experts
from epmoe.parallel.mesh import ExpertMesh


def shard_experts(model: nn.Module, mesh: ExpertMesh) -> None:
    """Leaves every MoE layer of ``model`` only this rank's experts and connects it to the ranks with the others.

    Stacked experts are cut; their parameters are new objects afterwards: build optimizers later. Experts that are
    modules must already be this rank's (``ModuleExperts(..., num_experts=E, first_expert=...)``). A layer whose
    experts are spread is not trained before something reduces their gradients: ``Gradients`` of
    ``epmoe.parallel.gradients``, or ``prepare`` of ``epmoe.parallel.ddp``, ``.fsdp`` or ``.deepspeed``.

    Raises:
        ValueError: ``dispatcher: local`` while the experts are spread over several ranks; modules that are not this
            rank's experts, the message says which ones are; an overlap with fewer experts on a rank than parts, or
            with experts of another kind.
    """
    num_parts = mesh.parallel.overlap_chunks
    if num_parts == 1 and not mesh.parallel.overlap_shared:
        num_parts = 0
    for layer in model.modules():
        if not isinstance(layer, MoELayer):
            continue
        dispatcher = build_dispatcher(
            layer.moe,
            replace(mesh.exchange, layer=layer.router.layer),
            device_type=mesh.device_mesh.device_type,
            num_parts=num_parts,
        )
        if num_parts and not isinstance(layer.experts, FFNExperts | ModuleExperts):
            raise ValueError(
                f"overlap_chunks and overlap_shared hand the experts their rows in parts, which "
                f"{type(layer.experts).__name__} does not understand; use FFNExperts or ModuleExperts, or "
                f"overlap_chunks=1 and overlap_shared=false"
            )
        _keep_local_experts(layer, mesh)
        layer.dispatcher = dispatcher
        if mesh.ep_size > 1:
            mark_experts(layer, mesh)
            layer.unreduced = True
        if mesh.world_size > 1:
            layer.sum_over_ranks = partial(sum_counts, group=mesh.world_group)


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
        raise ValueError(
            f"rank {mesh.ep_rank} of the {mesh.ep_size} that share {num_experts} experts needs the {count} from "
            f"number {first}, but its {type(experts).__name__} has {held} from number {held_first}; pass "
            f"ModuleExperts(modules, num_experts={num_experts}, first_expert={first}) with {count} modules"
        )
    experts.keep(first, count)
