"""From a configuration to a model on this rank."""

from __future__ import annotations

import torch

from epmoe.config import Config
from epmoe.models.decoder import Decoder
from epmoe.models.init import init_weights
from epmoe.moe.router import Router
from epmoe.parallel.mesh import ExpertMesh
from epmoe.parallel.parallelize import shard_experts

PARAMETER_DTYPE = {
    "fp32": torch.float32,
    "bf16_autocast": torch.float32,
    "bf16_params": torch.bfloat16,
    "fp64": torch.float64,
}
"""Dtype of the parameters for each ``train.precision``; routers keep at least float32."""


def build_model(
    config: Config,
    vocab_size: int,
    *,
    device: torch.device,
    mesh: ExpertMesh | None = None,
    init: bool = True,
) -> Decoder:
    """The decoder with this rank's experts, in the configured precision.

    Only this rank's parameters ever exist: the model is built without memory, reduced to the local experts, and
    only then allocated. Weights depend on the seed and on global expert numbers, not on the layout.

    Args:
        vocab_size: Padded vocabulary, V.
        mesh: The ranks that share the experts; None = this process holds them all.
        init: False leaves the weights unset, for a checkpoint to fill.
    """
    dtype = PARAMETER_DTYPE[config.train.precision]
    with torch.device("meta"):
        model = Decoder(
            config.model,
            config.moe,
            vocab_size=vocab_size,
            seed=config.seed,
            cross_document=config.data.cross_document,
        )
        if mesh is not None:
            shard_experts(model, mesh)
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, Router):
            module.to(torch.promote_types(dtype, torch.float32))
    model.to_empty(device=device)
    if init:
        init_weights(model, config.seed)
    return model
