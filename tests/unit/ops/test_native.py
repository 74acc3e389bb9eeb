"""The native CPU kernels against their plain PyTorch twins, on memory that starts as NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe import ops
from epmoe.ops import native, philox, reference
from tests.oracle import cases

KERNELS, REASON = ops.kernel_status()
needs_native = pytest.mark.skipif(KERNELS != "native", reason=f"no native kernels: {REASON}")
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Every new tensor is filled with NaN or the largest integer, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def call(name, *args):
    """The registered operator, below autograd."""
    with torch.no_grad():
        return getattr(torch.ops.epmoe, name)(*args)


def assert_near(one, other):
    """Same shape and dtype; integers and flags equal, numbers to rounding."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    if not one.is_floating_point():
        assert torch.equal(one, other)
        return
    eps = torch.finfo(one.dtype).eps
    torch.testing.assert_close(one, other, rtol=32 * eps, atol=32 * eps, equal_nan=True)


def assert_same_bits(one, other):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert torch.equal(one.nan_to_num(12345.0), other.nan_to_num(12345.0))
    assert torch.equal(one.isnan(), other.isnan())


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randint(seed, bound, count):
    return torch.randint(0, bound, (count,), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- routing
def routing_arguments(
    kind, tokens, experts, top_k, normalize, policy="all", tau=0.5, dtype=torch.float32, seed=0
):
    logits, valid = cases.logits_and_valid(kind, tokens, experts, seed=seed)
    uniform = torch.tensor(cases.uniforms(tokens), dtype=torch.float32) if policy == "random" else None
    valid_T = torch.tensor(valid, dtype=torch.bool)
    return logits.to(dtype), valid_T, uniform, None, None, top_k, normalize, policy, tau, 0, 0


def check_routing(arguments, seed=0):
    """Forward and backward, both as the reference says."""
    mine, wanted = call("route_topk", *arguments), reference.route_topk(*arguments)
    for one, other in zip(mine, wanted, strict=True):
        assert_near(one, other)
    probs_TE, ids_TK, weights_TK, active_TK = wanted
    logits_TE, normalize = arguments[0], arguments[6]
    chosen_TK = logits_TE.gather(1, ids_TK).masked_fill(~active_TK[:, :1], 0.0)
    d_probs_TE = randn(seed, *probs_TE.shape, dtype=probs_TE.dtype)
    d_weights_TK = randn(seed + 1, *weights_TK.shape, dtype=weights_TK.dtype)
    backward = (d_probs_TE, d_weights_TK, probs_TE, ids_TK, chosen_TK, active_TK, normalize)
    assert_near(call("route_topk_backward", *backward), reference.route_topk_backward(*backward))


@needs_native
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_routing_equals_the_reference(kind, dtype):
    for tokens in (0, 1, 7, 64):
        for experts in (1, 2, 5, 8, 67):
            for top_k in sorted({1, 2, 8, 9, experts} & set(range(1, experts + 1))):
                for normalize in (True, False):
                    check_routing(routing_arguments(kind, tokens, experts, top_k, normalize, dtype=dtype))


@needs_native
@pytest.mark.parametrize(
    ("policy", "tau"), [("none", 0.5), ("threshold", 0.3), ("random", 0.2), ("random", 0.5), ("random", 1.0)]
)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_second_expert_decisions_equal_the_reference(kind, policy, tau):
    for tokens in (0, 7, 257):
        for dtype in WIDE:
            for normalize in (True, False):
                check_routing(routing_arguments(kind, tokens, 5, 2, normalize, policy, tau, dtype))


@needs_native
@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 80), st.booleans())
def test_routing_on_fresh_numbers(seed, experts, normalize):
    top_k = 1 + seed % experts
    for dtype in WIDE:
        for kind in ("random", "ties"):
            check_routing(
                routing_arguments(kind, 50, experts, top_k, normalize, dtype=dtype, seed=seed), seed
            )


@needs_native
@pytest.mark.parametrize("top_k", [2, 30])
def test_ties_go_to_the_lowest_expert(top_k):
    logits = torch.zeros(3, 64)
    logits[1, ::2] = -0.0
    logits[2, 40:] = 1.0
    ids_TK = call(
        "route_topk", logits, torch.ones(3, dtype=torch.bool), *[None] * 3, top_k, True, "all", 0.5, 0, 0
    )[1]
    ordered = list(range(64))
    assert ids_TK.tolist() == [ordered[:top_k], ordered[:top_k], (ordered[40:] + ordered[:40])[:top_k]]


@needs_native
def test_a_million_draws_equal_the_reference():
    """A decision between two logits compares the draw with a number of our choice: one just above and one just
    below what the reference draws, half a step of the draws away, leave no other draw possible."""
    count, seed, layer = 10**6, -(2**61) + 12345, 40000
    sample_T = randint(0, 2**40, count)
    position_T = randint(1, 2**31, count)
    draw_T = philox.uniform(seed, philox.SECOND_EXPERT, layer, sample_T, position_T, 1)[:, 0].double()

    def active(threshold_T):
        logits = torch.stack((torch.zeros(count, dtype=torch.float64), -(2 / threshold_T - 1).log()), dim=1)
        counters = (None, sample_T, position_T)
        valid = torch.ones(count, dtype=torch.bool)
        return call("route_topk", logits, valid, *counters, 2, True, "random", 0.5, seed, layer)[3][:, 1]

    assert active(draw_T + 2.0**-25).all()
    below = draw_T > 0
    assert not active((draw_T - 2.0**-25).clamp_min(2.0**-30))[below].any()


# --------------------------------------------------------------------------------------------- slots
@needs_native
@pytest.mark.parametrize("size", [0, 1, 1000])
@pytest.mark.parametrize("kind", ["random", "all_to_one", "none_active"])
def test_slots_equal_the_reference(kind, size):
    for groups, experts in ((1, 1), (3, 8), (7, 64)):
        expert_A = torch.zeros(size, dtype=torch.int64) if kind == "all_to_one" else randint(0, experts, size)
        active_A = randint(1, 3, size) > 0 if kind != "none_active" else torch.zeros(size, dtype=torch.bool)
        for capacity in (-1, 0, 1, 10, 2**62):
            arguments = (expert_A, randint(2, groups, size), active_A, groups, experts, capacity)
            pairs = zip(call("assign_slots", *arguments), reference.assign_slots(*arguments), strict=True)
            for mine, wanted in pairs:
                assert_near(mine, wanted)


@needs_native
def test_inactive_entries_may_name_anything():
    expert, active = torch.tensor([5, -7, 0]), torch.tensor([False, False, True])
    slot_A, demand_GE = call("assign_slots", expert, torch.tensor([9, -1, 0]), active, 1, 1, -1)
    assert (slot_A.tolist(), demand_GE.tolist()) == ([-1, -1, 0], [[1]])


# ---------------------------------------------------------------------------------------------- rows
def row_cases(seed=0):
    """Tokens, width, and the token of each row: none, one, many, all the same, some without rows."""
    yield 0, 3, []
    yield 4, 5, []
    yield 1, 1, [0]
    yield 3, 0, [2, 2]
    yield 6, 33, [5, 0, 0, 5, 2, 0]
    yield 2, 64, [1] * 50
    yield 300, 100, randint(seed, 300, 700).tolist()


@needs_native
@pytest.mark.parametrize("weight_dtype", [*FLOATING, None])
@pytest.mark.parametrize("dtype", FLOATING)
def test_combine_has_the_bits_of_the_reference(dtype, weight_dtype):
    for tokens, width, token in row_cases():
        rows_ND = randn(1, len(token), width, dtype=dtype)
        weight_N = None if weight_dtype is None else randn(2, len(token), dtype=weight_dtype)
        arguments = (rows_ND, weight_N, torch.tensor(token, dtype=torch.int64), tokens)
        assert_same_bits(call("combine", *arguments), reference.combine(*arguments))


@needs_native
@pytest.mark.parametrize("weight_dtype", WIDE)
@pytest.mark.parametrize("dtype", FLOATING)
def test_combine_backward_equals_the_reference(dtype, weight_dtype):
    for tokens, width, token in row_cases():
        d_y_TD, rows_ND = randn(3, tokens, width, dtype=dtype), randn(1, len(token), width, dtype=dtype)
        weight_N = randn(2, len(token), dtype=weight_dtype)
        arguments = (d_y_TD, rows_ND, weight_N, torch.tensor(token, dtype=torch.int64))
        d_rows_ND, d_weight_N = call("combine_backward", *arguments)
        wanted_ND, wanted_N = reference.combine_backward(*arguments)
        assert_same_bits(d_rows_ND, wanted_ND)
        assert d_weight_N.dtype == weight_dtype
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        torch.testing.assert_close(d_weight_N, wanted_N, rtol=64 * eps, atol=64 * eps * max(width, 1) ** 0.5)


@needs_native
@pytest.mark.parametrize("dtype", FLOATING)
def test_numbers_that_are_not_finite_pass_through(dtype):
    """NaN, infinities, overflow and underflow of the 16-bit types round as torch rounds them."""
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7, 6e-8, 1e-40, 65504.0, 65520.0, 3.39e38, 1.0]
    rows_ND = torch.tensor(special * 3, dtype=torch.float64).view(3, -1).to(dtype)
    token_N = torch.tensor([0, 1, 1])
    for weight in (1.0, 1.00390625, -3.1, math.inf):
        arguments = (rows_ND, torch.full((3,), weight), token_N, 2)
        assert_same_bits(call("combine", *arguments), reference.combine(*arguments))


@needs_native
def test_strides_do_not_matter():
    d_y_TD = torch.ones(()).expand(5, 8)
    rows_ND, token_N = randn(0, 8, 6).t(), randint(1, 5, 12)[::2]
    weight_N = randn(2, 6, 2)[:, 1]
    arguments = (rows_ND, weight_N, token_N, 5)
    assert_same_bits(call("combine", *arguments), reference.combine(*arguments))
    for one, other in zip(
        call("combine_backward", d_y_TD, rows_ND, weight_N, token_N),
        reference.combine_backward(d_y_TD, rows_ND, weight_N, token_N),
        strict=True,
    ):
        assert_near(one, other)
    logits, valid, *rest = routing_arguments("random", 16, 5, 2, True, "random")
    strided = (logits.t().contiguous().t(), valid.repeat(2)[:16], *rest)
    for one, other in zip(
        call("route_topk", *strided), call("route_topk", logits, valid, *rest), strict=True
    ):
        assert torch.equal(one, other)


@needs_native
def test_results_do_not_depend_on_the_number_of_threads():
    tokens, width, experts = 4000, 96, 16
    token_N = randint(0, tokens, 2 * tokens)
    rows_ND, d_y_TD, weight_N = randn(1, 2 * tokens, width), randn(2, tokens, width), randn(3, 2 * tokens)
    logits = randn(4, tokens, experts)
    valid = torch.ones(tokens, dtype=torch.bool)

    def results():
        routed = call(
            "route_topk",
            logits,
            valid,
            None,
            token_N[:tokens],
            token_N[tokens:],
            2,
            True,
            "random",
            0.5,
            3,
            1,
        )
        probs, ids, weights, active = routed
        return (
            *routed,
            call("route_topk_backward", probs, weights, probs, ids, logits.gather(1, ids), active, True),
            call("combine", rows_ND, weight_N, token_N, tokens),
            *call("combine_backward", d_y_TD, rows_ND, weight_N, token_N),
        )

    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(results())
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        for one, two in zip(outcomes[0], other, strict=True):
            assert torch.equal(one, two)


# ----------------------------------------------------------------------------------------- bad input
def good(name):
    """Small valid arguments, by name."""
    flag, number = torch.ones(4, dtype=torch.bool), torch.arange(4)
    return {
        "route_topk": {
            "logits": torch.randn(4, 3),
            "valid": flag,
            "uniform": None,
            "sample": number,
            "position": number,
            "top_k": 2,
            "normalize": True,
            "second_policy": "random",
            "tau": 0.5,
            "seed": 0,
            "layer": 0,
        },
        "route_topk_backward": {
            "d_probs": torch.randn(4, 3),
            "d_weights": torch.randn(4, 2),
            "probs": torch.rand(4, 3),
            "topk_ids": torch.zeros(4, 2, dtype=torch.int64),
            "chosen_logits": torch.randn(4, 2),
            "active": torch.ones(4, 2, dtype=torch.bool),
            "normalize": True,
        },
        "assign_slots": {
            "expert": number,
            "group": number % 2,
            "active": flag,
            "num_groups": 2,
            "num_experts": 4,
            "capacity": 1,
        },
        "combine": {"rows": torch.randn(4, 3), "weight": torch.randn(4), "token": number, "num_tokens": 4},
        "combine_backward": {
            "d_y": torch.randn(4, 3),
            "rows": torch.randn(4, 3),
            "weight": torch.randn(4),
            "token": number,
        },
    }[name]


BAD = [
    ("route_topk", {"logits": torch.randn(4, 3).half()}, "logits must be float32 or float64, got Half"),
    ("route_topk", {"logits": torch.randn(4)}, r"logits must have shape \[any, any\], got \[4\]"),
    ("route_topk", {"valid": torch.ones(5, dtype=torch.bool)}, r"valid must have shape \[4\], got \[5\]"),
    ("route_topk", {"valid": torch.ones(4)}, "valid must be Bool, got Float"),
    ("route_topk", {"top_k": 4}, "top_k=4 must be at most 3"),
    ("route_topk", {"top_k": 1}, "top_k=1 must be at least 2"),
    ("route_topk", {"top_k": 0, "second_policy": "all"}, "top_k=0 must be at least 1"),
    ("route_topk", {"second_policy": "best"}, "second_policy='best' must be"),
    ("route_topk", {"uniform": torch.rand(4)}, "either uniform or both sample and position"),
    ("route_topk", {"sample": None}, "either uniform or both sample and position"),
    ("route_topk", {"sample": torch.arange(3)}, r"sample must have shape \[4\], got \[3\]"),
    ("route_topk", {"position": torch.arange(4).int()}, "position must be Long, got Int"),
    ("route_topk", {"layer": 65536}, "layer=65536 must be at most 65535"),
    ("route_topk", {"layer": -1}, "layer=-1 must be at least 0"),
    ("route_topk", {"tau": 0.0}, "tau=0 must be positive"),
    ("route_topk_backward", {"topk_ids": torch.full((4, 2), 3)}, r"topk_ids\[0\]=3 must be in \[0, 3\)"),
    ("route_topk_backward", {"d_probs": torch.randn(4, 3).double()}, "d_probs must be Float, got Double"),
    ("route_topk_backward", {"d_weights": torch.randn(4, 3)}, r"d_weights must have shape \[4, 2\]"),
    ("assign_slots", {"expert": torch.tensor([0, 4, 0, 0])}, r"expert\[1\]=4 must be in \[0, 4\)"),
    ("assign_slots", {"group": torch.tensor([0, 0, -1, 0])}, r"group\[2\]=-1 must be in \[0, 2\)"),
    ("assign_slots", {"expert": torch.zeros(4)}, "expert must be Long, got Float"),
    ("assign_slots", {"active": torch.ones(3, dtype=torch.bool)}, r"active must have shape \[4\], got \[3\]"),
    ("assign_slots", {"capacity": -2}, "capacity=-2 must be at least -1"),
    ("assign_slots", {"num_groups": -1}, "num_groups=-1 must be at least 0"),
    ("assign_slots", {"num_groups": 2**40, "num_experts": 2**40}, r"1099511627776\*1099511627776 overflows"),
    (
        "assign_slots",
        {"num_groups": 2**30, "num_experts": 2**32},
        r"can't allocate memory for demand of shape \[1073741824, ",
    ),
    ("combine", {"token": torch.tensor([0, 1, 2, 4])}, r"token\[3\]=4 must be in \[-1, 4\)"),
    ("combine", {"token": torch.tensor([0, -2, 2, 3])}, r"token\[1\]=-2 must be in \[-1, 4\)"),
    ("combine", {"token": torch.arange(3)}, r"token must have shape \[4\], got \[3\]"),
    ("combine", {"rows": torch.ones(4, 3, dtype=torch.int32)}, "rows must be float32, .* got Int"),
    ("combine", {"weight": torch.randn(5)}, r"weight must have shape \[4\], got \[5\]"),
    ("combine", {"num_tokens": -1}, "num_tokens=-1 must be at least 0"),
    ("combine", {"num_tokens": 2**61}, r"can't allocate memory for y of shape \[2305843009213693952, 3\]"),
    ("combine_backward", {"d_y": torch.randn(4, 2)}, r"d_y must have shape \[any, 3\], got \[4, 2\]"),
    ("combine_backward", {"d_y": torch.randn(4, 3).double()}, "d_y must be Float, got Double"),
    (
        "combine_backward",
        {"token": torch.full((4,), 2**40)},
        r"token\[0\]=1099511627776 must be in \[-1, 4\)",
    ),
]


@needs_native
@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_an_exception_with_the_numbers(name, change, message):
    call(name, *good(name).values())
    expected = RuntimeError if message.startswith("can't allocate") else ValueError
    with pytest.raises(expected, match=f"^{name}: .*{message}"):
        call(name, *(good(name) | change).values())


# ------------------------------------------------------------------------------------------- loading
def test_reference_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("EPMOE_KERNELS", "reference")
    assert native.load_kernels() == ("reference", "EPMOE_KERNELS=reference asks for plain PyTorch")


@pytest.mark.parametrize(
    ("found", "running", "reason"),
    [
        (None, "2.13.0", "is not built"),
        ("a file", "2.10.1+cpu", "needs torch 2.11 or newer, this is 2.10.1"),
        ("a file", "2.13.0", "cannot be loaded into torch 2.13.0: undefined symbol"),
    ],
)
def test_what_cannot_be_loaded_is_told(monkeypatch, found, running, reason):
    def refuse(_):
        raise ImportError("undefined symbol")

    monkeypatch.delenv("EPMOE_KERNELS", raising=False)
    monkeypatch.setattr(native, "find_spec", lambda _: found)
    monkeypatch.setattr(native, "import_module", refuse)
    monkeypatch.setattr(torch, "__version__", running)
    name, told = native.load_kernels()
    assert name == "reference"
    assert reason in told


@needs_native
def test_the_extension_says_which_torch_it_was_built_for():
    built_for = native.import_module("epmoe._C").torch_version
    assert f"CPU kernels, built for torch {built_for}" == REASON
