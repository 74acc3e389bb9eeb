"""``permute`` and ``combine``: rows out, weighted sums back."""

from __future__ import annotations

import warnings

import pytest
import torch

from epmoe import ops

# Tokens of each row: some token several times, some never.
LISTS = [(0, []), (3, []), (1, [0]), (4, [3, 0, 0, 3, 2, 0]), (5, [0, 1, 2, 3, 4])]


def naive_combine(rows, weights, tokens, num_tokens):
    out = [torch.zeros(rows.shape[1], dtype=torch.float64) for _ in range(num_tokens)]
    for row, token in enumerate(tokens):
        weight = 1.0 if weights is None else weights[row]
        out[token] = out[token] + rows[row] * weight
    return torch.stack(out) if out else torch.zeros(0, rows.shape[1], dtype=torch.float64)


@pytest.mark.parametrize(("num_tokens", "tokens"), LISTS)
def test_permute_and_its_gradient(num_tokens, tokens):
    x_TD = torch.randn(num_tokens, 3, dtype=torch.float64, requires_grad=True)
    rows_ND = ops.permute(x_TD, torch.tensor(tokens, dtype=torch.int64))
    assert rows_ND.tolist() == [x_TD[t].tolist() for t in tokens]
    upstream = torch.arange(3.0 * len(tokens), dtype=torch.float64).view(len(tokens), 3)
    rows_ND.backward(upstream)
    assert torch.allclose(x_TD.grad, naive_combine(upstream, None, tokens, num_tokens), atol=1e-14)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("num_tokens", "tokens"), LISTS)
def test_combine_and_its_gradients(num_tokens, tokens, weighted):
    rows = torch.randn(len(tokens), 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(tokens), dtype=torch.float64, requires_grad=True) if weighted else None
    y_TD = ops.combine(rows, weights, torch.tensor(tokens, dtype=torch.int64), num_tokens)
    rows2 = rows.detach().clone().requires_grad_()
    weights2 = None if weights is None else weights.detach().clone().requires_grad_()
    wanted = naive_combine(rows2, weights2, tokens, num_tokens)
    assert y_TD.shape == (num_tokens, 3)
    assert torch.allclose(y_TD, wanted, atol=1e-14, rtol=0)
    if not tokens:
        return
    upstream = torch.randn_like(y_TD)
    y_TD.backward(upstream)
    wanted.backward(upstream)
    assert torch.allclose(rows.grad, rows2.grad, atol=1e-14, rtol=0)
    if weighted:
        assert torch.allclose(weights.grad, weights2.grad, atol=1e-14, rtol=0)


def test_unused_token_is_exactly_zero():
    y_TD = ops.combine(torch.full((1, 2), float("inf")), torch.ones(1), torch.tensor([1]), 3)
    assert y_TD[[0, 2]].tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rows_are_added_in_float32(dtype):
    """1 + 256 halves of the smallest step near 1: added one by one in low precision they would vanish."""
    step = torch.finfo(dtype).eps / 2
    rows = torch.cat([torch.ones(1, 1), torch.full((256, 1), step)]).to(dtype)
    weights = torch.ones(257, requires_grad=True)
    rows.requires_grad_()
    y_TD = ops.combine(rows, weights, torch.zeros(257, dtype=torch.int64), 1)
    assert y_TD.dtype == dtype
    assert y_TD.item() == torch.tensor(1 + 256 * step).to(dtype).item() > 1.0
    y_TD.sum().backward()
    assert rows.grad.dtype == dtype
    assert weights.grad.dtype == torch.float32
    assert torch.equal(weights.grad, rows.detach().flatten().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_results_are_rounded_once(dtype):
    """Weights and products stay in float32; only the finished sum and the finished gradient are rounded."""
    generator = torch.Generator().manual_seed(0)
    token = torch.arange(90) % 30
    rows = torch.rand(90, 4, generator=generator).add(0.5).to(dtype).requires_grad_()
    weights = torch.rand(90, generator=generator).add(0.1)
    y_TD = ops.combine(rows, weights, token, 30)
    exact = naive_combine(rows.detach().double(), weights.double(), token.tolist(), 30)
    half_step = 0.501 * torch.finfo(dtype).eps
    assert ((y_TD.double() - exact).abs() <= half_step * exact).all()
    y_TD.backward(torch.full_like(y_TD, 1.125))
    wanted = weights.double().unsqueeze(1) * 1.125
    assert ((rows.grad.double() - wanted).abs() <= half_step * wanted).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_of_a_token_are_added_in_float32(dtype):
    step = torch.finfo(dtype).eps / 2
    x_TD = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    ops.permute(x_TD, torch.zeros(257, dtype=torch.int64)).backward(
        torch.cat([torch.ones(1, 1), torch.full((256, 1), step)]).to(dtype)
    )
    assert x_TD.grad.flatten().tolist() == [torch.tensor(1 + 256 * step).to(dtype).item(), 0.0]


def test_gradcheck():
    token = torch.tensor([2, 0, 2])
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x_TD = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(lambda r, w: ops.combine(r, w, token, 3), (rows, weights))
        assert torch.autograd.gradcheck(lambda r: ops.combine(r, None, token, 3), rows)
        assert torch.autograd.gradcheck(lambda x: ops.permute(x, token), x_TD)
