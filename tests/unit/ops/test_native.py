"""The native CPU kernels against their plain PyTorch twins, on memory that starts as NaN."""

from __future__ import annotations

import math

import pytest
import torch

from epmoe.errors import ConfigError
from epmoe.ops import native, philox, reference
from tests.oracle import cases
from tests.unit.ops.helpers import (
    FLOATING,
    REASON,
    WIDE,
    assert_near,
    assert_same_bits,
    call,
    needs_native,
    randint,
    randn,
)


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
def test_ten_million_draws_equal_the_reference():
    """A decision between two logits compares the draw with a number of our choice: one just above and one just
    below what the reference draws, half a step of the draws away, leave no other draw possible."""
    count, generator = 2**16, torch.Generator().manual_seed(0)
    valid = torch.ones(count, dtype=torch.bool)
    for part in range(153):
        seed, layer = (part - 76) * (2**56 + 12345), part * 429 % 2**16
        sample_T = torch.randint(0, 2**40, (count,), generator=generator)
        position_T = torch.randint(0, 2**32, (count,), generator=generator)
        counters = (sample_T, position_T)
        draw_T = philox.uniform(seed, philox.SECOND_EXPERT, layer, *counters, 1)[:, 0].double()
        for step in (2.0**-25, -(2.0**-25)):
            threshold_T = (draw_T + step).clamp_min(2.0**-30)
            logits = torch.stack((torch.zeros_like(draw_T), -(2 / threshold_T - 1).log()), dim=1)
            routing = (logits, valid, None, *counters, 2, True, "random", 0.5, seed, layer)
            used_T = call("route_topk", *routing)[3][:, 1]
            assert torch.equal(used_T, threshold_T > draw_T)


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
