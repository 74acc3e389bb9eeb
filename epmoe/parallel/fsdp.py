"""A model in shards of FSDP2: which tensors are cut along which axis of the mesh, and what of them a rank then holds.

    dense, fsdp_shard: full     rows over all ranks
    dense, fsdp_shard: hybrid   rows over the ep axis, the same on every edp rank: the gathers stay among neighbours
    experts                     each ep rank's own stay its own; their first axis is cut over the edp axis

FSDP2 averages by default. Here every sum is a sum: the objective is already divided by the token count of all ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Placement, Shard

from epmoe.models.decoder import Block, Decoder
from epmoe.moe.experts import FFNExperts
from epmoe.moe.layer import MoELayer
from epmoe.parallel.layers import spread_layers, take_over
from epmoe.parallel.mesh import ExpertMesh, is_stacked


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How a tensor is spread over all ranks, in terms of the whole tensor: dim 0 of experts is the global id."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    """Of the whole tensor."""
    first_row: int
    """Of this rank's rows of dim 0."""

    def place(self, local: Tensor) -> DTensor:
        """This rank's rows as a part of the whole tensor. No copy."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=stride
        )


def shard_model(
    model: Decoder,
    mesh: ExpertMesh,
    *,
    hybrid: bool,
    compute_dtype: torch.dtype | None,
    materialise: Callable[[str, nn.Module], None],
) -> None:
    """Cuts a decoder with this rank's experts into shards, in place, block by block. A collective.

    A block's experts, the router where it computes in another precision, the rest of the block, and what is left of
    the model are gathered and reduced each on their own.

    Args:
        model: Its parameters may be without memory.
        mesh: Who shares experts with whom.
        hybrid: Dense rows over the ep axis only.
        compute_dtype: Of gathered parameters, but for routers; None = their own. Gradients are then summed in float32.
        materialise: Called with the name of every module and the module, before its own parameters (not those of its
            children) are cut; only one block is whole at a time.

    Raises:
        ValueError: Experts that are modules; shards need the stacked ones.
    """
    # A result that is a view must not be changed in place, FSDP warns; nothing here changes results in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    take_over(model, "fsdp")
    done: set[nn.Module] = set()
    dense = mesh.device_mesh if hybrid else _world(mesh)

    def cut(path: str, module: nn.Module, over: DeviceMesh, dtype: torch.dtype | None) -> None:
        for name, child in module.named_modules(prefix=path):
            if child not in done:
                materialise(name, child)
                done.add(child)
        reduced = None if dtype is None else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
        _cut(module, over, policy)

    for i, block in enumerate(model.blocks):
        path = f"blocks.{i}"
        assert isinstance(block, Block)
        if block.moe is not None:
            if not isinstance(block.moe.experts, FFNExperts):
                raise ValueError(_only_stacked(f"{path}.moe.experts", block.moe.experts))
            cut(f"{path}.moe.experts", block.moe.experts, mesh.device_mesh["edp"], compute_dtype)
            if compute_dtype is not None:
                cut(f"{path}.moe", block.moe, dense, None)
        cut(path, block, dense, compute_dtype)
    cut("", model, dense, compute_dtype)


def _cut(module: nn.Module, over: DeviceMesh, policy: MixedPrecisionPolicy) -> FSDPModule:
    """Rows of a module's parameters over the ranks of a mesh; their gradients are summed, and divided by nothing."""
    fully_shard(module, mesh=over, mp_policy=policy)
    assert isinstance(module, FSDPModule)
    if hasattr(module, "in_parts"):
        register_fsdp_forward_method(module, "in_parts")  # experts, where rows travel in parts
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    return module


def prepare(model: nn.Module, mesh: ExpertMesh, mp_policy: MixedPrecisionPolicy | None = None) -> None:
    """Makes any model whose experts are spread over ranks ready for ``fully_shard``. A collective.

    Call it after ``epmoe.shard_experts`` and before ``fully_shard``, which then leaves experts alone; without it,
    training stops at the first forward pass. FSDP alone would cut and gather experts as though all ranks had the same
    ones. Afterwards their first axis is cut over the ranks that hold the same ones, and their gradients are divided by
    the size of the world, which is what FSDP does with all others.

    Args:
        model: Any.
        mesh: The one ``shard_experts`` was given.
        mp_policy: Of the experts; give ``fully_shard`` the same one for the rest.

    Raises:
        ValueError: A layer does not hold this rank's share of the experts, or they are modules, shared with another
            layer, or cut already; or something else reduces their gradients.
    """
    layers = spread_layers(model, mesh)
    _refuse_uncuttable(layers)
    take_over(model, "fsdp")
    for _, layer in layers:
        experts = _cut(layer.experts, mesh.device_mesh["edp"], mp_policy or MixedPrecisionPolicy())
        # Not by a divide factor: torch 2.13 applies one twice where no rank holds the same experts and gradients are
        # neither float32 nor bfloat16.
        experts.set_all_reduce_hook(lambda total: total.div_(mesh.world_size))  # type: ignore[arg-type]


def _refuse_uncuttable(layers: list[tuple[str, MoELayer]]) -> None:
    owners: dict[int, str] = {}
    for name, layer in layers:
        path = f"{name}.experts".removeprefix(".")
        if not isinstance(layer.experts, FFNExperts):
            raise ValueError(_only_stacked(path, layer.experts))
        if isinstance(layer.experts.w_in, DTensor):
            raise ValueError(
                f"fully_shard has cut {path} already; call epmoe.parallel.fsdp.prepare(model, mesh) once, and before "
                f"fully_shard(model)"
            )
        for parameter in layer.experts.parameters():
            if (first := owners.setdefault(id(parameter), path)) != path:
                raise ValueError(
                    f"{path} shares a parameter with {first}, and FSDP cuts the two apart; use Gradients or "
                    f"DistributedDataParallel, or experts of their own"
                )


def _only_stacked(name: str, experts: nn.Module) -> str:
    return (
        f"{name} is a {type(experts).__name__}; FSDP cuts stacked experts (FFNExperts) only, modules of your own train "
        f"with Gradients or under DDP (engine native)"
    )


@torch.no_grad()
def rows_here(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain tensor with the same memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    local: Tensor = tensor.to_local()
    return local


def shardings(model: nn.Module, mesh: ExpertMesh) -> dict[str, Sharding]:
    """How the parameters of a model from ``shard_model`` are spread, by name."""
    experts = DeviceMesh.from_group(
        [mesh.ep_group, mesh.edp_group],
        mesh.device_mesh.device_type,
        mesh=mesh.device_mesh.mesh.T.contiguous(),
        mesh_dim_names=("ep", "edp"),
    )
    return {
        name: _expert_sharding(parameter, mesh, experts)
        if is_stacked(name, parameter)
        else _dense_sharding(parameter)
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
    }


def _dense_sharding(parameter: DTensor) -> Sharding:
    over = parameter.device_mesh
    return Sharding(
        mesh=over,
        placements=tuple(parameter.placements),
        shape=tuple(parameter.shape),
        first_row=_first_row(parameter.shape[0], over.size(-1), over.get_local_rank(over.ndim - 1)),
    )


def _expert_sharding(parameter: DTensor, mesh: ExpertMesh, over: DeviceMesh) -> Sharding:
    num_local = parameter.shape[0]
    return Sharding(
        mesh=over,
        placements=(Shard(0), Shard(0)),
        shape=(mesh.ep_size * num_local, *parameter.shape[1:]),
        first_row=mesh.ep_rank * num_local + _first_row(num_local, mesh.edp_size, mesh.edp_rank),
    )


def _first_row(num_rows: int, size: int, rank: int) -> int:
    """Where a rank's rows begin when each takes ceil(num_rows / size), as long as there are some left."""
    return min(rank * -(-num_rows // size), num_rows)


def _world(mesh: ExpertMesh) -> DeviceMesh:
    return DeviceMesh.from_group(mesh.world_group, mesh.device_mesh.device_type, mesh_dim_names=("world",))
