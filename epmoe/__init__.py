"""Expert-parallel pretraining of GShard-style sparse language models.

Importing this package loads nothing heavy: each public name is fetched from its module at first use, so
configuration mistakes and ``--help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epmoe.config import (
        CheckpointConfig,
        Config,
        DataConfig,
        ModelConfig,
        MoEConfig,
        OptimizerConfig,
        ParallelConfig,
        TrainConfig,
    )
    from epmoe.config_file import load_config
    from epmoe.errors import EpmoeError
    from epmoe.models.decoder import Decoder
    from epmoe.moe.build import build_moe_layer
    from epmoe.moe.experts import ModuleExperts
    from epmoe.moe.layer import MoELayer
    from epmoe.parallel.clip import clip_grad_norm_
    from epmoe.parallel.shard_experts import shard_experts
    from epmoe.types import RouterReport, Routing, TokenContext

__version__ = "0.1.0"

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Decoder",
    "EpmoeError",
    "MoEConfig",
    "MoELayer",
    "ModelConfig",
    "ModuleExperts",
    "OptimizerConfig",
    "ParallelConfig",
    "RouterReport",
    "Routing",
    "TokenContext",
    "TrainConfig",
    "__version__",
    "build_moe_layer",
    "clip_grad_norm_",
    "load_config",
    "shard_experts",
]


def _home(name: str) -> str | None:
    """The module a public name lives in."""
    homes = {
        "Decoder": "epmoe.models.decoder",
        "EpmoeError": "epmoe.errors",
        "MoELayer": "epmoe.moe.layer",
        "ModuleExperts": "epmoe.moe.experts",
        "RouterReport": "epmoe.types",
        "Routing": "epmoe.types",
        "TokenContext": "epmoe.types",
        "build_moe_layer": "epmoe.moe.build",
        "clip_grad_norm_": "epmoe.parallel.clip",
        "load_config": "epmoe.config_file",
        "shard_experts": "epmoe.parallel.shard_experts",
    }
    if name in homes:
        return homes[name]
    return "epmoe.config" if name in __all__ and name.endswith("Config") else None


def __getattr__(name: str) -> Any:
    """Fetches a public name from its module (PEP 562)."""
    home = _home(name)
    if home is None:
        raise AttributeError(f"module 'epmoe' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
