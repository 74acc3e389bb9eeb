"""What every set of kernels has to answer when it activates, against the formulas in float64.

``forward`` and ``backward`` are ``activate`` and ``activate_backward`` of CPU tensors, wherever the kernels run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from epmoe.types import compute_dtype

WEIGHTS = ("none", "wide", "narrow")


def make(kind: str, rows: int, width: int, dtype: torch.dtype, weight: str, seed: int = 0):
    """d_act, hidden and row weights: normal numbers, in the first row also large ones of both signs."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width * (2 if kind == "swiglu" else 1), generator=generator) * 3
    if rows:
        hidden[0, :width] = torch.linspace(-30, 30, width) if width > 1 else -11.0
    d_act = torch.randn(rows, width, generator=generator).to(dtype)
    weight_R = torch.randn(rows, generator=generator)
    made = {"none": None, "wide": weight_R.to(compute_dtype(dtype)), "narrow": weight_R.to(dtype)}
    return d_act, hidden.to(dtype), made[weight]


def exact(kind: str, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Value, its derivatives with respect to gate and up, and the size that rounding errors are relative to."""
    x = hidden.double()
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        share = gate.sigmoid()
        silu = gate * share
        return silu * up, up * (share + silu * (1 - share)), silu, (gate * up).abs()
    if kind == "relu":
        return x.clamp_min(0), (x > 0).double(), None, x.abs()
    below = torch.erfc(-x * math.sqrt(0.5)) / 2
    return x * below, below + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi), None, x.abs()


def assert_within(got: Tensor, wanted: Tensor, allowed: Tensor, dtype: torch.dtype) -> None:
    """Within ``allowed`` and what rounding to ``dtype`` adds: half a unit in the last place, or an underflow."""
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    limits = torch.finfo(dtype)
    rounding = 0.501 * limits.eps * wanted.abs() + limits.smallest_normal * limits.eps
    excess = (got.double() - wanted).abs() - allowed - rounding
    assert not (excess > 0).any(), f"off by {excess.max():.3g} more than allowed"
    assert got.isfinite().all()


def check_values(forward, backward, dtype, kind, weight):
    """With u the unit of the compute dtype: values within 3u of |x|, gates within 8u, weights within 8u of the sum."""
    unit = torch.finfo(compute_dtype(dtype)).eps
    for rows, width in ((1, 1), (3, 7), (5, 33), (2, 136), (0, 4), (3, 0)):
        d_act_RF, hidden_RX, weight_R = make(kind, rows, width, dtype, weight)
        value, d_gate, d_up, size = exact(kind, hidden_RX)
        scale = torch.ones(rows, 1).double() if weight_R is None else weight_R.double().unsqueeze(1)
        d_wide = d_act_RF.double()

        act_RF = forward(hidden_RX, weight_R, kind)
        assert_within(act_RF, value * scale, 3 * unit * (size * scale).abs(), dtype)

        d_hidden_RX, again_RF, d_weight_R = backward(d_act_RF, hidden_RX, weight_R, kind)
        assert torch.equal(again_RF, act_RF), "the backward pass computes the same bits again"
        upstream = d_wide * scale
        wanted = [upstream * d_gate] + ([] if d_up is None else [upstream * d_up])
        slope = hidden_RX.double().chunk(2, -1)[1].abs() if kind == "swiglu" else torch.ones_like(upstream)
        allowed = [8 * unit * upstream.abs() * slope]
        if d_up is not None:
            allowed.append(4 * unit * upstream.abs() * hidden_RX.double().chunk(2, -1)[0].abs())
        assert_within(d_hidden_RX, torch.cat(wanted, -1), torch.cat(allowed, -1), dtype)
        total = (d_wide.abs() * size).sum(-1)
        assert_within(d_weight_R, (d_wide * value).sum(-1), 8 * unit * total, compute_dtype(dtype))


def check_far_outside(forward, backward, dtype, kind):
    """What exp cannot represent is 0 and not something that a large factor makes visible."""
    x = torch.tensor([-1e37, -1e30, -1e4, -200.0, -100.0, 100.0, 1e4, 1e30, 1e37]).to(dtype).unsqueeze(1)
    hidden = torch.cat((x, torch.full_like(x, -2.0)), 1) if kind == "swiglu" else x
    value, d_gate, d_up, _ = exact(kind, hidden)
    ones = torch.ones_like(x)
    d_hidden, act, d_weight = backward(ones, hidden, None, kind)
    assert_within(forward(hidden, None, kind), value, 1e-6 * value.abs() + 1e-30, dtype)
    assert_within(act, value, 1e-6 * value.abs() + 1e-30, dtype)
    wanted = torch.cat((d_gate,) if d_up is None else (d_gate, d_up), 1)
    assert_within(d_hidden, wanted, 1e-6 * wanted.abs() + 1e-30, dtype)
    assert_within(d_weight, value[:, 0], 1e-6 * value[:, 0].abs() + 1e-30, compute_dtype(dtype))


def check_what_is_not_a_number(backward, dtype, kind):
    """NaN stays NaN and infinity is never made finite; neighbours are not touched."""
    d_act_RF, clean_RX, weight_R = make(kind, 4, 19, dtype, "wide")
    hidden_RX = clean_RX.clone()
    hidden_RX[1, 3], hidden_RX[2, 18] = math.nan, math.inf
    d_hidden_RX, act_RF, d_weight_R = backward(d_act_RF, hidden_RX, weight_R, kind)
    d_clean_RX, clean_RF, d_clean_R = backward(d_act_RF, clean_RX, weight_R, kind)
    assert act_RF[1, 3].isnan()
    assert not act_RF[2, 18].isfinite()
    assert d_weight_R.isfinite().tolist() == [True, False, False, True]
    if kind != "relu":  # the derivative of relu is 0 or 1, also there
        assert d_hidden_RX[1, 3].isnan()
    places = {(1, 3), (2, 18), *([(1, 22), (2, 37)] if kind == "swiglu" else [])}
    for got, wanted in ((act_RF, clean_RF), (d_hidden_RX, d_clean_RX)):
        for row, column in places & {(r, c) for r in range(4) for c in range(got.shape[1])}:
            got[row, column] = wanted[row, column]
        assert torch.equal(got, wanted)
    assert torch.equal(d_weight_R[[0, 3]], d_clean_R[[0, 3]])
