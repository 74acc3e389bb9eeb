"""``grouped_gemm``: blocks of rows, each times its own matrix."""

from __future__ import annotations

import warnings

import pytest
import torch

from epmoe import ops

COUNTS = [[0], [3], [0, 0], [2, 0, 5, 1], [0, 4], [9] * 40]


def naive(rows, weight, counts):
    out, row = [], 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            out.append((rows[row].unsqueeze(1) * weight[expert]).sum(0))
            row += 1
    return torch.stack(out) if out else rows @ weight[0]


@pytest.mark.parametrize("counts", COUNTS)
def test_value_and_gradients(counts):
    rows = torch.randn(sum(counts), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(counts), 3, 4, dtype=torch.float64, requires_grad=True)
    rows2, weight2 = rows.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    got = ops.grouped_gemm(rows, weight, torch.tensor(counts))
    wanted = naive(rows2, weight2, counts)
    assert torch.allclose(got, wanted, atol=1e-13, rtol=0)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    wanted.backward(upstream)
    assert torch.allclose(rows.grad, rows2.grad, atol=1e-13, rtol=0)
    assert weight.grad is not None, "experts without rows get zeros, not None"
    assert torch.allclose(weight.grad, weight2.grad, atol=1e-13, rtol=0)
    for expert, count in enumerate(counts):
        assert count or (weight.grad[expert] == 0).all()


@pytest.mark.parametrize("counts", [[1, 1], [1, 3], [-1, 4], []])
def test_counts_that_are_not_the_rows_are_refused(counts):
    with pytest.raises(ValueError, match="tokens_per_expert"):
        ops.grouped_gemm(
            torch.ones(3, 2), torch.ones(len(counts), 2, 5), torch.tensor(counts, dtype=torch.long)
        )


def test_upstream_gradient_may_be_expanded():
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    ops.grouped_gemm(rows, weight, torch.tensor([1, 2])).sum().backward()
    assert torch.allclose(rows.grad[0], weight[0].sum(1), atol=1e-14)


def test_gradcheck():
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(
            lambda r, w: ops.grouped_gemm(r, w, torch.tensor([3, 0, 1])), (rows, weight)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype):
    torch.manual_seed(0)
    rows, weight = torch.randn(5, 8).to(dtype), torch.randn(2, 8, 4).to(dtype)
    got = ops.grouped_gemm(rows, weight, torch.tensor([2, 3]))
    wanted = naive(rows.double(), weight.double(), [2, 3])
    assert got.dtype == dtype
    assert torch.allclose(
        got.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )


def test_autocast_computes_in_the_autocast_dtype_but_never_narrows_float64():
    rows, weight = torch.randn(2, 3, requires_grad=True), torch.randn(1, 3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = ops.grouped_gemm(rows, weight, torch.tensor([2]))
        full = ops.grouped_gemm(rows.double(), weight.double(), torch.tensor([2]))
    assert low.dtype == torch.bfloat16
    assert full.dtype == torch.float64
    low.sum().backward()
    assert rows.grad.dtype == torch.float32
    assert weight.grad.dtype == torch.float32


@pytest.fixture
def threads():
    """Sets the number of threads for a test; new memory holds NaN, so that what nobody writes is seen."""
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield torch.set_num_threads
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


SHARES = {
    "one large, many small": [400] + [3, 0, 7] * 12,
    "the large one last": [1] * 30 + [500],
    "two large": [300, 2, 300, 1, 0],
    "only small": [5] * 64,
    "only one": [200],
    "none has rows": [0] * 9,
    "the first and the last have none": [0, 4, 9, 0],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", SHARES.values(), ids=SHARES)
def test_any_number_of_threads_shares_the_experts_out(counts, dtype, threads):
    """Large experts get all threads, small ones one each: every block is computed once, and those without rows too."""
    generator = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(sum(counts), 16, generator=generator).to(dtype)
    weight_LDF = torch.randn(len(counts), 16, 24, generator=generator).to(dtype)
    d_out_RF = torch.randn(sum(counts), 24, generator=generator).to(dtype)
    blocks, d_blocks = rows_RD.double().split(counts), d_out_RF.double().split(counts)
    out = torch.cat([b @ w.double() for b, w in zip(blocks, weight_LDF, strict=True)])
    d_weight = torch.stack([b.t() @ d for b, d in zip(blocks, d_blocks, strict=True)])
    tolerance = 4 * torch.finfo(dtype).eps
    for count in (1, 2, 4):
        threads(count)
        leaves = rows_RD.clone().requires_grad_(), weight_LDF.clone().requires_grad_()
        got = ops.grouped_gemm(*leaves, torch.tensor(counts))
        got.backward(d_out_RF)
        d_rows = torch.cat([d @ w.double().t() for d, w in zip(d_blocks, weight_LDF, strict=True)])
        for one, wanted in ((got, out), (leaves[0].grad, d_rows), (leaves[1].grad, d_weight)):
            scale = wanted.abs().max().item() if wanted.numel() else 1.0
            torch.testing.assert_close(one.double(), wanted, rtol=0, atol=tolerance * scale)
        with torch.inference_mode():
            again = ops.grouped_gemm(rows_RD, weight_LDF, torch.tensor(counts))
            d_weight_LDF = torch.ops.epmoe.grouped_gemm_weight_grad(rows_RD, d_out_RF, torch.tensor(counts))
        torch.testing.assert_close(again, got.detach())
        torch.testing.assert_close(d_weight_LDF, leaves[1].grad)
