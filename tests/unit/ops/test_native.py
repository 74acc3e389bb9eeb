"""The native CPU kernels against their plain PyTorch twins, on memory that starts as NaN."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from epmoe.errors import ConfigError
from epmoe.ops import native
from tests.oracle import cases
from tests.unit.ops import twins
from tests.unit.ops.helpers import REASON, call, needs_native
from tests.unit.ops.twins import FLOATING, WIDE, randint, randn


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
@pytest.mark.parametrize("top_k", [2, 30])
def test_ties_go_to_the_lowest_expert(top_k):
    twins.check_ties(call, top_k)


@needs_native
def test_uniform_draws_equal_the_reference():
    twins.check_uniform(call)


@needs_native
def test_ten_million_draws_equal_the_reference():
    for part in range(153):
        twins.check_draws(call, 2**16, part)


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
@pytest.mark.parametrize(
    "width", [1024, 1000, 1021], ids=["whole vectors", "aligned rows", "rows that begin anywhere"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_too_large_for_the_caches(dtype, width):
    """They are written past them, where 24 MiB and more are read and written."""
    tokens = 12 * 2**20 // dtype.itemsize // width + 1
    token_N = randint(0, tokens, tokens + 50)
    token_N[::97] = -1
    assert (tokens + len(token_N)) * width * dtype.itemsize >= 24 * 2**20
    twins.check_permute(call, tokens, width, token_N, dtype)
    twins.check_combine(call, tokens, width, token_N, dtype, torch.float32)
    twins.check_combine_backward(call, tokens, width, token_N, dtype, torch.float32)


@needs_native
@pytest.mark.parametrize("dtype", FLOATING)
def test_numbers_that_are_not_finite_pass_through(dtype):
    twins.check_special_numbers(call, dtype)


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
            call("route_topk_backward", probs, weights, probs, ids, active, True),
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


# ------------------------------------------------------------------------------------------- loading
def test_reference_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("EPMOE_KERNELS", "reference")
    assert native.load_kernels() == ("reference", "EPMOE_KERNELS=reference asks for plain PyTorch")


def test_kernels_that_do_not_exist_are_refused(monkeypatch):
    monkeypatch.setenv("EPMOE_KERNELS", "native")
    with pytest.raises(ConfigError, match="EPMOE_KERNELS=native must be auto or reference"):
        native.load_kernels()


@pytest.mark.parametrize(
    ("found", "running", "reason"),
    [
        (None, "2.13.0", "is not built"),
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


def test_an_older_torch_is_refused_before_the_extension_is_opened(monkeypatch):
    monkeypatch.delenv("EPMOE_KERNELS", raising=False)
    monkeypatch.setattr(native, "find_spec", lambda _: "a file")
    monkeypatch.setattr(native, "import_module", lambda _: pytest.fail("it was opened"))
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with pytest.raises(ConfigError, match=r"epmoe\._C needs torch 2\.11 or newer, this is 2\.10\.1\+cpu"):
        native.load_kernels()
    monkeypatch.setenv("EPMOE_KERNELS", "reference")
    assert native.load_kernels()[0] == "reference"


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
