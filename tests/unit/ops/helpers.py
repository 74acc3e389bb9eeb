"""What the tests of the registered operators share: the call, small valid arguments, other layouts in memory."""

from __future__ import annotations

import pytest
import torch

from epmoe.ops import ffn, kernel_status, reference
from epmoe.ops.calls import ops
from tests.unit.ops.twins import WIDE, randn

KERNELS, REASON = kernel_status()
needs_native = pytest.mark.skipif(KERNELS != "native", reason=f"no native kernels: {REASON}")
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded", "negated")


def call(name, *args):
    """The registered operator, below autograd."""
    with torch.no_grad():
        return getattr(ops, name)(*args)


def laid_out(tensor, layout):
    """The same numbers elsewhere in memory; ``expanded`` repeats the first of them."""
    if layout == "transposed" and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    if layout == "strided" and tensor.dim() > 0:
        return torch.stack((tensor, torch.empty_like(tensor)), dim=-1)[..., 0]
    if layout == "offset" and tensor.dim() > 0:
        return torch.cat((torch.empty_like(tensor), tensor))[tensor.shape[0] :]
    if layout == "expanded" and tensor.numel() > 0:
        return tensor.flatten()[0].expand(tensor.shape)
    if layout == "negated" and tensor.dtype in WIDE:
        return torch.complex(tensor, -tensor).conj().imag  # its memory holds the negative
    if layout == "negated" and tensor.dtype == torch.bool:
        return (tensor.to(torch.uint8) * 254).view(torch.bool)  # any byte but 0 is true
    return tensor.clone()


def plain(name):
    """The operator's meaning in PyTorch."""
    return getattr(ffn if name.startswith("expert_ffn") else reference, name)


def small(name):
    """Small valid arguments of an operator, by name: 4 tokens or rows, 3 experts."""
    flag, number = torch.ones(4, dtype=torch.bool), torch.arange(4)
    counts = torch.tensor([3, 1])
    return {
        "route_topk": {
            "logits": randn(0, 4, 3),
            "valid": flag,
            "uniform": None,
            "sample": number,
            "position": number,
            "top_k": 2,
            "normalize": True,
            "second_policy": "random",
            "tau": 0.5,
            "seed": 0,
            "layer": 0,
        },
        "route_topk_backward": {
            "d_probs": randn(1, 4, 3),
            "d_weights": randn(2, 4, 2),
            "probs": randn(3, 4, 3).softmax(-1),
            "topk_ids": torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1]]),
            "active": torch.ones(4, 2, dtype=torch.bool),
            "normalize": True,
        },
        "assign_slots": {
            "expert": number,
            "group": number % 2,
            "active": flag,
            "num_groups": 2,
            "num_experts": 4,
            "capacity": 1,
        },
        "permute": {"x": randn(5, 5, 3), "token": number},
        "uniform": {
            "sample": number,
            "position": number,
            "seed": 0,
            "stream": 1,
            "layer": 0,
            "num_lanes": 6,
            "first_lane": 4,
        },
        "activate": {"hidden": randn(6, 4, 6), "weight": randn(7, 4), "kind": "swiglu"},
        "activate_backward": {
            "d_act": randn(8, 4, 3),
            "hidden": randn(6, 4, 6),
            "weight": randn(7, 4),
            "kind": "swiglu",
        },
        "expert_ffn": {
            "rows": randn(6, 4, 3),
            "weight": randn(7, 4),
            "w_in": randn(8, 2, 3, 10),
            "w_out": randn(9, 2, 5, 3),
            "tokens_per_expert": counts,
            "rows_per_expert": None,
            "activation": "swiglu",
        },
        "expert_ffn_backward": {
            "d_y": randn(10, 4, 3),
            "rows": randn(6, 4, 3),
            "weight": randn(7, 4),
            "w_in": randn(8, 2, 3, 10),
            "w_out": randn(9, 2, 5, 3),
            "tokens_per_expert": counts,
            "rows_per_expert": None,
            "hidden": randn(11, 4, 10),
            "activation": "swiglu",
            "needs_rows": True,
            "needs_w_in": True,
            "needs_w_out": True,
        },
        "combine": {"rows": randn(6, 4, 3), "weight": randn(7, 4), "token": number, "num_tokens": 4},
        "combine_backward": {
            "d_y": randn(8, 4, 3),
            "rows": randn(6, 4, 3),
            "weight": randn(7, 4),
            "token": number,
        },
    }[name]


def as_tuple(output):
    return output if isinstance(output, tuple) else (output,)
