"""What a layer is given: vectors, and what is known about their tokens, looked at once before anything is computed.

Shapes, dtypes and devices are looked at everywhere. Numbers (ids, tasks, samples) are looked at where they are read,
and only in host memory: on a GPU that would wait for the device.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from epmoe.moe.routers import common
from epmoe.types import TokenContext

NUM_SAMPLES = 2**40
"""Sample numbers that the counter of the random numbers tells apart."""


def check_inputs(x_BSD: Any, ctx: Any, d_model: int) -> None:
    """Refuses what is not ``[B, S, D]`` with a fitting context.

    Raises:
        TypeError: x, the context or a part of it is of another type.
        ValueError: A shape, dtype or device does not fit.
    """
    if not isinstance(x_BSD, Tensor):
        raise TypeError(f"x must be a tensor [B, S, D], got {type(x_BSD).__name__}")
    shape = tuple(x_BSD.shape)
    if x_BSD.ndim == 2 and shape[1] == d_model:
        raise ValueError(
            f"x must be [B, S, D], got [T, D] = {list(shape)}; x.unsqueeze(0) says that the {shape[0]} tokens are one "
            f"sequence, which matters to capacity, balance and random numbers"
        )
    if x_BSD.ndim != 3 or shape[2] != d_model:
        raise ValueError(f"x must be [B, S, D] with D={d_model}, got {list(shape)}")
    if not x_BSD.is_floating_point():
        raise ValueError(f"x must be floating point, got {x_BSD.dtype}")
    if ctx is not None and not isinstance(ctx, TokenContext):
        raise TypeError(
            f"ctx must be a TokenContext, got {type(ctx).__name__}; pass TokenContext(valid_BS=...)"
        )
    if ctx is not None:
        _check_context(ctx, x_BSD)


def _check_context(ctx: TokenContext, x_BSD: Tensor) -> None:
    for field in fields(ctx):
        value = getattr(ctx, field.name)
        if value is not None:
            _check_field(field.name, value, x_BSD)


def _check_field(name: str, value: Any, x_BSD: Tensor) -> None:
    dtype = torch.bool if name == "valid_BS" else torch.int64
    letters = name.rpartition("_")[2]
    what = f"TokenContext.{name} must be {str(dtype).removeprefix('torch.')} [{', '.join(letters)}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{what}, got {type(value).__name__}; pass torch.tensor(...)")
    wanted = list(x_BSD.shape[: len(letters)])
    if list(value.shape) != wanted:
        turned = "; this looks like its transpose" if list(value.shape) == wanted[::-1] else ""
        raise ValueError(f"{what} = {wanted} as in x, got {list(value.shape)}{turned}")
    if value.dtype != dtype:
        raise ValueError(
            f"{what}, got {value.dtype}; pass it with .{'bool' if dtype == torch.bool else 'long'}()"
        )
    if value.device != x_BSD.device:
        raise ValueError(
            f"{what} on {x_BSD.device} as x, got it on {value.device}; pass it with .to(x.device)"
        )


def numbers_of_valid(name: str, number_X: Tensor, valid_X: Tensor, limit: int) -> Tensor:
    """Numbers that padding cannot spoil: 0 there, whatever it says.

    Args:
        name: Of the numbers, for the message.
        number_X: int64.
        valid_X: bool.
        limit: Where they are valid they are in ``[0, limit)``.

    Raises:
        ValueError: They are not, and they are in host memory.
    """
    masked_X = number_X.masked_fill(~valid_X, 0)
    if common.at_hand(masked_X) and masked_X.numel():
        low, high = (int(end) for end in masked_X.aminmax())
        if not 0 <= low <= high < limit:
            wrong = low if low < 0 else high
            raise ValueError(f"TokenContext.{name} must be in [0, {limit}) but for padding, got {wrong}")
    return masked_X
