"""Which ranks hold which experts.

rank = edp_rank * ep_size + ep_rank, so neighbours (usually one node) exchange rows:

    6 ranks, ep_size 3, 6 experts      ep_rank 0    1    2
                          edp_rank 0   r0: 01   r1: 23   r2: 45    <- one ep group: together all experts
                          edp_rank 1   r3: 01   r4: 23   r5: 45
                                       ^ one edp group: the same experts, different sequences
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from epmoe.comm.exchange import Exchange
from epmoe.config import ParallelConfig
from epmoe.moe.build import EXCHANGES
from epmoe.parallel.nodes import ranks_of_a_node
from epmoe.process.runtime import Runtime

WIRE_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""``parallel.wire_dtype`` -> what rows travel in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMesh:
    """This rank's place among the ranks that share experts (ep) and those that hold the same ones (edp)."""

    ep_size: int
    edp_size: int
    ep_rank: int
    edp_rank: int
    ep_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup
    world_group: dist.ProcessGroup
    device_mesh: DeviceMesh
    """Axes (edp, ep); wraps expert tensors as DTensors for checkpoints."""
    exchange: Exchange
    """How rows get from rank to rank of the ep group."""
    parallel: ParallelConfig
    """What it was made from."""

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.ep_size * self.edp_size

    @property
    def dp_size(self) -> int:
        """Shares of a batch: as many as ranks, for every rank of both axes has tokens of its own."""
        return self.ep_size * self.edp_size

    @property
    def dp_rank(self) -> int:
        """Which of these shares is this rank's."""
        return self.edp_rank * self.ep_size + self.ep_rank


def build_mesh(runtime: Runtime, ep_size: int, parallel: ParallelConfig | None = None) -> ExpertMesh:
    """The groups of an expert-parallel layout. A collective: every rank calls it, once.

    Args:
        runtime: A started runtime.
        ep_size: Divides the world size; ``config.choose_ep_size`` gives it.
        parallel: Exchange and overlap; None = flat, nothing overlaps.

    Raises:
        ValueError: ``ep_size`` does not divide the number of ranks.
        ConfigError: A hierarchical exchange, and nodes that the ep groups do not fit.
    """
    parallel = parallel or ParallelConfig()
    if ep_size < 1 or runtime.world_size % ep_size:
        valid = ", ".join(str(n) for n in range(1, runtime.world_size + 1) if runtime.world_size % n == 0)
        raise ValueError(
            f"ep_size={ep_size} does not divide {runtime.world_size} ranks; valid values: {valid}"
        )
    edp_size = runtime.world_size // ep_size
    ranks = torch.arange(runtime.world_size, dtype=torch.int).view(edp_size, ep_size)
    edp_rank, ep_rank = divmod(runtime.rank, ep_size)
    ep_group = _group_of(ranks.tolist(), runtime)
    edp_group = _group_of(ranks.T.tolist(), runtime)
    per_node = ranks_of_a_node(parallel, runtime, ep_size) if parallel.exchange == "hierarchical" else ep_size
    nodes = _node_groups(ranks, per_node, runtime) if per_node not in (1, ep_size) else None
    exchange = replace(EXCHANGES[parallel.exchange](ep_group, nodes), wire=WIRE_DTYPES[parallel.wire_dtype])
    device_mesh = DeviceMesh.from_group(
        [edp_group, ep_group], runtime.device.type, mesh=ranks, mesh_dim_names=("edp", "ep")
    )
    return ExpertMesh(
        ep_size=ep_size,
        edp_size=edp_size,
        ep_rank=ep_rank,
        edp_rank=edp_rank,
        ep_group=ep_group,
        edp_group=edp_group,
        world_group=runtime.world_group,
        device_mesh=device_mesh,
        exchange=exchange,
        parallel=parallel,
    )


def _node_groups(
    ranks: torch.Tensor, per_node: int, runtime: Runtime
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Of this rank in its ep group: those on its node, and those with its number on theirs."""
    by_node = ranks.view(ranks.shape[0], -1, per_node)
    node = _group_of(by_node.flatten(0, 1).tolist(), runtime)
    rail = _group_of(by_node.transpose(1, 2).flatten(0, 1).tolist(), runtime)
    return node, rail


def flat_after_all(mesh: ExpertMesh) -> str | None:
    """Why a hierarchical exchange that was asked for is a flat one; None where it is not, or was not."""
    if mesh.parallel.exchange == "flat" or len(mesh.exchange.sizes) > 1:
        return None
    if mesh.ep_size == 1:
        return "which is the same: every rank holds all experts"
    return "which is the same: the ranks that share the experts are all on one node, or each on its own"


def _group_of(partition: list[list[int]], runtime: Runtime) -> dist.ProcessGroup:
    """The group of this rank among disjoint groups; the world itself where that is one of them."""
    if len(partition) == 1:
        return runtime.world_group
    # Without an explicit time-out a subgroup waits 30 minutes, whatever the world's time-out is.
    timeout = timedelta(seconds=runtime.timeout_s)
    group: dist.ProcessGroup | None
    group, _ = dist.new_subgroups_by_enumeration(partition, timeout=timeout)
    if group is None:
        raise AssertionError(f"rank {runtime.rank} is in no group of {partition}")
    return group


def is_expert(name: str) -> bool:
    """Whether a parameter, by its fully qualified name, belongs to one rank's experts."""
    return ".experts." in f".{name}"


def split_expert_id(name: str) -> tuple[str, int | None]:
    """``moe.experts.experts.5.w`` -> (``moe.experts.experts.*.w``, 5): experts that are modules carry their global
    id in the name. A stacked weight, ``moe.experts.w_in``, has none."""
    match = re.search(r"\.experts\.(\d+)\.", f".{name}")
    if match is None:
        return name, None
    start, end = match.span(1)
    return f"{name[: start - 1]}*{name[end - 1 :]}", int(match.group(1))


def is_stacked(name: str, tensor: Tensor) -> bool:
    """Whether dim 0 of a tensor counts this rank's experts."""
    return is_expert(name) and tensor.ndim > 0 and split_expert_id(name)[1] is None
