"""Bad input of every operator: an exception with the numbers, the same from native, reference and fake kernels."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch

from epmoe import ops
from tests.unit.ops.helpers import call, needs_native, plain, small

BIG = 2**40
FLAGS, META = torch.ones(4, dtype=torch.bool), torch.device("meta")

# What the arguments alone show, without looking at a value.
ARGUMENTS = [
    ("route_topk", {"logits": torch.zeros(4, 3).half()}, "logits must be float32 or float64, got float16"),
    ("route_topk", {"logits": torch.zeros(4, 3).long()}, "logits must be float32 or float64, got int64"),
    ("route_topk", {"logits": torch.zeros(4)}, r"logits must have shape \[any, any\], got \[4\]"),
    ("route_topk", {"logits": torch.zeros(4, 0)}, "top_k=2 must be at most 0"),
    ("route_topk", {"valid": torch.ones(5, dtype=torch.bool)}, r"valid must have shape \[4\], got \[5\]"),
    (
        "route_topk",
        {"valid": torch.ones(4, 1, dtype=torch.bool)},
        r"valid must have shape \[4\], got \[4, 1\]",
    ),
    ("route_topk", {"valid": torch.ones(4)}, "valid must be bool, got float32"),
    ("route_topk", {"top_k": 4}, "top_k=4 must be at most 3"),
    ("route_topk", {"top_k": 1}, "top_k=1 must be at least 2"),
    ("route_topk", {"top_k": 0, "second_policy": "all"}, "top_k=0 must be at least 1"),
    (
        "route_topk",
        {"top_k": -(2**62), "second_policy": "all"},
        "top_k=-4611686018427387904 must be at least 1",
    ),
    ("route_topk", {"top_k": 2**62}, "top_k=4611686018427387904 must be at most 3"),
    ("route_topk", {"second_policy": "best"}, "second_policy='best' must be"),
    ("route_topk", {"uniform": torch.rand(4)}, "either uniform or both sample and position"),
    ("route_topk", {"sample": None}, "either uniform or both sample and position"),
    ("route_topk", {"sample": None, "position": None}, "either uniform or both sample and position"),
    (
        "route_topk",
        {"sample": None, "uniform": torch.rand(4)},
        "either uniform or both sample and position",
    ),
    (
        "route_topk",
        {"sample": None, "position": None, "uniform": torch.rand(3)},
        r"uniform must have shape \[4\], got \[3\]",
    ),
    (
        "route_topk",
        {"sample": None, "position": None, "uniform": torch.rand(4).bfloat16()},
        "uniform must be float32 or float64, got bfloat16",
    ),
    ("route_topk", {"sample": torch.arange(3)}, r"sample must have shape \[4\], got \[3\]"),
    ("route_topk", {"position": torch.arange(4).int()}, "position must be int64, got int32"),
    ("route_topk", {"layer": 65536}, "layer=65536 must be at most 65535"),
    ("route_topk", {"layer": -1}, "layer=-1 must be at least 0"),
    ("route_topk", {"tau": 0.0}, "tau=0 must be positive"),
    ("route_topk", {"tau": -0.5, "second_policy": "threshold"}, "tau=-0.5 must be positive"),
    ("route_topk", {"tau": math.nan}, "tau=nan must be positive"),
    ("route_topk_backward", {"d_probs": torch.zeros(4, 3).double()}, "d_probs must be float32, got float64"),
    ("route_topk_backward", {"d_weights": torch.zeros(4, 3)}, r"d_weights must have shape \[4, 2\]"),
    (
        "route_topk_backward",
        {"probs": torch.zeros(5, 3)},
        r"topk_ids must have shape \[5, any\], got \[4, 2\]",
    ),
    ("route_topk_backward", {"topk_ids": torch.zeros(4, 2).int()}, "topk_ids must be int64, got int32"),
    ("route_topk_backward", {"active": torch.ones(4, 2)}, "active must be bool, got float32"),
    (
        "route_topk_backward",
        {
            "d_weights": torch.zeros(4, 0),
            "topk_ids": torch.zeros(4, 0).long(),
            "active": torch.zeros(4, 0).bool(),
        },
        "top_k=0 must be at least 1",
    ),
    ("assign_slots", {"expert": torch.zeros(4)}, "expert must be int64, got float32"),
    ("assign_slots", {"expert": torch.zeros(2, 2).long()}, r"expert must have shape \[any\], got \[2, 2\]"),
    ("assign_slots", {"group": torch.zeros(()).long()}, r"group must have shape \[4\], got \[\]"),
    ("assign_slots", {"active": torch.ones(3, dtype=torch.bool)}, r"active must have shape \[4\], got \[3\]"),
    ("assign_slots", {"capacity": -2}, "capacity=-2 must be at least -1"),
    ("assign_slots", {"num_groups": -1}, "num_groups=-1 must be at least 0"),
    ("assign_slots", {"num_experts": -3}, "num_experts=-3 must be at least 0"),
    (
        "assign_slots",
        {"num_groups": BIG, "num_experts": BIG},
        rf"num_groups\*num_experts={BIG}\*{BIG} overflows",
    ),
    ("uniform", {"sample": torch.zeros(4)}, "sample must be int64, got float32"),
    ("uniform", {"sample": torch.zeros(2, 2).long()}, r"sample must have shape \[any\], got \[2, 2\]"),
    ("uniform", {"position": torch.zeros(3).long()}, r"position must have shape \[4\], got \[3\]"),
    ("uniform", {"stream": 256}, "stream=256 must be at most 255"),
    ("uniform", {"stream": -1}, "stream=-1 must be at least 0"),
    ("uniform", {"layer": 65536}, "layer=65536 must be at most 65535"),
    ("uniform", {"num_lanes": -1}, "num_lanes=-1 must be at least 0"),
    ("uniform", {"first_lane": -4}, "first_lane=-4 must be at least 0"),
    ("uniform", {"first_lane": 2}, "first_lane=2 must be a multiple of 4"),
    ("permute", {"x": torch.zeros(4)}, r"x must have shape \[any, any\], got \[4\]"),
    ("permute", {"x": torch.zeros(4, 3).int()}, "x must be float32, .* got int32"),
    ("permute", {"token": torch.arange(4).int()}, "token must be int64, got int32"),
    ("permute", {"token": torch.zeros(2, 2).long()}, r"token must have shape \[any\], got \[2, 2\]"),
    ("combine", {"token": torch.arange(3)}, r"token must have shape \[4\], got \[3\]"),
    ("combine", {"token": torch.arange(4).int()}, "token must be int64, got int32"),
    ("combine", {"rows": torch.ones(4, 3).int()}, "rows must be float32, .* got int32"),
    ("combine", {"rows": torch.ones(4, 3, 1)}, r"rows must have shape \[any, any\], got \[4, 3, 1\]"),
    ("combine", {"weight": torch.ones(5)}, r"weight must have shape \[4\], got \[5\]"),
    ("combine", {"weight": torch.ones(4).long()}, "weight must be float32, .* got int64"),
    ("combine", {"num_tokens": -1}, "num_tokens=-1 must be at least 0"),
    ("combine_backward", {"d_y": torch.zeros(4, 2)}, r"d_y must have shape \[any, 3\], got \[4, 2\]"),
    ("combine_backward", {"d_y": torch.zeros(4, 3).double()}, "d_y must be float32, got float64"),
    ("combine_backward", {"rows": torch.zeros(5, 3)}, r"weight must have shape \[5\], got \[4\]"),
    ("combine_backward", {"weight": torch.ones(4).bool()}, "weight must be float32, .* got bool"),
    ("combine_backward", {"token": torch.ones(4)}, "token must be int64, got float32"),
    ("activate", {"hidden": torch.zeros(4)}, r"hidden must have shape \[any, any\], got \[4\]"),
    ("activate", {"hidden": torch.zeros(4, 6).int()}, "hidden must be float32, .* got int32"),
    ("activate", {"hidden": torch.zeros(4, 5)}, "hidden has 5 columns, but swiglu needs pairs"),
    ("activate", {"weight": torch.zeros(3)}, r"weight must have shape \[4\], got \[3\]"),
    ("activate", {"weight": torch.zeros(4).long()}, "weight must be float32, .* got int64"),
    ("activate", {"kind": "silu"}, "kind='silu' must be one of swiglu, gelu, relu"),
    ("activate_backward", {"d_act": torch.zeros(4, 6)}, r"d_act must have shape \[4, 3\], got \[4, 6\]"),
    ("activate_backward", {"d_act": torch.zeros(4, 3).half()}, "d_act must be float32, got float16"),
    ("activate_backward", {"kind": "gelu"}, r"d_act must have shape \[4, 6\], got \[4, 3\]"),
    ("activate_backward", {"kind": ""}, "kind='' must be one of swiglu, gelu, relu"),
    ("expert_ffn", {"rows": torch.zeros(4, 3).int()}, "rows must be float32, .* got int32"),
    ("expert_ffn", {"weight": torch.zeros(4, 1)}, r"weight must have shape \[4\], got \[4, 1\]"),
    ("expert_ffn", {"w_in": torch.zeros(())}, r"w_in must have shape \[any, 3, any\], got \[\]"),
    ("expert_ffn", {"w_in": torch.zeros(2, 3, 9)}, "w_in has 9 columns, but swiglu needs pairs"),
    ("expert_ffn", {"w_in": torch.zeros(2, 3, 8)}, r"w_out must have shape \[2, 4, any\], got \[2, 5, 3\]"),
    ("expert_ffn", {"w_out": torch.zeros(2, 5, 3).double()}, "w_out must be float32, got float64"),
    ("expert_ffn", {"tokens_per_expert": torch.tensor([4])}, r"must have shape \[2\], got \[1\]"),
    ("expert_ffn", {"rows_per_expert": 3}, "rows_per_expert=3 of 2 experts must be the 4 rows"),
    ("expert_ffn", {"activation": "silu"}, "activation='silu' must be one of swiglu, gelu, relu"),
    ("expert_ffn", {"tokens_per_expert": torch.ones(2)}, "tokens_per_expert must be int64, got float32"),
    ("expert_ffn", {"rows_per_expert": 2**62}, "rows_per_expert=4611686018427387904 of 2 experts must be"),
    ("expert_ffn_backward", {"d_y": torch.zeros(4, 2)}, r"d_y must have shape \[4, 3\], got \[4, 2\]"),
    ("expert_ffn_backward", {"d_y": torch.zeros(4, 3).half()}, "d_y must be float32, got float16"),
    ("expert_ffn_backward", {"hidden": torch.zeros(4, 5)}, r"hidden must have shape \[4, 10\], got \[4, 5\]"),
    ("expert_ffn_backward", {"hidden": torch.zeros(4, 10).double()}, "hidden must be float32, got float64"),
    ("expert_ffn_backward", {"rows": torch.zeros(5, 3)}, r"weight must have shape \[5\], got \[4\]"),
    ("expert_ffn_backward", {"w_in": torch.zeros(2, 3, 9)}, "w_in has 9 columns, but swiglu needs pairs"),
    ("expert_ffn_backward", {"w_out": torch.zeros(2, 5, 3).half()}, "w_out must be float32, got float16"),
    ("expert_ffn_backward", {"activation": ""}, "activation='' must be one of swiglu, gelu, relu"),
    ("expert_ffn_backward", {"rows_per_expert": -1}, "rows_per_expert=-1 of 2 experts must be the 4 rows"),
]

COUNTS = [
    ([5, -1], r"tokens_per_expert\[0\]=5 must be in \[0, 4\], the rows that are left"),
    ([4, -1], r"tokens_per_expert\[1\]=-1 must be in \[0, 0\], the rows that are left"),
    ([3, 2], r"tokens_per_expert\[1\]=2 must be in \[0, 1\], the rows that are left"),
    ([2, 2**63 - 1], rf"tokens_per_expert\[1\]={2**63 - 1} must be in \[0, 2\], the rows that are left"),
    ([0, 3], "tokens_per_expert must add up to the 4 rows, got 3"),
]

# What only the values show.
VALUES = [
    ("route_topk_backward", {"topk_ids": torch.full((4, 2), 3)}, r"topk_ids\[0\]=3 must be in \[0, 3\)"),
    (
        "route_topk_backward",
        {"topk_ids": torch.tensor([[0, 1], [2, -1], [0, 0], [0, 0]])},
        r"topk_ids\[3\]=-1 must be in \[0, 3\)",
    ),
    ("assign_slots", {"expert": torch.tensor([0, 4, 0, 0])}, r"expert\[1\]=4 must be in \[0, 4\)"),
    ("assign_slots", {"expert": torch.full((4,), -1)}, r"expert\[0\]=-1 must be in \[0, 4\)"),
    ("assign_slots", {"group": torch.tensor([0, 0, -1, 0])}, r"group\[2\]=-1 must be in \[0, 2\)"),
    ("assign_slots", {"group": torch.tensor([0, 0, 0, 2])}, r"group\[3\]=2 must be in \[0, 2\)"),
    ("assign_slots", {"num_groups": 0}, r"group\[0\]=0 must be in \[0, 0\)"),
    ("permute", {"token": torch.tensor([0, 1, 5])}, r"token\[2\]=5 must be in \[-1, 5\)"),
    ("permute", {"token": torch.tensor([-1, -2])}, r"token\[1\]=-2 must be in \[-1, 5\)"),
    ("permute", {"token": torch.tensor([-(2**63)])}, rf"token\[0\]={-(2**63)} must be in \[-1, 5\)"),
    ("permute", {"x": torch.zeros(0, 3)}, r"token\[0\]=0 must be in \[-1, 0\)"),
    ("combine", {"token": torch.tensor([0, 1, -1, 4])}, r"token\[3\]=4 must be in \[-1, 4\)"),
    ("combine", {"token": torch.tensor([-1, -2, 2, 3])}, r"token\[1\]=-2 must be in \[-1, 4\)"),
    ("combine", {"num_tokens": 0}, r"token\[0\]=0 must be in \[-1, 0\)"),
    ("combine_backward", {"token": torch.full((4,), BIG)}, rf"token\[0\]={BIG} must be in \[-1, 4\)"),
    ("combine_backward", {"token": torch.full((4,), -2)}, r"token\[0\]=-2 must be in \[-1, 4\)"),
    ("combine_backward", {"d_y": torch.zeros(3, 3)}, r"token\[3\]=3 must be in \[-1, 3\)"),
    *(
        (name, {"tokens_per_expert": torch.tensor(counts)}, message)
        for name in ("expert_ffn", "expert_ffn_backward")
        for counts, message in COUNTS
    ),
]


def huge(value, *shape):
    """A tensor of terabytes that needs only one element of memory."""
    return torch.tensor(value).expand(*shape)


# What no machine has the memory for.
SIZES = [
    (
        "route_topk",
        {"logits": huge(1.0, BIG, 3), "valid": huge(True, BIG), "second_policy": "none"},
        "logits",
    ),
    ("route_topk", {"logits": huge(1.0, 4, BIG)}, "logits"),
    ("route_topk_backward", {"d_probs": huge(1.0, 4, BIG), "probs": huge(1.0, 4, BIG)}, "probs"),
    ("assign_slots", {"num_groups": 2**30, "num_experts": 2**32}, "demand"),
    ("assign_slots", {"num_groups": 2**60, "num_experts": 7}, "demand"),
    ("assign_slots", {"expert": huge(0, BIG), "group": huge(0, BIG), "active": huge(True, BIG)}, "expert"),
    ("permute", {"x": huge(1.0, 5, 2**60)}, "x"),
    ("permute", {"x": huge(1.0, 5, BIG)}, "x"),
    ("uniform", {"num_lanes": BIG}, "draws"),
    ("combine", {"num_tokens": 2**61}, "y"),
    ("combine", {"num_tokens": BIG}, "y"),
    ("combine", {"rows": huge(1.0, BIG, 1), "weight": huge(1.0, BIG), "token": huge(0, BIG)}, "rows"),
    ("combine_backward", {"rows": huge(1.0, 4, BIG), "d_y": huge(1.0, 4, BIG)}, "rows"),
    ("activate", {"hidden": huge(1.0, 4, BIG)}, "hidden"),
    ("activate_backward", {"d_act": huge(1.0, 4, BIG), "hidden": huge(1.0, 4, 2 * BIG)}, "hidden"),
    ("expert_ffn", {"w_in": huge(1.0, 2, 3, 2 * BIG), "w_out": huge(1.0, 2, BIG, 3)}, "hidden"),
    ("expert_ffn", {"w_out": huge(1.0, 2, 5, BIG)}, "y"),
    ("expert_ffn_backward", {"d_y": huge(1.0, 4, BIG), "w_out": huge(1.0, 2, 5, BIG)}, "d_y"),
]


def named(value):
    return value if isinstance(value, str) else "-".join(value) if isinstance(value, dict) else None


def refuses(kernel, name, change, message, error=ValueError):
    kernel(*small(name).values())
    with pytest.raises(error, match=message):
        kernel(*(small(name) | change).values())


@pytest.mark.parametrize(("name", "change", "message"), ARGUMENTS + VALUES, ids=named)
def test_refused_alike(name, change, message):
    """By the kernel that serves (the native one where it is built) and by the reference."""
    refuses(lambda *args: call(name, *args), name, change, f"^{name}: .*{message}")
    refuses(plain(name), name, change, f"^{name}: .*{message}")


@pytest.mark.parametrize(("name", "change", "message"), ARGUMENTS, ids=named)
def test_refused_while_tracing(name, change, message):
    """Fake kernels see shapes and dtypes only, and refuse what they can."""

    def on_meta(*args):
        return call(name, *(a.to(META) if torch.is_tensor(a) else a for a in args))

    refuses(on_meta, name, change, f"^{name}: .*{message}")


@pytest.mark.parametrize(("name", "change", "what"), SIZES, ids=named)
def test_more_memory_than_there_is_is_an_exception(name, change, what):
    for kernel in (lambda *args: call(name, *args), plain(name)):
        refuses(
            kernel, name, change, "can't allocate memory|[Ss]torage size calculation overflowed", RuntimeError
        )


def native(cases):
    """Those that have a native kernel on the CPU."""
    return [case for case in cases if not case[0].startswith("activate")]


@needs_native
@pytest.mark.parametrize(("name", "change", "what"), native(SIZES), ids=named)
def test_native_kernels_say_for_what_memory_was_missing(name, change, what):
    refuses(
        lambda *args: call(name, *args),
        name,
        change,
        f"^{name}: can't allocate memory for {what} of shape",
        RuntimeError,
    )


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ("permute: token[3]=9 must be in [-1, 4)", ValueError),
        ("permute: can't allocate memory for rows of shape [4]", RuntimeError),
        ("permute: CUDA: out of memory", RuntimeError),
        ("combine: of another operator", RuntimeError),
    ],
)
def test_what_a_kernel_refuses_is_a_value_error_in_every_torch(told, kind, monkeypatch):
    """Newer versions hand on whatever a native kernel throws as a RuntimeError."""
    monkeypatch.setattr(torch.ops.epmoe, "permute", Mock(side_effect=RuntimeError(told)))
    with pytest.raises(kind) as caught:
        ops.permute(FLAGS, FLAGS)
    assert (str(caught.value), type(caught.value)) == (told, kind)


TENSORS = [
    (name, key)
    for name in (
        "route_topk",
        "route_topk_backward",
        "assign_slots",
        "permute",
        "uniform",
        "combine",
        "combine_backward",
        "activate",
        "activate_backward",
        "expert_ffn",
        "expert_ffn_backward",
    )
    for key, value in small(name).items()
    if torch.is_tensor(value)
]


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_tensors_on_different_devices_are_refused(name, key):
    change = {key: small(name)[key].to(META)}
    message = f"^{name}: .* must be on (cpu|meta) like the tensors before it, got (meta|cpu)"
    refuses(lambda *args: call(name, *args), name, change, message)
    refuses(plain(name), name, change, message)


@needs_native
@pytest.mark.parametrize(("name", "key"), native(TENSORS))
def test_memory_that_was_taken_away_is_not_read(name, key):
    """The storage of a sharded parameter is shrunk between its uses; whoever still holds the tensor must not read."""
    gone = small(name)[key].clone()
    gone.untyped_storage().resize_(gone.element_size())
    message = f"^{name}: {key} of shape .* reaches element {gone.numel() - 1} of a storage that holds 1"
    refuses(lambda *args: call(name, *args), name, {key: gone}, message)


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_what_is_no_dense_tensor_is_an_exception(name, key):
    arguments = small(name)
    optional = key == "weight" and name != "combine_backward"
    others = [3.0, "text", arguments[key].to_sparse()]
    for other in others if optional else [None, *others]:
        with pytest.raises((TypeError, RuntimeError, ValueError, AttributeError)):
            call(name, *(arguments | {key: other}).values())


def test_seed_that_is_no_int64_is_an_exception():
    with pytest.raises((RuntimeError, OverflowError, TypeError)):
        call("route_topk", *(small("route_topk") | {"seed": 2**64}).values())


@needs_native
def test_sizes_beyond_memory_with_nothing_in_them_are_harmless():
    """A tensor without elements may have any shape; what is counted in bytes or tokens must not overflow."""
    wide, none = torch.empty(0, 2**62), torch.arange(0)
    routed = call("route_topk", wide, FLAGS[:0], None, None, None, 2, True, "none", 0.5, 0, 0)
    assert [tuple(out.shape) for out in routed] == [(0, 2**62), (0, 2), (0, 2), (0, 2)]
    d_logits = call("route_topk_backward", wide, routed[2], wide, routed[1], routed[3], True)
    assert d_logits.shape == wide.shape
    assert call("combine", wide, None, none, 0).shape == wide.shape
    assert call("combine", torch.empty(1, 0), None, none.new_zeros(1), 2**62).shape == (2**62, 0)
    d_y, rows = torch.empty(2**62, 0), torch.empty(1, 0)
    d_rows, d_weight = call("combine_backward", d_y, rows, torch.ones(1), torch.tensor([2**61]))
    assert (tuple(d_rows.shape), d_weight.tolist()) == ((1, 0), [0.0])
    assert call("permute", wide, none).shape == wide.shape
    assert call("permute", torch.empty(2**62, 0), torch.tensor([2**61, -1])).shape == (2, 0)
    assert call("activate", wide, None, "relu").shape == wide.shape
    d_hidden, act, d_weight = call("activate_backward", wide[:, : 2**61], wide, None, "swiglu")
    assert (d_hidden.shape, act.shape, d_weight.shape) == (wide.shape, (0, 2**61), (0,))
    empty, matrices = torch.empty(2**62, 0), (torch.empty(1, 0, 0), torch.empty(1, 0, 0))
    for rows, given in (
        (wide, (torch.empty(0, 2**62, 0), torch.empty(0, 0, 2**62), none)),
        (empty, (*matrices, torch.tensor([2**62]))),
    ):
        y, hidden = call("expert_ffn", rows, None, *given, None, "gelu")
        assert y.shape == rows.shape
        d_rows, *_ = call("expert_ffn_backward", y, rows, None, *given, None, hidden, "gelu", *[True] * 3)
        assert d_rows.shape == rows.shape
