"""``expert_ffn``: both matrices of every expert, the activation between them and the weights of the rows."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from epmoe import ops
from epmoe.ops.gemm import multiply, multiply_weight_grad
from tests.unit.ops.helpers import needs_native, plain
from tests.unit.ops.twins import FLOATING

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
    blocks = (torch.tensor(counts), per_expert)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(
            torch.ops.epmoe.expert_ffn.default,
            (*tensors, *blocks, "swiglu"),
            test_utils=[*checks, "test_aot_dispatch_static"],
        )
        plain = [None if t is None else t.detach() for t in tensors]
        y, hidden = torch.ops.epmoe.expert_ffn(*plain, *blocks, "swiglu")
        torch.library.opcheck(
            torch.ops.epmoe.expert_ffn_backward.default,
            (torch.randn_like(y), *plain, *blocks, hidden, "swiglu", True, True, True),
            test_utils=checks,
        )


# ------------------------------------------------------------------------------------------- threads
@pytest.fixture
def threads():
    """Sets the number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHARES = {
    "one large, many small": [90] + [3, 0, 7] * 5,
    "the large one last": [1] * 20 + [70],
    "two large": [60, 2, 60, 1, 0],
    "only small": [5] * 24,
    "only one": [50],
    "none has rows": [0] * 9,
    "the first and the last have none": [0, 4, 9, 0],
}


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("counts", SHARES.values(), ids=SHARES)
def test_any_number_of_threads_shares_the_experts_out(counts, dtype, threads):
    """Large experts get all threads, small ones one each: every block is computed once, and those without rows too.

    The same counts and threads give the same bits again, whoever computed what; other threads other sums.
    """
    rows, weight, w_in, w_out = make(counts, "swiglu", weighted=True, dtype=dtype)
    given = (
        rows,
        weight.to(torch.promote_types(dtype, torch.float32)),
        w_in,
        w_out,
        torch.tensor(counts),
        None,
    )
    d_y = make(counts, "gelu", weighted=False, dtype=dtype)[0]
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in given]
    y, hidden = plain("expert_ffn")(*wide, "swiglu")
    needs = (True, True, True)
    gradients = plain("expert_ffn_backward")(d_y.double(), *wide, hidden, "swiglu", *needs)
    tolerance = 16 * torch.finfo(dtype).eps
    for count in (1, 2, 4):
        threads(count)
        runs = []
        for _ in range(3):
            with torch.inference_mode():
                y_RD, hidden_RX = torch.ops.epmoe.expert_ffn(*given, "swiglu")
                backward = torch.ops.epmoe.expert_ffn_backward(d_y, *given, hidden_RX, "swiglu", *needs)
            runs.append((y_RD, hidden_RX, *backward))
        for one, wanted in zip(runs[0], (y, hidden, *gradients), strict=True):
            scale = wanted.abs().max().item() if wanted.numel() else 1.0
            torch.testing.assert_close(one.double(), wanted, rtol=0, atol=tolerance * scale)
        for other in runs[1:]:
            assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


@needs_native
def test_between_the_products_one_expert_takes_memory_and_not_all(threads):
    """Of the activation, its gradient and that of the pre-activation only blocks of single experts exist."""
    threads(1)
    counts, width = [8] * 16, 2 * 64
    rows, w_in, w_out = torch.randn(128, 8), torch.randn(16, 8, width), torch.randn(16, 64, 8)
    given = (rows, None, w_in, w_out, torch.tensor(counts), None)
    for name, arguments in (
        ("expert_ffn", (*given, "swiglu")),
        ("expert_ffn_backward", (rows, *given, torch.randn(128, width), "swiglu", True, False, False)),
    ):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            outputs = getattr(torch.ops.epmoe, name)(*arguments)
        taken = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.key_averages())
        kept = sum(output.nbytes for output in outputs)
        assert taken <= kept + 4 * (8 * (width + 64) + 3 * 64), name


# -------------------------------------------------------------------------------------------- products
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[4, 4], [0, 3, 5], [0, 0]])
def test_every_library_multiplies_alike(counts, dtype):
    """Blocks of one size, blocks that are counted, and where they end: torch's grouped product runs here too."""
    num_rows, num_local = sum(counts), len(counts)
    generator = torch.Generator().manual_seed(0)
    rows, out = (torch.randn(num_rows, width, generator=generator).to(dtype) for width in (8, 16))
    weight = torch.randn(num_local, 8, 16, generator=generator).to(dtype)
    blocks, d_blocks = rows.double().split(counts), out.double().split(counts)
    wanted = torch.cat([b @ w.double() for b, w in zip(blocks, weight, strict=True)])
    d_wanted = torch.stack([b.t() @ d for b, d in zip(blocks, d_blocks, strict=True)])
    ways = [counts]
    if len(set(counts)) == 1:
        ways.append(counts[0])
    if dtype == torch.bfloat16 and num_rows:
        ways.append(torch.tensor(counts).cumsum(0, dtype=torch.int32))
    for way in ways:
        limit = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(multiply(rows, weight, way).double(), wanted, rtol=limit, atol=limit)
        got = multiply_weight_grad(rows, out, num_local, way)
        torch.testing.assert_close(got.double(), d_wanted, rtol=limit, atol=2 * limit)
