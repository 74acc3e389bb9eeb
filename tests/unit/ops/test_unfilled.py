"""Rows that belong to no token (padded dispatch): whatever they hold, nothing of it is ever seen."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from epmoe import ops
from epmoe.ops import reference

KERNELS = {"chosen": torch.ops.epmoe, "plain": reference}
# Tokens of each row, UNFILLED ones among them: some, first, last, all, none; also where there is no token at all.
LISTS = [
    (4, [2, -1, 0, -1, -1, 2, 3]),
    (3, [-1, 1]),
    (3, [1, -1]),
    (2, [-1, -1, -1]),
    (0, [-1, -1]),
    (2, [0, 1]),
    (0, []),
]
JUNK = [math.nan, math.inf, -math.inf, 3e38]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every new tensor is filled with NaN, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


both_kernels = pytest.mark.parametrize("kernel", KERNELS)
lists = pytest.mark.parametrize(("num_tokens", "tokens"), LISTS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def split(tokens: list[int]) -> tuple[list[int], list[int]]:
    """Filled rows, unfilled rows."""
    return [n for n, t in enumerate(tokens) if t >= 0], [n for n, t in enumerate(tokens) if t < 0]


def poisoned(*shape: int, rows: list[int], dtype: torch.dtype, start: int) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(
        dtype
    )
    for i, row in enumerate(rows):
        made[row] = JUNK[(start + i) % len(JUNK)]
    return made


@both_kernels
@lists
@dtypes
def test_permute_fills_them_with_zeros(kernel, num_tokens, tokens, dtype):
    filled, unfilled = split(tokens)
    x_TD = torch.randn(num_tokens, 5, dtype=torch.float64).to(dtype)
    if num_tokens:
        x_TD[0] = math.nan  # must not stand in for what is missing
    rows_ND = KERNELS[kernel].permute(x_TD, torch.tensor(tokens, dtype=torch.int64))
    assert rows_ND.shape == (len(tokens), 5)
    assert (rows_ND[unfilled] == 0).all()
    for n in filled:
        assert torch.equal(rows_ND[n].nan_to_num(7.0), x_TD[tokens[n]].nan_to_num(7.0))


@both_kernels
@lists
@dtypes
@pytest.mark.parametrize("weighted", [True, False])
def test_combine_does_not_read_them(kernel, num_tokens, tokens, dtype, weighted):
    """Neither row nor weight; as if the list had been without them."""
    combine = KERNELS[kernel].combine
    filled, unfilled = split(tokens)
    for junk in range(len(JUNK)):
        rows_ND = poisoned(len(tokens), 5, rows=unfilled, dtype=dtype, start=junk)
        weight_N = poisoned(len(tokens), rows=unfilled, dtype=dtype, start=junk) if weighted else None
        token_N = torch.tensor(tokens, dtype=torch.int64)
        wanted = combine(
            rows_ND[filled], None if weight_N is None else weight_N[filled], token_N[filled], num_tokens
        )
        assert torch.equal(combine(rows_ND, weight_N, token_N, num_tokens), wanted)
        assert wanted.isfinite().all()


@both_kernels
@lists
@dtypes
def test_gradients_of_combine_are_zero_there(kernel, num_tokens, tokens, dtype):
    backward = KERNELS[kernel].combine_backward
    filled, unfilled = split(tokens)
    for junk in range(len(JUNK)):
        rows_ND = poisoned(len(tokens), 5, rows=unfilled, dtype=dtype, start=junk)
        weight_N = poisoned(len(tokens), rows=unfilled, dtype=torch.float64, start=junk)
        token_N = torch.tensor(tokens, dtype=torch.int64)
        d_y_TD = torch.randn(num_tokens, 5, dtype=torch.float64).to(dtype)
        d_rows_ND, d_weight_N = backward(d_y_TD, rows_ND, weight_N, token_N)
        assert (d_rows_ND[unfilled] == 0).all()
        assert (d_weight_N[unfilled] == 0).all()
        wanted = backward(d_y_TD, rows_ND[filled], weight_N[filled], token_N[filled])
        assert torch.equal(d_rows_ND[filled], wanted[0])
        assert torch.equal(d_weight_N[filled], wanted[1])


@lists
def test_through_autograd(num_tokens, tokens):
    """Forward and backward of the way there and back, with junk where an expert left it."""
    filled, unfilled = split(tokens)
    token_N = torch.tensor(tokens, dtype=torch.int64)
    x_TD = torch.randn(num_tokens, 5, dtype=torch.float64, requires_grad=True)
    for junk in range(len(JUNK)):
        upstream_ND = poisoned(len(tokens), 5, rows=unfilled, dtype=torch.float64, start=junk)
        [d_x_TD] = torch.autograd.grad(ops.permute(x_TD, token_N), x_TD, upstream_ND)
        wanted_TD = torch.zeros_like(x_TD).index_add_(0, token_N[filled], upstream_ND[filled])
        assert torch.allclose(d_x_TD, wanted_TD, rtol=0, atol=1e-14)
        for weighted in (False, True):
            rows_ND = poisoned(
                len(tokens), 5, rows=unfilled, dtype=torch.float64, start=junk
            ).requires_grad_()
            weight_N = torch.randn(len(tokens), dtype=torch.float64, requires_grad=True) if weighted else None
            ops.combine(rows_ND, weight_N, token_N, num_tokens).sum().backward()
            assert rows_ND.grad.isfinite().all()
            assert (rows_ND.grad[unfilled] == 0).all()
            assert weight_N is None or (weight_N.grad[unfilled] == 0).all()
            assert weight_N is None or torch.allclose(weight_N.grad[filled], rows_ND[filled].sum(1))
