"""The user's configuration as one whose gradients can be compared in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from epmoe.config import Config, MoEConfig
from epmoe.config_routers import TaskOptions
from epmoe.errors import ConfigError

Scale = Literal["small", "as_is"]
MANY_EXPERTS = 16
"""More than this many are made fewer."""
SMALL_MODEL = {"d_model": 16, "num_layers": 2, "num_heads": 2, "head_dim": None, "d_ff": 24, "init": "normal",
               "init_std": 0.2}  # fmt: skip
"""Weights are drawn wide, so that routers decide clearly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is verified."""

    config: Config
    """Scaled, trained by SGD with an active clip; one process, native engine."""
    vocab_size: int
    """Padded."""
    world_size: int
    """Ranks at hand."""
    changes: tuple[str, ...]
    """What differs from the user's configuration, in words."""
    engine: str = "native"
    """The user's."""
    no_deepspeed: str | None = "nobody has tried to import it"
    """Why engine deepspeed cannot run; None: it can."""

    @property
    def num_experts(self) -> int:
        """Experts over all ranks; 1 for a dense model."""
        return self.config.moe.num_experts if self.config.moe else 1

    @property
    def num_tasks(self) -> int:
        """Tasks a router of tasks knows; else 1."""
        router = self.config.moe.router if self.config.moe else None
        return router.num_tasks if isinstance(router, TaskOptions) else 1


def make_subject(config: Config, world_size: int, scale: Scale, *, ranks_per_node: int) -> Subject:
    """The configuration to verify.

    Args:
        config: The user's.
        world_size: Ranks at hand,
        ranks_per_node: and on each node, which may be pretended ones; for hierarchical exchanges.
        scale: ``small``: a model of a few thousand weights; ``as_is``: the user's own.

    Raises:
        ConfigError: It cannot be made smaller.
    """
    changes = [
        "trained by plain SGD with an active clip, because Adam divides a wrong scale of the gradient away",
        "made-up tokens; float64 and float32 whatever train.precision says",
    ]
    tree = config.model_dump()
    tree["optimizer"] |= {
        "name": "sgd",
        "lr": 1.0,
        "clip_norm": 0.05,
        "warmup_steps": 0,
        "schedule": "constant",
    }
    if config.parallel.ranks_per_node == "auto":
        tree["parallel"]["ranks_per_node"] = ranks_per_node
        changes.append(
            f"nodes of {ranks_per_node} ranks for hierarchical exchanges (parallel.ranks_per_node)"
        )
    if config.parallel.wire_dtype is not None:
        tree["parallel"]["wire_dtype"] = None
        changes.append("rows travel in the dtype of the layer: parallel.wire_dtype rounds, which is no error")
    tree["parallel"] |= {"engine": "native", "fsdp_shard": "full", "zero_stage": 1}
    tree["model"] |= {"attention": "auto", "norm": "torch"}
    tree["train"] |= {"steps": 1000, "global_batch_size": max(8, 2 * world_size), "micro_batch_size": None,
                      "nonfinite": "stop"}  # fmt: skip
    if scale == "as_is":
        multiple = config.data.vocab_multiple
        vocab_size = -(-config.data.vocab_size // multiple) * multiple
        small = _validated(tree)
    else:
        vocab_size = 64
        small = _small(config, tree, world_size)
        changes.append(_describe(config, small, vocab_size))
    return Subject(
        config=small,
        vocab_size=vocab_size,
        world_size=world_size,
        changes=tuple(changes),
        engine=config.parallel.engine,
    )


def _small(config: Config, tree: dict[str, Any], world_size: int) -> Config:
    grouped = config.model.kv_heads < config.model.num_heads
    tree["model"] |= {**SMALL_MODEL, "num_kv_heads": 1 if grouped else None}
    tree["data"] |= {"seq_len": 16}
    if config.moe is None:
        return _validated(tree)
    moe = config.moe
    tree["moe"] |= {"d_ff": 24, "every": min(moe.every, 2), "first_dense": min(moe.first_dense, 1)}
    failure: ConfigError | None = None
    for num_experts in _fewer_experts(moe, world_size):
        tree["moe"]["num_experts"] = num_experts
        if moe.router.every_expert:
            tree["moe"]["top_k"] = num_experts
        try:
            return _validated(tree)
        except ConfigError as error:
            failure = error
    raise failure or AssertionError("a number of experts was tried")


def _fewer_experts(moe: MoEConfig, world_size: int) -> Iterator[int]:
    """From few to all: divisors that keep every layout."""
    if moe.num_experts > MANY_EXPERTS:
        keep = math.gcd(moe.num_experts, world_size)
        for number in range(8, moe.num_experts):
            if moe.num_experts % number == 0 and number % keep == 0 and (number > moe.top_k):
                yield number
    yield moe.num_experts


def _validated(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            "the configuration cannot be scaled down",
            why=str(error),
            fix="--scale as_is verifies it as it is",
        ) from None


def _describe(config: Config, small: Config, vocab_size: int) -> str:
    was, now = config.model, small.model
    text = f"{now.num_layers} of {was.num_layers} layers, width {now.d_model} of {was.d_model}, {vocab_size} tokens"
    text += f" in the vocabulary, sequences of {small.data.seq_len} of {config.data.seq_len}"
    if config.moe is not None and small.moe is not None:
        text += f", {small.moe.num_experts} of {config.moe.num_experts} experts of width {small.moe.d_ff}"
    return text + "; wide initial weights (--scale as_is keeps all of this)"
