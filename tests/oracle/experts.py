"""Feed-forward experts, one row at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def silu(z: Tensor) -> Tensor:
    """z * sigmoid(z)."""
    return z / (1.0 + torch.exp(-z))


def gelu(z: Tensor) -> Tensor:
    """z * Phi(z), the exact form."""
    return z * 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))


def relu(z: Tensor) -> Tensor:
    """The positive part."""
    return torch.where(z > 0, z, torch.zeros_like(z))


def ffn(x_D: Tensor, w_in: Tensor, w_out_FD: Tensor, activation: str) -> Tensor:
    """One token through one expert. swiglu: the first F columns of ``w_in`` are the gate, the others the value."""
    hidden = torch.stack([(x_D * column).sum() for column in w_in.unbind(1)])
    if activation == "swiglu":
        width = w_out_FD.shape[0]
        inner = [silu(hidden[f]) * hidden[width + f] for f in range(width)]
    else:
        inner = list({"gelu": gelu, "relu": relu}[activation](hidden).unbind())
    y_D = torch.zeros_like(x_D)
    for value, row in zip(inner, w_out_FD.unbind(), strict=True):
        y_D = y_D + value * row
    return y_D
