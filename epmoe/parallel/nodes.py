"""Which ranks share a node."""

from __future__ import annotations

from epmoe import env
from epmoe.config import ParallelConfig, choose_node_size
from epmoe.errors import ConfigError
from epmoe.process.runtime import Runtime, gather_text

FLAT = "or parallel.exchange: flat"


def ranks_of_a_node(parallel: ParallelConfig, runtime: Runtime, ep_size: int) -> int:
    """Ranks of an ep group that share a node: ``ep_size`` where a group lies inside one. A collective.

    Raises:
        ConfigError: On all ranks. The nodes differ in size, ranks are not numbered node by node, or the ep groups do
            not fit the nodes.
    """
    # The number on the node is only looked at where the launcher is to be believed.
    told = [line.split() for line in gather_text(f"{env.local_world_size()} {env.local_rank()}")]
    size = parallel.ranks_per_node
    if size == "auto":
        sizes = [int(local_size) for local_size, _ in told]
        size = sizes[0]
        if len(set(sizes)) > 1:
            raise ConfigError(
                f"parallel.exchange: hierarchical, but the nodes have between {min(sizes)} and {max(sizes)} ranks",
                why="every step of the exchange is between ranks of equal number on their nodes",
                fix=f"as many ranks on each node, {FLAT}",
            )
        astray = [rank for rank, (_, local) in enumerate(told) if int(local) != rank % size]
        if astray:
            raise ConfigError(
                f"ranks are not numbered node by node: rank {astray[0]} is number {told[astray[0]][1]} on its node, "
                f"and with {size} ranks on each it should be {astray[0] % size}",
                fix=f"block distribution of tasks (srun -m block), parallel.ranks_per_node: 1, {FLAT}",
            )
    try:
        return choose_node_size(size, runtime.world_size, ep_size)
    except ValueError as error:
        raise ConfigError(f"parallel.{error}", fix=FLAT.removeprefix("or ")) from None
