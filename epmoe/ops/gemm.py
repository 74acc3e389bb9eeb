"""Rows x per-expert weights: which library multiplies.

Chosen by what is known without asking the device, and never by trying at run time:

    every expert has the same number of rows    bmm                     (padded dispatch; nothing is read back)
    CPU                                         epmoe::grouped_gemm     (native: experts shared out among threads)
    CUDA, bf16, widths multiples of 8           torch grouped_mm        (reads the counts on the device)
    everything else, float64 on CUDA too        one mm for each expert

Milliseconds on two CPU cores (Zen 4, torch 2.13), medians of 9, product and weight gradient of 4096 rows (float64:
1024) spread at random over E experts, [256, 2048] matrices; bmm for comparison, with equal counts:

                   native        mm loop       torch grouped_mm    bmm
    fp32  E=8      35 / 34       38 / 39       37 / 36             36
          E=64     43 / 46       53 / 59       57 / 53             43
          E=256    75 / 76       94 / 121      94 / 107            71
    bf16  E=8      15 / 13       15 / 13       15 / 13             14
          E=64     19 / 22       24 / 29       25 / 29             19
          E=256    39 / 43       47 / 58       49 / 60             38
    fp64  E=64     48 / 39       52 / 49       not offered         42
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from epmoe.ops import checks, reference


def multiply(
    rows_RD: Tensor, weight_LDF: Tensor, tokens_per_expert_L: Tensor, rows_per_expert: int | None = None
) -> Tensor:
    """Consecutive blocks of rows, each times its expert's matrix -> ``[R, F]``.

    Args:
        rows_per_expert: All experts have this many rows, R / L; then the counts are not looked at.
    """
    if rows_per_expert is None:
        product_RF: Tensor = torch.ops.epmoe.grouped_gemm(rows_RD, weight_LDF, tokens_per_expert_L)
        return product_RF
    return torch.bmm(_stacked(rows_RD, weight_LDF.shape[0], rows_per_expert), weight_LDF).flatten(0, 1)


def multiply_weight_grad(
    rows_RD: Tensor, d_out_RF: Tensor, tokens_per_expert_L: Tensor, rows_per_expert: int | None = None
) -> Tensor:
    """Gradient of ``multiply`` with respect to the weights -> ``[L, D, F]``; zero for experts without rows."""
    if rows_per_expert is None:
        d_weight_LDF: Tensor = torch.ops.epmoe.grouped_gemm_weight_grad(
            rows_RD, d_out_RF, tokens_per_expert_L
        )
        return d_weight_LDF
    num_local = tokens_per_expert_L.shape[0]
    rows_LCD = _stacked(rows_RD, num_local, rows_per_expert)
    return torch.bmm(rows_LCD.transpose(1, 2), _stacked(d_out_RF, num_local, rows_per_expert))


def _stacked(rows_RX: Tensor, num_local: int, rows_per_expert: int) -> Tensor:
    return rows_RX.reshape(num_local, rows_per_expert, rows_RX.shape[1])


def cuda_grouped_gemm(rows_RD: Tensor, weight_LDF: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
    """The operator's CUDA kernel: torch's grouped GEMM where it serves; the counts stay on the device."""
    checks.grouped_gemm(rows_RD, weight_LDF, tokens_per_expert_L)
    if not _grouped_mm_serves(rows_RD, weight_LDF.shape[2]):
        return reference.grouped_gemm(rows_RD, weight_LDF, tokens_per_expert_L)
    return F.grouped_mm(rows_RD.contiguous(), weight_LDF, offs=_ends(tokens_per_expert_L))


def cuda_grouped_gemm_weight_grad(rows_RD: Tensor, d_out_RF: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
    """The same for the gradient of the weights."""
    checks.grouped_gemm_weight_grad(rows_RD, d_out_RF, tokens_per_expert_L)
    if not _grouped_mm_serves(rows_RD, d_out_RF.shape[1]):
        return reference.grouped_gemm_weight_grad(rows_RD, d_out_RF, tokens_per_expert_L)
    return F.grouped_mm(rows_RD.contiguous().t(), d_out_RF.contiguous(), offs=_ends(tokens_per_expert_L))


def _grouped_mm_serves(rows_RD: Tensor, width: int) -> bool:
    # Rows of 16 bytes, and at least one: an empty product is the loop's business.
    aligned = rows_RD.shape[1] % 8 == 0 and width % 8 == 0
    return rows_RD.dtype == torch.bfloat16 and aligned and rows_RD.numel() > 0


def _ends(tokens_per_expert_L: Tensor) -> Tensor:
    return tokens_per_expert_L.cumsum(0, dtype=torch.int32)
