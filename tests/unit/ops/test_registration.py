"""The operators as citizens of PyTorch: schemas, fake and meta tensors, autograd registration."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from epmoe import ops

FLOAT = {"dtype": torch.float64, "requires_grad": True}


def arguments(name, tokens=5):
    """Ordinary arguments of an operator."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(0, max(tokens, 1), (tokens,), generator=generator)
    logits = torch.randn(tokens, 4, **FLOAT)
    valid = torch.ones(tokens, dtype=torch.bool)
    return {
        "route_topk": (logits, valid, torch.rand(tokens), None, None, 2, True, "random", 0.5, 0, 0),
        "route_topk_raw": (logits, valid, None, token, token, 3, False, "all", 0.5, 0, 0),
        "assign_slots": (token % 3, token % 2, valid, 2, 3, 1),
        "permute": (torch.randn(max(tokens, 1), 3, **FLOAT), token),
        "combine": (torch.randn(tokens, 3, **FLOAT), torch.randn(tokens, **FLOAT), token, max(tokens, 1)),
        "combine_plain": (torch.randn(tokens, 3, **FLOAT), None, token, max(tokens, 1)),
        "grouped_gemm": (
            torch.randn(tokens, 3, **FLOAT),
            torch.randn(2, 3, 4, **FLOAT),
            torch.tensor([tokens // 2, tokens - tokens // 2]),
        ),
    }[name]


NAMES = [
    "route_topk",
    "route_topk_raw",
    "assign_slots",
    "permute",
    "combine",
    "combine_plain",
    "grouped_gemm",
]


def operator(name):
    base = name.removesuffix("_raw").removesuffix("_plain")
    return getattr(torch.ops.epmoe, base)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(operator(name).default, arguments(name), test_utils=checks)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_fake_and_meta_kernels_know_shapes_and_dtypes(name, tokens):
    real = operator(name)(*arguments(name, tokens))
    with FakeTensorMode() as mode:
        fake = operator(name)(
            *(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments(name, tokens))
        )
    meta = operator(name)(*(a.to("meta") if torch.is_tensor(a) else a for a in arguments(name, tokens)))
    for other in (fake, meta):
        pairs = zip(real, other, strict=True) if isinstance(real, tuple) else [(real, other)]
        for one, two in pairs:
            assert (one.shape, one.dtype) == (two.shape, two.dtype)
            assert one.numel() == 0 or one.stride() == two.stride()


def test_kernel_status_names_what_runs():
    name, reason = ops.kernel_status()
    assert name
    assert reason
