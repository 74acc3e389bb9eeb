"""Rows x per-expert weights: which library multiplies, where the experts have no kernel of their own.

Chosen by what is known without asking the device, and never by trying at run time:

    every expert has the same number of rows    bmm                 (padded dispatch; nothing is read back)
    CUDA, bf16, widths multiples of 8           torch grouped_mm    (reads the counts on the device)
    everything else, float64 on CUDA too        one mm for each expert

On the CPU the fused kernel takes the place of all three. Their times relative to its own, forward and backward, K=2, as
``benchmarks/bench_ops.py`` measured them on two cores; ``bmm`` has equal blocks, the others the router's:

    T     E    D    F     dtype    bmm           loop of mm    grouped_mm
    2048  8    256  1024  fp32     1.02  1.12    1.00  1.23    0.96  1.11
    2048  64   256  1024  fp32     0.99  1.11    1.22  1.36    1.18  1.25
    2048  256  256  1024  fp32     0.98  1.04    1.43  1.40    1.42  1.30
    2048  512  256  1024  fp32     0.94  1.00    1.50  1.45    1.50  1.35
    256   64   256  1024  fp32     0.90  1.03    1.48  1.45    1.46  1.35
    8192  64   256  1024  fp32     1.01  1.05    1.09  1.46    1.10  1.41
    2048  64   128  256   fp32     0.97  1.18    2.11  2.16    1.93  1.91
    2048  64   512  1024  fp32     0.97  1.01    1.55  1.45    1.55  1.38
    2048  64   256  1024  bf16     0.85  0.96    1.31  1.59    1.06  1.20

Below 1 is faster than the fused kernel: grouped_mm with 8 experts, forward; and bmm, forward, where blocks are equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from epmoe.ops import checks

Blocks = int | Tensor | list[int]
"""Consecutive blocks of rows: as many for every expert; where each ends, on the device; or how many, on the host."""


def split(
    op: str,
    rows_RD: Tensor,
    tokens_per_expert_L: Tensor,
    rows_per_expert: int | None,
    widths: tuple[int, ...],
) -> Blocks:
    """How the products of one operator find their experts' rows.

    Args:
        rows_per_expert: All experts have this many rows; then the counts are not looked at. None = they differ.
        widths: Columns of everything that is multiplied.

    The counts of the third kind are copied to the host, which on CUDA waits for the device.
    """
    if rows_per_expert is not None:
        return rows_per_expert
    # Rows of 16 bytes, and at least one: an empty product is the loop's business.
    aligned = rows_RD.shape[0] > 0 and all(width > 0 and width % 8 == 0 for width in widths)
    if rows_RD.device.type == "cuda" and rows_RD.dtype == torch.bfloat16 and aligned:
        return tokens_per_expert_L.cumsum(0, dtype=torch.int32)
    return checks.blocks(op, tokens_per_expert_L, rows_RD.shape[0])


def multiply(rows_RD: Tensor, weight_LDF: Tensor, blocks: Blocks) -> Tensor:
    """Each block of rows times its expert's matrix -> ``[R, F]``."""
    if isinstance(blocks, int):
        return torch.bmm(_stacked(rows_RD, weight_LDF.shape[0], blocks), weight_LDF).flatten(0, 1)
    if isinstance(blocks, Tensor):
        return F.grouped_mm(rows_RD.contiguous(), weight_LDF, offs=blocks)
    out_RF = rows_RD.new_empty(rows_RD.shape[0], weight_LDF.shape[2])
    for weight_DF, rows_nD, out_nF in zip(
        weight_LDF, rows_RD.split(blocks), out_RF.split(blocks), strict=True
    ):
        torch.mm(rows_nD, weight_DF, out=out_nF)
    return out_RF


def multiply_weight_grad(rows_RD: Tensor, d_out_RF: Tensor, num_local: int, blocks: Blocks) -> Tensor:
    """Gradient of ``multiply`` with respect to the weights -> ``[L, D, F]``; zero for experts without rows."""
    if isinstance(blocks, int):
        rows_LCD = _stacked(rows_RD, num_local, blocks)
        return torch.bmm(rows_LCD.transpose(1, 2), _stacked(d_out_RF, num_local, blocks))
    if isinstance(blocks, Tensor):
        return F.grouped_mm(rows_RD.contiguous().t(), d_out_RF.contiguous(), offs=blocks)
    d_weight_LDF = rows_RD.new_empty(num_local, rows_RD.shape[1], d_out_RF.shape[1])
    pairs = zip(d_weight_LDF, rows_RD.split(blocks), d_out_RF.split(blocks), strict=True)
    for d_weight_DF, rows_nD, d_out_nF in pairs:
        torch.mm(rows_nD.t(), d_out_nF, out=d_weight_DF)
    return d_weight_LDF


def _stacked(rows_RX: Tensor, num_local: int, rows_per_expert: int) -> Tensor:
    return rows_RX.reshape(num_local, rows_per_expert, rows_RX.shape[1])
