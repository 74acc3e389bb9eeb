"""What DeepSpeed must know about experts that are spread over ranks, and how it is loaded.

DeepSpeed reduces a parameter over fewer ranks when two things are true: the parameter says so (``allreduce`` and
``group_name``), and the model has a module of DeepSpeed's own MoE class, which names the groups. epmoe's layers are not
of that class, so a module that computes nothing stands in for it: the marker. See
docs/adr/0002-deepspeed-sees-our-experts-through-a-marker.md.

DeepSpeed is optional and slow to import: only functions here import it, on first use.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

from torch import nn

from epmoe import env
from epmoe.errors import ConfigError
from epmoe.moe.layer import MoELayer
from epmoe.parallel.layers import expert_parameters, spread_layers, take_over
from epmoe.parallel.mesh import ExpertMesh

OLDEST = (0, 19, 8)
"""Earlier versions keep their groups and gradient partitions elsewhere."""
MARKER = "deepspeed_marker"
"""Name of the marker among a model's modules. It has no tensors, so no checkpoint knows it."""


def load_deepspeed(device_type: str) -> Any:
    """The module ``deepspeed``, quiet, for ``cpu`` or ``cuda``.

    Raises:
        ConfigError: It is not installed, too old, or cannot be imported.
    """
    env.prepare_deepspeed(device_type)
    try:
        import deepspeed
        import deepspeed.ops
    except Exception as error:
        # Not only ImportError: DeepSpeed looks for compilers and drivers while it is imported.
        raise ConfigError(
            "parallel.engine=deepspeed, but deepspeed cannot be imported",
            why=f"{type(error).__name__}: {error}",
            fix="pip install --no-build-isolation 'epmoe[deepspeed]', or parallel.engine=native or fsdp",
        ) from error
    if tuple(int(number) for number in re.findall(r"\d+", deepspeed.__version__)[:3]) < OLDEST:
        raise ConfigError(
            f"parallel.engine=deepspeed needs version {'.'.join(map(str, OLDEST))}, not {deepspeed.__version__}",
            fix="pip install --no-build-isolation --upgrade deepspeed",
        )
    # The operators DeepSpeed may compile. Left alone it tries compilers out, and on a CPU builds one when it starts,
    # for collectives of inference that nobody calls here.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.all_gather_into_tensor` is deprecated")
    return deepspeed


def group_name(mesh: ExpertMesh) -> str:
    """What DeepSpeed calls the groups of a layout."""
    return f"ep_size_{mesh.ep_size}"


def prepare(model: nn.Module, mesh: ExpertMesh) -> None:
    """Makes a model whose experts are spread over ranks ready for ``deepspeed.initialize``, at ZeRO 0, 1 or 2.

    Call it after ``epmoe.shard_experts`` and before ``deepspeed.initialize``, which refuses the model otherwise. Expert
    gradients are then reduced over the ranks that hold the same experts, everything else over all ranks, in groups that
    exist already. A model without MoE layers is left as it is.

    Args:
        model: Gets a module without tensors, the marker.
        mesh: The one ``shard_experts`` was given.

    Raises:
        ConfigError: DeepSpeed is not installed.
        ValueError: A layer does not hold this rank's share of the experts.
    """
    layers = spread_layers(model, mesh)
    for _, layer in layers:
        mark_experts(layer, mesh)
    take_over(model, "deepspeed")
    load_deepspeed(mesh.device_mesh.device_type)
    _adopt_groups(mesh)
    # DeepSpeed wants the groups where experts are trained, and fails on a model that names some and trains none.
    if any(parameter.requires_grad for parameter in expert_parameters(model).values()):
        model.add_module(MARKER, _marker(layers[0][1].moe.num_experts, mesh))


def mark_experts(layer: MoELayer, mesh: ExpertMesh) -> None:
    """Has a layer's expert parameters say that they are not the same on all ranks, in the words DeepSpeed reads.

    With these words and without ``prepare``, ``deepspeed.initialize`` stops; without them it would give every rank the
    experts of rank 0 and add gradients of different experts up.
    """
    for parameter in layer.experts.parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = group_name(mesh)  # type: ignore[attr-defined]


def _adopt_groups(mesh: ExpertMesh) -> None:
    """Puts the groups of a mesh where DeepSpeed looks for its own, which it then does not make."""
    from deepspeed.utils import groups

    name, edp_size, ep_size = group_name(mesh), mesh.edp_size, mesh.ep_size
    groups._WORLD_GROUP = mesh.world_group
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep_group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = [mesh.edp_rank * ep_size + i for i in range(ep_size)]
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp_group
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = [i * ep_size + mesh.ep_rank for i in range(edp_size)]


def _marker(num_experts: int, mesh: ExpertMesh) -> nn.Module:
    """A module of DeepSpeed's MoE class without parameters, that is never called."""
    from deepspeed.moe.layer import MoE

    class Marker(MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)  # MoE's own would make a router and experts
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Called by DeepSpeed's engine before it asks for groups."""
            _adopt_groups(mesh)

    return Marker()
