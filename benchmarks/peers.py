"""Other people's MoE layers as contenders, with the benchmark's weights. Each raises where it cannot take part."""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from layers import ACTIVATIONS, Contender, LayerShape, Weights, grad, leaf, route
from torch import Tensor, nn

DROP_FACTOR = 1.25
"""Capacity factor of DeepSpeed's layer where it drops."""
MOST_COPIED = 4 * 2**30
"""Bytes; an implementation of Mixtral's experts that copies more than this per pass is not tried."""


class Unsupported(Exception):
    """A peer that cannot compute what is asked for."""


class _FFN(nn.Module):
    """One expert as DeepSpeed takes it: a module over rows."""

    def __init__(self, w_in_DX: Tensor, w_out_FD: Tensor, activation: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.first = nn.Linear(w_in_DX.shape[0], w_in_DX.shape[1], bias=False)
        self.second = nn.Linear(w_out_FD.shape[0], w_out_FD.shape[1], bias=False)
        self.first.weight = nn.Parameter(w_in_DX.t().contiguous())
        self.second.weight = nn.Parameter(w_out_FD.t().contiguous())

    def forward(self, rows_RD: Tensor) -> Tensor:
        """Rows through the expert."""
        out: Tensor = self.second(self.act(self.first(rows_RD)))
        return out


def deepspeed_layer(shape: LayerShape, weights: Weights, *, drop: bool) -> Contender:
    """``deepspeed.moe.layer.MoE`` on one rank; its second expert is not sampled, so that routing is the same.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    if not weights.x_TD.is_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        from deepspeed.moe.layer import MoE

        layer = MoE(
            shape.d_model,
            _FFN(weights.w_in_EDX[0], weights.w_out_EFD[0], shape.activation),
            num_experts=shape.num_experts,
            k=shape.top_k,
            capacity_factor=DROP_FACTOR,
            drop_tokens=drop,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        ).to(weights.x_TD.device)
    layer.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(
        _FFN(w_in, w_out, shape.activation)
        for w_in, w_out in zip(weights.w_in_EDX, weights.w_out_EFD, strict=True)
    )
    experts: Any = layer.deepspeed_moe.experts.deepspeed_experts
    gate = layer.deepspeed_moe.gate.wg
    gate.weight = nn.Parameter(weights.router_ED.clone())

    def forward(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        y_BSD, loss, _ = layer(x_TD.unsqueeze(0))
        return y_BSD.squeeze(0), loss * 0.01

    return Contender(
        name="DeepSpeed, drops" if drop else "DeepSpeed",
        x=leaf(weights.x_TD),
        d_y=weights.d_y_TD,
        forward=forward,
        parameters=tuple(layer.parameters()),
        gradients=lambda: {
            "router": grad(gate.weight),
            "w_in": torch.stack([grad(expert.first.weight).t() for expert in experts]),
            "w_out": torch.stack([grad(expert.second.weight).t() for expert in experts]),
        },
        drops=drop,
    )


def mixtral_block(shape: LayerShape, weights: Weights) -> Contender:
    """Hugging Face's ``MixtralSparseMoeBlock`` with whichever of its expert implementations is fastest here.

    Raises:
        ImportError: transformers is not installed.
        Unsupported: The activation is not gated.
    """
    if shape.activation != "swiglu":
        raise Unsupported("Mixtral's experts are gated: there is no gelu form of them")
    with _quiet():
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
        router_jitter_noise=0.0,
    )
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight = nn.Parameter(weights.router_ED.clone())
    block.experts.gate_up_proj = nn.Parameter(weights.w_in_EDX.transpose(1, 2).contiguous())
    block.experts.down_proj = nn.Parameter(weights.w_out_EFD.transpose(1, 2).contiguous())
    contender = Contender(
        name="HF Mixtral",
        x=leaf(weights.x_TD),
        d_y=weights.d_y_TD,
        forward=lambda x_TD: (block(x_TD.unsqueeze(0)).squeeze(0), None),
        parameters=tuple(block.parameters()),
        gradients=lambda: {
            "router": grad(block.gate.weight),
            "w_in": grad(block.experts.gate_up_proj).transpose(1, 2),
            "w_out": grad(block.experts.down_proj).transpose(1, 2),
        },
    )
    mode = _fastest_mode(contender, block.experts, shape, weights)
    return replace(contender, name=f"HF Mixtral, {mode}")


def _fastest_mode(contender: Contender, experts: Any, shape: LayerShape, weights: Weights) -> str:
    """Tries the implementations that can be tried: two of them copy too much at some sizes to be the fastest."""
    weight_bytes = weights.w_in_EDX.nbytes + weights.w_out_EFD.nbytes
    copied = {  # bytes written besides the layer's own work
        "grouped_mm": 0,
        "eager": shape.num_experts
        * weight_bytes,  # the backward of indexing an expert's weights, once per expert
        "batched_mm": shape.num_tokens
        * shape.top_k
        * weight_bytes
        // shape.num_experts,  # weights per assignment
    }
    seconds: dict[str, float] = {}
    for mode, num_bytes in copied.items():
        if num_bytes <= MOST_COPIED:
            experts.config._experts_implementation = mode
            seconds[mode] = statistics.median(_wall(contender, weights.x_TD.device) for _ in range(3))
    best = min(seconds, key=lambda mode: seconds[mode])
    experts.config._experts_implementation = best
    return best


def _wall(contender: Contender, device: torch.device) -> float:
    begin = time.perf_counter()
    contender.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def scattermoe_mlp(shape: LayerShape, weights: Weights) -> Contender:
    """ScatterMoE's gated MLP (Triton, CUDA only) behind a plain top-k router.

    Raises:
        ImportError: ScatterMoE is not installed.
        Unsupported: On a CPU.
    """
    if not weights.x_TD.is_cuda:
        raise Unsupported("Triton kernels for CUDA")
    from scattermoe.mlp import GLUMLP, MLP

    gated = shape.activation == "swiglu"
    mlp = (GLUMLP if gated else MLP)(
        shape.d_model,
        shape.d_ff,
        shape.num_experts,
        shape.top_k,
        activation=F.silu if gated else F.gelu,
    )
    w_in_EXD = weights.w_in_EDX.transpose(1, 2)
    if gated:  # its first half is the up projection
        w_in_EXD = torch.cat(w_in_EXD.chunk(2, dim=1)[::-1], dim=1)
    mlp.experts.weight = nn.Parameter(w_in_EXD.contiguous())
    mlp.output_experts.weight = nn.Parameter(weights.w_out_EFD.transpose(1, 2).contiguous())
    mlp.to(weights.x_TD.device)
    router = leaf(weights.router_ED)

    def forward(x_TD: Tensor) -> tuple[Tensor, None]:
        weight_TK, id_TK = route(x_TD, router, shape.top_k)
        return mlp(x_TD, weight_TK.to(x_TD.dtype), id_TK), None

    def gradients() -> dict[str, Tensor]:
        d_w_in_EXD = grad(mlp.experts.weight)
        if gated:
            d_w_in_EXD = torch.cat(d_w_in_EXD.chunk(2, dim=1)[::-1], dim=1)
        return {
            "router": grad(router),
            "w_in": d_w_in_EXD.transpose(1, 2),
            "w_out": grad(mlp.output_experts.weight).transpose(1, 2),
        }

    return Contender(
        name="ScatterMoE",
        x=leaf(weights.x_TD),
        d_y=weights.d_y_TD,
        forward=forward,
        parameters=(router, *mlp.parameters()),
        gradients=gradients,
    )


def sonicmoe_layer(shape: LayerShape, weights: Weights) -> Contender:
    """SonicMoE's layer (Hopper or newer) with its own router, whose gate and up rows are interleaved.

    Raises:
        ImportError: SonicMoE is not installed.
        Unsupported: On a CPU.
    """
    if not weights.x_TD.is_cuda:
        raise Unsupported("CuTe kernels for Hopper or newer GPUs")
    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    gated = shape.activation == "swiglu"
    layer = MoE(
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        activation_function=ActivationType.SWIGLU if gated else ActivationType.GELU,
        add_bias=False,
        std=0.02,
    ).to(weights.x_TD.device, shape.dtype)
    w_in_EXD = weights.w_in_EDX.transpose(1, 2)
    if gated:
        w_in_EXD = torch.stack(w_in_EXD.chunk(2, dim=1), dim=2).flatten(1, 2)
    layer.router.weight = nn.Parameter(weights.router_ED.clone())
    layer.c_fc.weight = nn.Parameter(w_in_EXD.contiguous())
    layer.c_proj.weight = nn.Parameter(weights.w_out_EFD.transpose(1, 2).contiguous())

    def gradients() -> dict[str, Tensor]:
        d_w_in_EXD = grad(layer.c_fc.weight)
        if gated:
            d_w_in_EXD = torch.cat((d_w_in_EXD[:, ::2], d_w_in_EXD[:, 1::2]), dim=1)
        return {
            "router": grad(layer.router.weight),
            "w_in": d_w_in_EXD.transpose(1, 2),
            "w_out": grad(layer.c_proj.weight).transpose(1, 2),
        }

    def forward(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        y_TD, loss = layer(x_TD)
        return y_TD, loss * 0.01

    return Contender(
        name="SonicMoE",
        x=leaf(weights.x_TD),
        d_y=weights.d_y_TD,
        forward=forward,
        parameters=tuple(layer.parameters()),
        gradients=gradients,
    )


PEERS: dict[str, Callable[[LayerShape, Weights], Contender]] = {
    "DeepSpeed": lambda shape, weights: deepspeed_layer(shape, weights, drop=False),
    "DeepSpeed, drops": lambda shape, weights: deepspeed_layer(shape, weights, drop=True),
    "HF Mixtral": mixtral_block,
    "ScatterMoE": scattermoe_mlp,
    "SonicMoE": sonicmoe_layer,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what peers print when they are imported off stdout."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
