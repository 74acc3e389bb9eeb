"""The operators as citizens of PyTorch: schemas, fake and meta tensors, autograd, compile, autocast."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradgradcheck

from epmoe import ops
from tests.unit.ops.helpers import as_tuple, call, laid_out, plain, small
from tests.unit.ops.twins import randn

PLAIN = {"second_policy": "all", "sample": None, "position": None}
SOME = {"token": torch.tensor([ops.UNFILLED, 0, 2, ops.UNFILLED])}
VARIANTS = [
    ("route_topk", {}),
    ("route_topk", {"sample": None, "position": None, "uniform": torch.rand(4)}),
    ("route_topk", PLAIN | {"normalize": False, "top_k": 3}),
    ("route_topk_backward", {}),
    ("route_topk_backward", {"normalize": False}),
    ("assign_slots", {}),
    ("permute", {}),
    ("permute", SOME),
    ("uniform", {}),
    ("combine", {}),
    ("combine", SOME),
    ("combine", {"weight": None}),
    ("combine_backward", {}),
    ("combine_backward", SOME),
]
ACTIVATION_VARIANTS = [
    ("activate", {}),
    ("activate", {"weight": None, "kind": "relu"}),
    ("activate_backward", {}),
    ("activate_backward", {"d_act": randn(8, 4, 6), "weight": None, "kind": "gelu"}),
    ("expert_ffn", {}),
    ("expert_ffn", {"rows_per_expert": 2, "weight": None}),
    ("expert_ffn_backward", {}),
    (
        "expert_ffn_backward",
        {"rows_per_expert": 2, "weight": None, "needs_rows": False, "needs_w_out": False},
    ),
]
DIFFERENTIABLE = ("route_topk", "permute", "combine", "activate", "expert_ffn")


def named(value):
    return value if isinstance(value, str) else "-".join(value) or "plain"


def double(name, change, layout="contiguous"):
    """Arguments in float64, with gradients where the operator has a derivative."""
    arguments = []
    for value in (small(name) | change).values():
        if torch.is_tensor(value):
            value = laid_out(value.double() if value.is_floating_point() else value, layout)
            value.requires_grad_(value.is_floating_point() and name in DIFFERENTIABLE)
        arguments.append(value)
    return tuple(arguments)


@pytest.mark.parametrize(("name", "change"), VARIANTS, ids=named)
def test_opcheck(name, change):
    """Schema, autograd registration, fake kernel, and tracing through autograd with symbolic sizes."""
    operator = getattr(torch.ops.epmoe, name).default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(operator, double(name, change))


def without_rows(name, arguments):
    """No tokens and no rows; experts stay, with nothing to do."""
    if name.startswith("expert_ffn"):
        keep = dict(zip(small(name), arguments, strict=True))
        gone = {
            key: keep[key][:0] for key in ("d_y", "rows", "weight", "hidden") if keep.get(key) is not None
        }
        each = None if keep["rows_per_expert"] is None else 0
        counts = keep["tokens_per_expert"] * 0
        return tuple((keep | gone | {"tokens_per_expert": counts, "rows_per_expert": each}).values())
    return tuple(a[:0] if torch.is_tensor(a) else a for a in arguments)


@pytest.mark.parametrize("layout", ["transposed", "offset", "no rows"])
@pytest.mark.parametrize(("name", "change"), VARIANTS + ACTIVATION_VARIANTS, ids=named)
def test_fake_and_meta_kernels_know_shapes_dtypes_and_strides(name, change, layout):
    arguments = double(name, change, layout)
    if layout == "no rows":
        arguments = without_rows(name, arguments)
    real = call(name, *arguments)
    with FakeTensorMode() as mode:
        fake = call(name, *(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments))
    meta = call(name, *(a.to("meta") if torch.is_tensor(a) else a for a in arguments))
    with torch.no_grad():
        twin = plain(name)(*arguments)
    for other in (fake, meta, twin):
        for one, two in zip(as_tuple(real), as_tuple(other), strict=True):
            assert (one.shape, one.dtype) == (two.shape, two.dtype)
            assert one.numel() == 0 or one.stride() == two.stride()


def test_moves_have_second_derivatives():
    token = torch.tensor([2, 0, 2])
    rows, x = randn(0, 3, 2).double().requires_grad_(), randn(1, 4, 2).double().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert gradgradcheck(lambda r: ops.combine(r, None, token, 4), rows)
        assert gradgradcheck(lambda x: ops.permute(x, token), x)


@pytest.mark.parametrize("name", ["route_topk", "combine", "activate", "expert_ffn"])
def test_second_derivatives_that_do_not_exist_are_refused(name):
    """Not taken for zero with a warning, as PyTorch would."""
    arguments = double(name, PLAIN if name == "route_topk" else {})
    leaves = [a for a in arguments if torch.is_tensor(a) and a.requires_grad]
    outputs = as_tuple(getattr(ops, name)(*arguments))
    total = sum(out.pow(2).sum() for out in outputs if out.requires_grad)
    gradients = torch.autograd.grad(total, leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        sum(g.pow(2).sum() for g in gradients).backward()


def moe(logits_TE, x_TD, w_in_EDF, w_out_EFD):
    """A layer's operators from logits to output, without capacity."""
    (tokens, experts), top_k = logits_TE.shape, 2
    valid_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool)
    _, ids_TK, weights_TK, active_TK = ops.route_topk(
        logits_TE, valid_T, None, None, None, top_k, True, "all", 0.5, 0, 0
    )
    expert_A = ids_TK.flatten()
    _, demand_GE = ops.assign_slots(expert_A, expert_A * 0, active_TK.flatten(), 1, experts, ops.DROPLESS)
    order_A = expert_A.argsort(stable=True)
    token_A = order_A // top_k
    rows_AD = ops.permute(x_TD, token_A)
    rows_AD, _ = ops.expert_ffn(rows_AD, None, w_in_EDF, w_out_EFD, demand_GE[0], None, "relu")
    return ops.combine(rows_AD, weights_TK.flatten().index_select(0, order_A), token_A, tokens)


def test_compiles_into_one_graph_for_any_number_of_tokens():
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (6, 9):
        inputs = [randn(tokens, tokens, 3), randn(1, tokens, 4), randn(2, 3, 4, 5), randn(3, 3, 5, 4)]
        results = []
        for function in (moe, compiled):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            y_TD = function(*leaves)
            results.append([y_TD, *torch.autograd.grad(y_TD.pow(2).sum(), leaves)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


AUTOCAST = [
    ("route_topk", {}, ["float32", "int64", "float32", "bool"]),
    ("assign_slots", {}, ["int64", "int64"]),
    ("permute", {}, ["float32"]),
    ("permute", {"x": torch.ones(4, 3).half()}, ["float16"]),
    ("combine", {}, ["float32"]),
    ("combine", {"rows": torch.ones(4, 3).bfloat16()}, ["bfloat16"]),
    ("combine_backward", {"weight": torch.ones(4).double()}, ["float32", "float64"]),
    ("activate", {}, ["float32"]),
    ("expert_ffn", {}, ["bfloat16", "bfloat16"]),
    ("expert_ffn", {"w_in": torch.ones(2, 3, 10).half()}, ["bfloat16", "bfloat16"]),
    (
        "expert_ffn",
        {
            "rows": torch.ones(4, 3).double(),
            "w_in": torch.ones(2, 3, 10).double(),
            "w_out": torch.ones(2, 5, 3).double(),
        },
        ["float64", "float64"],
    ),
    ("expert_ffn_backward", {}, ["float32"] * 4),
]


@pytest.mark.parametrize(("name", "change", "dtypes"), AUTOCAST, ids=lambda v: None)
def test_autocast_casts_the_expert_gemm_only(name, change, dtypes):
    arguments = (small(name) | change).values()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = as_tuple(call(name, *arguments))
    assert [str(out.dtype) for out in outputs] == [f"torch.{dtype}" for dtype in dtypes]


def test_autocast_leaves_gradients_in_the_dtype_of_their_tensors():
    leaves = [randn(0, 4, 3), randn(1, 4, 6), randn(2, 3, 6, 5), randn(3, 3, 5, 6)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = moe(*leaves)
    assert y_TD.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y_TD.float().sum(), leaves)
    assert [g.dtype for g in gradients] == [torch.float32] * 4


def test_kernel_status_names_what_runs():
    name, reason = ops.kernel_status()
    assert name
    assert reason
