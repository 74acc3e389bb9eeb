"""The native CPU kernels against their plain PyTorch twins, on memory that starts as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe import ops
from epmoe.ops import native
from tests.oracle import cases
from tests.unit.ops import twins
from tests.unit.ops.twins import FLOATING, WIDE, randint, randn

KERNELS, REASON = ops.kernel_status()
needs_native = pytest.mark.skipif(KERNELS != "native", reason=f"no native kernels: {REASON}")
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with twins.poisoned_memory():
        yield


def call(name, *args):
    """The registered operator, below autograd."""
    with torch.no_grad():
        return getattr(torch.ops.epmoe, name)(*args)


# ------------------------------------------------------------------------------------------- routing
@needs_native
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_routing_equals_the_reference(kind, dtype):
    for tokens in (0, 1, 7, 64):
        for experts in (1, 2, 5, 8, 67):
            for top_k in sorted({1, 2, 8, 9, experts} & set(range(1, experts + 1))):
                for normalize in (True, False):
                    twins.check_routing(
                        call, twins.routing_arguments(kind, tokens, experts, top_k, normalize, dtype=dtype)
                    )


@needs_native
@pytest.mark.parametrize(("policy", "tau"), twins.POLICIES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_second_expert_decisions_equal_the_reference(kind, policy, tau):
    for tokens in (0, 7, 257):
        for dtype in WIDE:
            for normalize in (True, False):
                twins.check_routing(
                    call, twins.routing_arguments(kind, tokens, 5, 2, normalize, policy, tau, dtype)
                )


@needs_native
@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 80), st.booleans())
def test_routing_on_fresh_numbers(seed, experts, normalize):
    top_k = 1 + seed % experts
    for dtype in WIDE:
        for kind in ("random", "ties"):
            arguments = twins.routing_arguments(kind, 50, experts, top_k, normalize, dtype=dtype, seed=seed)
            twins.check_routing(call, arguments, seed)


@needs_native
@pytest.mark.parametrize("top_k", [2, 30])
def test_ties_go_to_the_lowest_expert(top_k):
    twins.check_ties(call, top_k)


@needs_native
def test_a_million_draws_equal_the_reference():
    twins.check_draws(call, 10**6)


# --------------------------------------------------------------------------------------------- slots
@needs_native
@pytest.mark.parametrize("size", [0, 1, 1000])
@pytest.mark.parametrize("kind", twins.SLOT_KINDS)
def test_slots_equal_the_reference(kind, size):
    for groups, experts in ((1, 1), (3, 8), (7, 64)):
        twins.check_slots(call, kind, size, groups, experts)


@needs_native
def test_inactive_entries_may_name_anything():
    expert, active = torch.tensor([5, -7, 0]), torch.tensor([False, False, True])
    slot_A, demand_GE = call("assign_slots", expert, torch.tensor([9, -1, 0]), active, 1, 1, -1)
    assert (slot_A.tolist(), demand_GE.tolist()) == ([-1, -1, 0], [[1]])


# ---------------------------------------------------------------------------------------------- rows
@needs_native
@pytest.mark.parametrize("weight_dtype", [*FLOATING, None])
@pytest.mark.parametrize("dtype", FLOATING)
def test_combine_has_the_bits_of_the_reference(dtype, weight_dtype):
    for case in twins.row_cases():
        twins.check_combine(call, *case, dtype, weight_dtype)


@needs_native
@pytest.mark.parametrize("weight_dtype", WIDE)
@pytest.mark.parametrize("dtype", FLOATING)
def test_combine_backward_equals_the_reference(dtype, weight_dtype):
    for case in twins.row_cases():
        twins.check_combine_backward(call, *case, dtype, weight_dtype)


@needs_native
@pytest.mark.parametrize("dtype", FLOATING)
def test_numbers_that_are_not_finite_pass_through(dtype):
    twins.check_special_numbers(call, dtype)


@needs_native
def test_strides_do_not_matter():
    twins.check_strides(call)


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
def test_the_extension_says_what_it_was_built_for():
    extension = native.import_module("epmoe._C")
    assert REASON.startswith(
        "CPU and CUDA kernels (for " if extension.cuda_architectures else "CPU kernels, "
    )
    assert REASON.endswith(f"built for torch {extension.torch_version}")


def test_cuda_kernels_are_told(monkeypatch):
    extension = SimpleNamespace(torch_version="2.13.0", cuda_architectures="9.0 10.0+PTX")
    monkeypatch.delenv("EPMOE_KERNELS", raising=False)
    monkeypatch.setattr(native, "find_spec", lambda _: "a file")
    monkeypatch.setattr(native, "import_module", lambda _: extension)
    told = "CPU and CUDA kernels (for 9.0 10.0+PTX), built for torch 2.13.0"
    assert native.load_kernels() == ("native", told)
