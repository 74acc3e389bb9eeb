"""Initial weights: the same bits in every layout, on every device and in every order of construction."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from epmoe.config import ModelConfig
from epmoe.errors import EpmoeError
from epmoe.moe.experts import FFNExperts
from epmoe.moe.router import Router

_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "experts.w_out")
"""Ends of the names of matrices whose result is added to the residual stream."""

FloatArray = npt.NDArray[np.float32]


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Sets every parameter of a decoder, following ``ModelConfig.init``; norm weights become 1. Tensors of a router
    whose family has a law of its own, buffers among them, follow that.

    A matrix is drawn in float32 on the CPU from a generator of its own, keyed by the seed and the parameter's
    name, then rounded to the parameter's dtype and sent to its device. Stacked experts are drawn one by one, with
    the expert's global id in the key, so a rank that holds four of them draws only those four.

    ``normal``: N(0, init_std), residual outputs divided by sqrt(2 num_layers) (GPT-2). ``truncated_fan_in``:
    standard deviation sqrt(0.1 / fan_in) before values beyond two of them are drawn again (Switch,
    arXiv:2101.03961). ``kaiming``: N(0, 2 / fan_in) (arXiv:1502.01852). The embedding's fan-in is D, as if it
    were the head.

    Args:
        model: A ``Decoder``, as it was built or with fewer local experts, but not wrapped: names are keys.
        seed: Any integer.

    Raises:
        EpmoeError: If a parameter has no memory yet.
    """
    config: object = model.config
    if not isinstance(config, ModelConfig):
        raise TypeError(f"init_weights needs a Decoder, got {type(model).__name__}")
    for path, module in model.named_modules():
        init_module(config, path, module, seed)


@torch.no_grad()
def init_module(config: ModelConfig, path: str, module: nn.Module, seed: int) -> None:
    """``init_weights`` for the tensors of one module of a decoder, not those of its children.

    Args:
        config: The decoder's.
        path: The module's name in the decoder.
        module: With memory.
        seed: As there.
    """
    laws = module.initial_laws() if isinstance(module, Router) else {}
    buffers = module.named_buffers(recurse=False) if isinstance(module, Router) else ()
    for leaf, parameter in (*module.named_parameters(recurse=False), *buffers):
        name = f"{path}.{leaf}"
        if parameter.is_meta:
            raise EpmoeError(
                f"parameter {name} has a shape but no memory",
                why="the model was built on the meta device",
                fix="call model.to_empty(device=...) before init_weights",
            )
        if leaf in laws:
            values = laws[leaf](_generator(f"{seed}/{name}"), tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        elif isinstance(module, FFNExperts):
            for i in range(module.num_local):
                key = f"{seed}/{name}/{module.first_expert + i}"
                parameter[i].copy_(torch.from_numpy(_draw(config, name, key, tuple(parameter.shape[1:]))))
        else:
            parameter.copy_(torch.from_numpy(_draw(config, name, f"{seed}/{name}", tuple(parameter.shape))))


def _draw(config: ModelConfig, name: str, key: str, shape: tuple[int, ...]) -> FloatArray:
    """One matrix of the configured law."""
    rng = _generator(key)
    values = rng.standard_normal(shape, dtype=np.float32)
    if config.init == "truncated_fan_in":
        while (far := np.abs(values) > 2).any():
            values[far] = rng.standard_normal(int(far.sum()), dtype=np.float32)
    values *= np.float32(_std(config, name, _fan_in(name, shape)))
    return values


def _generator(key: str) -> np.random.Generator:
    # numpy's generator takes the whole digest and fills arrays the same way on every CPU; torch's would keep only
    # 32 bits of a seed, so that two of a large model's many expert matrices could well start out equal.
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.PCG64DXSM(int.from_bytes(digest, "little")))


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    """Inputs of a matrix: experts are stored [in, out], everything else [out, in]."""
    return shape[0] if name.endswith(("experts.w_in", "experts.w_out")) else shape[1]


def _std(config: ModelConfig, name: str, fan_in: int) -> float:
    """Standard deviation of a matrix, before truncation."""
    if config.init == "truncated_fan_in":
        return math.sqrt(0.1 / fan_in)
    if config.init == "kaiming":
        return math.sqrt(2 / fan_in)
    return config.init_std / (math.sqrt(2 * config.num_layers) if name.endswith(_RESIDUAL_OUTPUTS) else 1.0)
