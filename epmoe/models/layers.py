"""Small parts of the decoder: projections, RMSNorm, the SwiGLU feed-forward layer, keyed dropout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epmoe.errors import EpmoeError
from epmoe.models.accelerators import RMSNormFunction
from epmoe.moe.recompute import Remake, plain
from epmoe.ops import philox
from epmoe.types import TokenContext, compute_dtype


class Linear(nn.Linear):
    """A projection without bias whose weight ``[out, in]`` is left unset: ``init_weights`` draws it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x_X: Tensor, remake: Remake = plain) -> Tensor:
        """x ``[..., in]`` -> ``[..., out]``. Autocast's copy of x in another dtype is a matter for ``remake`` too."""
        device_type = x_X.device.type
        if remake is not plain and torch.is_autocast_enabled(device_type) and x_X.dtype != torch.float64:
            x_X = remake(Tensor.to, x_X, torch.get_autocast_dtype(device_type))
        return super().forward(x_X)

    def reset_parameters(self) -> None:
        """Does nothing, so that building a model neither costs a draw nor moves torch's global generator."""


class Embedding(nn.Embedding):
    """A lookup table ``[V, D]`` that is left unset: ``init_weights`` draws it.

    The gradient of a row is a sum over all tokens that have its id. On a CPU torch adds in the table's own dtype, and a
    bfloat16 stands still after 256 equal contributions; here they are added up in at least float32.
    """

    def forward(self, token_X: Tensor) -> Tensor:
        """Token ids ``[...]`` -> ``[..., D]``."""
        if self.weight.device.type != "cpu" or self.weight.dtype == compute_dtype(self.weight.dtype):
            return super().forward(token_X)
        return _LowPrecisionLookup.apply(self.weight, token_X)  # type: ignore[no-any-return, no-untyped-call]

    def reset_parameters(self) -> None:
        """Does nothing, for the reason given in ``Linear``."""


class _LowPrecisionLookup(torch.autograd.Function):
    """``weight[token]`` with a gradient that is summed in the compute dtype and rounded once."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, token_X: Tensor) -> Tensor:
        ctx.save_for_backward(token_X)
        ctx.num_rows = weight_VD.shape[0]
        return F.embedding(token_X, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        [d_out_XD] = grads
        [token_X] = ctx.saved_tensors
        wide_XD = d_out_XD.to(compute_dtype(d_out_XD.dtype))
        d_weight_VD = torch.ops.aten.embedding_dense_backward(wide_XD, token_X, ctx.num_rows, -1, False)
        return d_weight_VD.to(d_out_XD.dtype), None


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in at least float32. arXiv:1910.07467.

    The result has the dtype of ``x``.

    Args:
        width: D.
        eps: Added to the mean square.
        function: Another package's kernel for the same; None = PyTorch's.
    """

    def __init__(self, width: int, eps: float, function: RMSNormFunction | None = None) -> None:
        super().__init__()
        self.eps, self.function = eps, function
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_D: Tensor) -> Tensor:
        """x ``[..., D]`` -> ``[..., D]``."""
        if self.function is not None:
            return self.function(x_D, self.weight, self.eps)
        dtype = compute_dtype(x_D.dtype)
        return F.rms_norm(x_D.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x_D.dtype)

    def extra_repr(self) -> str:
        """Width and eps, for ``print(model)``."""
        return f"{self.weight.numel()}, eps={self.eps}"


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, the dense feed-forward layer. arXiv:2002.05202."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x_BSD: Tensor, remake: Remake = plain) -> Tensor:
        """x ``[B, S, D]`` -> ``[B, S, D]``; ``remake`` computes what need not be kept."""
        hidden_BSF = remake(_gated, self.gate_proj(x_BSD, remake), self.up_proj(x_BSD, remake))
        out_BSD: Tensor = self.down_proj(hidden_BSF, remake)
        return out_BSD


def _gated(gate_BSF: Tensor, up_BSF: Tensor) -> Tensor:
    return F.silu(gate_BSF) * up_BSF


class KeyedDropout(nn.Module):
    """Dropout whose draws depend on (seed, site, sample, position, channel) and on nothing else.

    So a token loses the same channels in every batch split, on every rank and when a block is recomputed.

    Args:
        probability: Share of the values set to zero in training; the others are divided by ``1 - probability``.
        site: Number of this place in the model; no two places may share one.
        seed: Key of the draws.
    """

    def __init__(self, probability: float, *, site: int, seed: int) -> None:
        super().__init__()
        self.probability, self.site, self.seed = probability, site, seed

    def forward(self, x_BSD: Tensor, ctx: TokenContext | None) -> Tensor:
        """x ``[B, S, D]`` -> ``[B, S, D]``; the identity in evaluation and for probability 0.

        Raises:
            EpmoeError: In training without ``ctx.sample_B``, which the draws need.
        """
        if not self.training or self.probability == 0:
            return x_BSD
        if ctx is None or ctx.sample_B is None:
            raise EpmoeError(
                f"dropout={self.probability} needs the sample number of each of the {x_BSD.size(0)} sequences",
                why="its random numbers are keyed by sample and position",
                fix="pass ctx=TokenContext(sample_B=...), or set model.dropout to 0",
            )
        num_sequences, length, width = x_BSD.shape
        position_T = torch.arange(length, device=x_BSD.device).repeat(num_sequences)
        sample_T = ctx.sample_B.to(x_BSD.device).repeat_interleave(length, output_size=num_sequences * length)
        draws_TD = philox.uniform(self.seed, philox.DROPOUT, self.site, sample_T, position_T, width)
        keep_BSD = (draws_TD >= self.probability).view_as(x_BSD)
        return torch.where(keep_BSD, x_BSD / (1 - self.probability), 0.0)

    def extra_repr(self) -> str:
        """Probability and site, for ``print(model)``."""
        return f"{self.probability}, site={self.site}"
