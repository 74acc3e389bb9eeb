"""``expert_ffn``: both matrices of every expert, the activation between them and the weights of the rows."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from epmoe import ops

D, F = 4, 3
COUNTS = [[0], [5], [0, 0, 0], [2, 0, 3], [0, 4, 1]]

all_kinds = pytest.mark.parametrize("kind", ops.ACTIVATIONS)
with_and_without_weights = pytest.mark.parametrize("weighted", [False, True])


def make(
    counts: list[int], kind: str, *, weighted: bool, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """rows, weight, w_in, w_out."""
    generator = torch.Generator().manual_seed(len(counts) + sum(counts))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows, num_experts = sum(counts), len(counts)
    width = 2 * F if kind == "swiglu" else F
    weight_R = randn(rows) if weighted else None
    return [randn(rows, D), weight_R, randn(num_experts, D, width), randn(num_experts, F, D)]


def naive(rows, weight, w_in, w_out, counts, kind):
    """Row after row with plain operations; the weight is applied to the expert's result."""
    out, row = [], 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            hidden = rows[row] @ w_in[expert]
            if kind == "swiglu":
                act = torch.nn.functional.silu(hidden[:F]) * hidden[F:]
            else:
                act = getattr(torch.nn.functional, kind)(hidden)
            y = act @ w_out[expert]
            out.append(y if weight is None else weight[row] * y)
            row += 1
    return torch.stack(out) if out else rows * w_in.sum() * w_out.sum()


def leaves(tensors: list[Tensor | None], needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().clone().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]


def compare(counts, kind, tensors, needs, per_expert=None, upstream=None):
    """Value and the asked gradients against the naive ones."""
    mine, other = leaves(tensors, needs), leaves(tensors, needs)
    y, hidden = ops.expert_ffn(*mine, torch.tensor(counts), per_expert, kind)
    wanted = naive(*other, counts, kind)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    assert not hidden.requires_grad
    if not y.requires_grad:
        assert not any(needs)
        return
    d_y = torch.randn_like(y) if upstream is None else upstream.expand_as(y)
    y.backward(d_y)
    wanted.backward(d_y)
    for one, two in zip(mine, other, strict=True):
        if one is None or not one.requires_grad:
            assert one is None or one.grad is None
            continue
        wanted_grad = torch.zeros_like(two) if two.grad is None else two.grad
        torch.testing.assert_close(one.grad, wanted_grad, rtol=0, atol=1e-12)


@all_kinds
@with_and_without_weights
@pytest.mark.parametrize("counts", COUNTS)
def test_value_and_gradients(counts, kind, weighted):
    compare(counts, kind, make(counts, kind, weighted=weighted), (True, True, True, True))


@all_kinds
@with_and_without_weights
@pytest.mark.parametrize(("num_experts", "each"), [(1, 4), (3, 2), (3, 0)])
def test_the_same_number_of_rows_for_every_expert(num_experts, each, kind, weighted):
    """``rows_per_expert`` says it; then the counts are not looked at."""
    counts = [each] * num_experts
    tensors = make(counts, kind, weighted=weighted)
    compare(counts, kind, tensors, (True, True, True, True), per_expert=each)
    nonsense = torch.full((num_experts,), 2**40)
    y, _ = ops.expert_ffn(*tensors, nonsense, each, kind)
    torch.testing.assert_close(y, naive(*tensors, counts, kind), rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_expert", [None, 2])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_what_is_asked_for(needs, per_expert):
    """Frozen experts, frozen router, rows without gradient, and every mixture of them."""
    compare([2, 2], "swiglu", make([2, 2], "swiglu", weighted=True), needs, per_expert)


@pytest.mark.parametrize("per_expert", [None, 2])
def test_upstream_gradient_may_be_expanded(per_expert):
    tensors = make([2, 2], "gelu", weighted=True)
    compare([2, 2], "gelu", tensors, (True,) * 4, per_expert, torch.ones((), dtype=torch.float64))


def test_weights_may_be_strided():
    tensors = make([1, 3], "relu", weighted=True)
    tensors[2] = tensors[2].transpose(1, 2).contiguous().transpose(1, 2)
    tensors[1] = torch.stack((tensors[1], tensors[1]), 1)[:, 0]
    compare([1, 3], "relu", tensors, (True,) * 4)


@all_kinds
@with_and_without_weights
@pytest.mark.parametrize("per_expert", [None, 2])
def test_gradcheck(kind, weighted, per_expert):
    tensors = leaves(make([2, 2], kind, weighted=weighted), (True,) * 4)

    def value(*given):
        return ops.expert_ffn(*given, torch.tensor([2, 2]), per_expert, kind)[0]

    assert torch.autograd.gradcheck(value, tuple(tensors), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_expert", [None, 3])
def test_low_precision(dtype, per_expert):
    """Weights of rows stay in float32, as does their gradient; everything else has the rows' dtype."""
    counts = [3, 3]
    tensors = make(counts, "swiglu", weighted=True, dtype=dtype)
    tensors[1] = tensors[1].float()
    mine = leaves(tensors, (True,) * 4)
    other = leaves([t.double() for t in tensors], (True,) * 4)
    y, _ = ops.expert_ffn(*mine, torch.tensor(counts), per_expert, "swiglu")
    wanted = naive(*other, counts, "swiglu")
    assert y.dtype == dtype
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(upstream)
    wanted.backward(upstream.double())
    limit = 16 * torch.finfo(dtype).eps
    for one, two in ((y, wanted), *((a.grad, b.grad) for a, b in zip(mine, other, strict=True))):
        scale = two.abs().max().item()
        torch.testing.assert_close(one.double(), two, rtol=0, atol=limit * scale)
    assert [t.grad.dtype for t in mine] == [dtype, torch.float32, dtype, dtype]


@with_and_without_weights
def test_autocast_computes_in_the_autocast_dtype_but_never_narrows_float64(weighted):
    counts = torch.tensor([2, 2])
    tensors = make([2, 2], "swiglu", weighted=weighted, dtype=torch.float32)
    mine = leaves(tensors, (True,) * 4)
    with torch.autocast("cpu", torch.bfloat16):
        low, hidden = ops.expert_ffn(*mine, counts, None, "swiglu")
        wide = [None if t is None else t.double() for t in tensors]
        full, _ = ops.expert_ffn(*wide, counts, None, "swiglu")
    assert low.dtype == hidden.dtype == torch.bfloat16
    assert full.dtype == torch.float64
    narrow = [t if i == 1 or t is None else t.bfloat16() for i, t in enumerate(tensors)]
    assert torch.equal(low, ops.expert_ffn(*narrow, counts, None, "swiglu")[0])
    low.sum().backward()
    assert all(t is None or t.grad.dtype == torch.float32 for t in mine)


def test_a_second_backward_pass_gives_the_same_bits():
    mine = leaves(make([2, 3], "swiglu", weighted=True), (True,) * 4)
    y, _ = ops.expert_ffn(*mine, torch.tensor([2, 3]), None, "swiglu")
    upstream = torch.randn_like(y)
    first = torch.autograd.grad(y, mine, upstream, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y, mine, upstream), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("per_expert", [None, 2, 0])
@with_and_without_weights
def test_opcheck(per_expert, weighted):
    counts = [1, 3] if per_expert is None else [per_expert] * 2
    tensors = leaves(make(counts, "swiglu", weighted=weighted), (True,) * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(
            torch.ops.epmoe.expert_ffn.default,
            (*tensors, torch.tensor(counts), per_expert, "swiglu"),
            test_utils=[
                "test_schema",
                "test_autograd_registration",
                "test_faketensor",
                "test_aot_dispatch_static",
            ],
        )
