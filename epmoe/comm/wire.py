"""Rows in a narrower dtype while they travel."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(rows_ND: Tensor, wire: torch.dtype | None) -> Tensor:
    """Rows as they travel; unchanged where ``wire`` is None or their own dtype.

    bfloat16 has float32's range, so a cast will do. float16 ends at 65504 and loses what is below 6e-8, as gradients
    are that were divided by a step's tokens. So each row is first divided by a power of two that brings its largest
    value into [0.5, 1), and the exponent, exact in float16, travels as one more column. A row with an infinity or NaN
    arrives with it.
    """
    if wire is None or wire == rows_ND.dtype:
        return rows_ND
    if wire != torch.float16:
        return rows_ND.to(wire)
    largest_N = torch.linalg.vector_norm(rows_ND, torch.inf, dim=1, keepdim=True)
    exponent_N1 = torch.frexp(largest_N).exponent
    return torch.cat((torch.ldexp(rows_ND, -exponent_N1), exponent_N1), 1).to(wire)


def unpack(packed_NX: Tensor, dtype: torch.dtype, wire: torch.dtype | None) -> Tensor:
    """The rows again, in their own dtype."""
    if wire is None or wire == dtype:
        return packed_NX
    if wire != torch.float16:
        return packed_NX.to(dtype)
    rows_ND, exponent_N1 = packed_NX[:, :-1].to(dtype), packed_NX[:, -1:].to(torch.int32)
    return torch.ldexp(rows_ND, exponent_N1)
