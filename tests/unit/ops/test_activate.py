"""Activations against their formulas in float64: the operator, and the same numbers computed inside ``expert_ffn``."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from epmoe import ops
from epmoe.ops import reference
from epmoe.types import compute_dtype
from tests.unit.ops import activations
from tests.unit.ops.activations import WEIGHTS, exact
from tests.unit.ops.helpers import needs_native
from tests.unit.ops.twins import FLOATING


def alone(num_rows: int) -> tuple[Tensor, None]:
    """Every row has an expert of its own."""
    return torch.ones(num_rows, dtype=torch.int64), None


def inside(hidden: Tensor, weight: Tensor | None, kind: str) -> Tensor:
    """``activate`` by way of ``expert_ffn``: rows of one number, 1, times one matrix per row, and then the identity."""
    num_rows, columns = hidden.shape
    width = columns // 2 if kind == "swiglu" else columns
    w_out = torch.eye(width).to(hidden).expand(num_rows, width, width)
    given = (hidden.new_ones(num_rows, 1), weight, hidden.unsqueeze(1), w_out)
    return torch.ops.epmoe.expert_ffn(*given, *alone(num_rows), kind)[0]


def inside_backward(
    d_act: Tensor, hidden: Tensor, weight: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``activate_backward`` likewise: gradients of matrices of one row or column are the gradients before them."""
    num_rows = hidden.shape[0]
    ones_R1, ones_R = hidden.new_ones(num_rows, 1), torch.ones(num_rows, dtype=compute_dtype(hidden.dtype))
    matrices = (torch.zeros_like(hidden).unsqueeze(1), d_act.unsqueeze(2), *alone(num_rows), hidden, kind)
    needs = (False, True, True)
    backward = torch.ops.epmoe.expert_ffn_backward
    _, d_weight, d_w_in, d_w_out = backward(ones_R1, ones_R1, weight, *matrices, *needs)
    if weight is None:
        assert d_weight.shape == (0,)
        d_weight = backward(ones_R1, ones_R1, ones_R, *matrices, *needs)[1]
    elif weight.dtype != ones_R.dtype:
        assert d_weight.dtype == weight.dtype
        d_weight = backward(ones_R1, ones_R1, weight.to(ones_R), *matrices, *needs)[1]
    return d_w_in.squeeze(1), d_w_out.squeeze(2), d_weight


KERNELS = {
    "plain": (reference.activate, reference.activate_backward),
    "inside": (inside, inside_backward),
}
both_kernels = pytest.mark.parametrize("kernel", KERNELS)
all_kinds = pytest.mark.parametrize("kind", ops.ACTIVATIONS)
all_dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=str)


@pytest.mark.parametrize("weight", WEIGHTS)
@both_kernels
@all_kinds
@all_dtypes
def test_value_and_gradients(dtype, kind, kernel, weight):
    activations.check_values(*KERNELS[kernel], dtype, kind, weight)


@needs_native
def test_native_kernels_keep_the_digits_of_small_values():
    """Relative to the value itself, in float32: silu within 4 units everywhere, gelu within 64 down to -12.

    Torch's gelu loses the tail.
    """
    x = torch.linspace(-12, 12, 40001).unsqueeze(0)
    unit = torch.finfo(torch.float32).eps
    for kind, hidden, units in (("swiglu", torch.cat((x, torch.ones_like(x)), 1), 4), ("gelu", x, 64)):
        wanted = exact(kind, hidden)[0]
        act = inside_backward(x, hidden, None, kind)[1]
        assert ((act.double() - wanted).abs() <= units * unit * wanted.abs()).all()


@both_kernels
@all_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_numbers_far_outside(dtype, kind, kernel):
    activations.check_far_outside(*KERNELS[kernel], dtype, kind)


@both_kernels
@all_kinds
@all_dtypes
def test_what_is_not_a_number_stays_where_it_is(dtype, kind, kernel):
    activations.check_what_is_not_a_number(KERNELS[kernel][1], dtype, kind)


@all_kinds
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(kind, weighted):
    hidden = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True) if weighted else None
    assert torch.autograd.gradcheck(lambda h, w: ops.activate(h, w, kind), (hidden, weight))


def test_strides_do_not_matter():
    wide = torch.randn(5, 24, dtype=torch.float64)
    hidden, weight = wide[:, ::3], torch.randn(5, 2, dtype=torch.float64)[:, 1]
    d_act = torch.ones((), dtype=torch.float64).expand(5, 4)
    for one, other in zip(
        torch.ops.epmoe.activate_backward(d_act, hidden, weight, "swiglu"),
        torch.ops.epmoe.activate_backward(
            d_act.contiguous(), hidden.contiguous(), weight.contiguous(), "swiglu"
        ),
        strict=True,
    ):
        assert torch.equal(one, other)


@all_kinds
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(kind, rows, weighted):
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(rows, dtype=torch.float64, requires_grad=True) if weighted else None
    d_act = torch.randn(rows, 3 if kind == "swiglu" else 6, dtype=torch.float64)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(
            torch.ops.epmoe.activate.default,
            (hidden, weight, kind),
            test_utils=[*checks, "test_aot_dispatch_static"],
        )
        plain = [None if t is None else t.detach() for t in (hidden, weight)]
        torch.library.opcheck(
            torch.ops.epmoe.activate_backward.default, (d_act, *plain, kind), test_utils=checks
        )
