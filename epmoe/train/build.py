"""From a configuration to a model on this rank, and the optional kernels it computes with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from epmoe.config import Config, ParameterGroup
from epmoe.engines.deepspeed import DeepSpeedEngine
from epmoe.engines.fsdp import FSDPEngine
from epmoe.engines.native import NativeEngine
from epmoe.engines.optimizer import load_fused_adam
from epmoe.engines.protocol import Engine
from epmoe.errors import ConfigError
from epmoe.models.accelerators import Accelerators, choose_accelerators
from epmoe.models.decoder import Block, Decoder
from epmoe.models.init import init_module, init_weights
from epmoe.moe.router import Router
from epmoe.parallel.deepspeed import load_deepspeed
from epmoe.parallel.fsdp import shard_model
from epmoe.parallel.mesh import ExpertMesh
from epmoe.parallel.shard_experts import shard_experts
from epmoe.process.runtime import gather_text, raise_together
from epmoe.train.step import AUTOCAST_DTYPE
from epmoe.types import compute_dtype

PARAMETER_DTYPE = {
    "fp32": torch.float32,
    "bf16_autocast": torch.float32,
    "bf16_params": torch.bfloat16,
    "fp16_autocast": torch.float32,
    "fp64": torch.float64,
}
"""Dtype of the parameters for each ``train.precision``; routers keep at least float32."""


def find_accelerators(config: Config, device: torch.device) -> Accelerators:
    """The kernels of other packages that the model will compute with on this rank.

    Raises:
        ConfigError: The configuration asks for one that is not available.
    """
    precision = config.train.precision
    return choose_accelerators(
        config.model,
        device=device,
        dtype=AUTOCAST_DTYPE.get(precision, PARAMETER_DTYPE[precision]),
        cross_document=config.data.cross_document,
    )


def agree_on_accelerators(config: Config, device: torch.device) -> Accelerators:
    """``find_accelerators`` and a look for the optimizer's, with one note that speaks for all ranks. A collective.

    Ranks may differ where their GPUs or packages do: each takes the best it has, and the note counts them.

    Raises:
        ConfigError: On every rank, when any of them cannot have what the configuration asks for.
    """
    found, error = Accelerators(), None
    try:
        found = find_accelerators(config, device)
        if config.optimizer.name == "apex_fused_adam":
            load_fused_adam(device, PARAMETER_DTYPE[config.train.precision])
        if config.parallel.engine == "deepspeed":
            load_deepspeed(device.type)
    except ConfigError as caught:
        error = caught
    raise_together(error)
    notes = Counter(gather_text(found.note))
    if len(notes) == 1:
        return found
    return replace(found, note="; ".join(f"{count} rank(s): {note}" for note, count in notes.items()))


def build_model(
    config: Config,
    vocab_size: int,
    *,
    device: torch.device,
    mesh: ExpertMesh | None = None,
    init: bool = True,
    accelerators: Accelerators | None = None,
) -> Decoder:
    """The decoder with this rank's experts, in the configured precision.

    Only this rank's parameters ever exist: the model is built without memory, reduced to the local experts, and
    only then allocated; for the FSDP engine block by block, each cut into shards before the next one. Weights depend
    on the seed and on global expert numbers, not on the layout.

    Args:
        vocab_size: Padded vocabulary, V.
        mesh: The ranks that share the experts; None = this process holds them all.
        init: False leaves the weights unset, for a checkpoint to fill; shards are always drawn.
        accelerators: None = what ``find_accelerators`` finds.

    Raises:
        ConfigError: The configuration asks for a kernel that is not available.
    """
    if accelerators is None:
        accelerators = find_accelerators(config, device)
    dtype = PARAMETER_DTYPE[config.train.precision]
    with torch.device("meta"):
        model = Decoder(
            config.model,
            config.moe,
            vocab_size=vocab_size,
            seed=config.seed,
            cross_document=config.data.cross_document,
            accelerators=accelerators,
        )
        if mesh is not None:
            shard_experts(model, mesh)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.recompute = config.train.recompute
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, Router):
            module.to(torch.promote_types(dtype, torch.float32))
    freeze(model, config.train.freeze)
    if mesh is not None and config.parallel.engine == "fsdp":
        _shard(model, config, mesh, device)
        return model
    model.to_empty(device=device)
    if init:
        init_weights(model, config.seed)
    return model


GROUPS: Mapping[ParameterGroup, tuple[str, ...]] = {
    "embedding": ("embed.*",),
    "head": ("head.*",),
    "attention": ("blocks.*.attention.?_proj.*",),
    "norms": ("norm.*", "blocks.*norm.*"),
    "dense_ffn": ("blocks.*.ffn.*",),
    "router": ("blocks.*.moe.router.*",),
    "experts": ("blocks.*.moe.experts.*",),
    "shared_experts": ("blocks.*.shared.*",),
}
"""Groups of parameters -> the names they have. Every parameter is in one of them."""


def in_groups(name: str, groups: Collection[ParameterGroup]) -> bool:
    """Whether a parameter or buffer of a decoder belongs to one of these."""
    return any(fnmatchcase(name, pattern) for group in groups for pattern in GROUPS[group])


def freeze(model: nn.Module, groups: Collection[ParameterGroup]) -> None:
    """Takes groups of parameters of a decoder out of training."""
    for name, parameter in model.named_parameters():
        if in_groups(name, groups):
            parameter.requires_grad_(False)


def _shard(model: Decoder, config: Config, mesh: ExpertMesh, device: torch.device) -> None:
    """FSDP2: weights are drawn and cut block by block. The shards are at least float32, rounded where the model has
    narrower parameters, which FSDP makes of them when it gathers."""
    dtype = PARAMETER_DTYPE[config.train.precision]

    def materialise(path: str, module: nn.Module) -> None:
        module.to_empty(device=device, recurse=False)
        init_module(config.model, path, module, config.seed)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(compute_dtype(parameter.dtype))

    shard_model(
        model,
        mesh,
        hybrid=config.parallel.fsdp_shard == "hybrid",
        compute_dtype=dtype if dtype != compute_dtype(dtype) else None,
        materialise=materialise,
    )


def build_engine(config: Config, model: Decoder, mesh: ExpertMesh) -> Engine:
    """The engine of ``parallel.engine`` for a model from ``build_model``. A collective."""
    if config.parallel.engine == "fsdp":
        return FSDPEngine(config.optimizer, model, mesh, hybrid=config.parallel.fsdp_shard == "hybrid")
    if config.parallel.engine == "deepspeed":
        return DeepSpeedEngine(config.optimizer, model, mesh, zero_stage=config.parallel.zero_stage)
    return NativeEngine(config.optimizer, model, mesh)
