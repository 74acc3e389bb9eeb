"""What every set of kernels has to answer like the reference: native ones, CUDA ones emulated, CUDA ones on a GPU.

``call(name, *arguments)`` takes and gives CPU tensors, wherever the kernels run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from epmoe.ops import philox, reference
from tests.oracle import cases

Call = Callable[..., Any]
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
SEED = int(os.environ.get("EPMOE_TEST_SEED", "0"))
"""Added to every seed: another number, other inputs."""
POLICIES = [("none", 0.5), ("threshold", 0.3), ("random", 0.2), ("random", 0.5), ("random", 1.0)]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every new tensor is filled with NaN or the largest integer, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED + seed)).to(dtype)


def randint(seed, bound, count):
    return torch.randint(0, max(bound, 1), (count,), generator=torch.Generator().manual_seed(SEED + seed))


# ------------------------------------------------------------------------------------------- routing
def routing_arguments(
    kind, tokens, experts, top_k, normalize, policy="all", tau=0.5, dtype=torch.float32, seed=0
):
    logits, valid = cases.logits_and_valid(kind, tokens, experts, seed=SEED + seed)
    uniform = torch.tensor(cases.uniforms(tokens, SEED), dtype=torch.float32) if policy == "random" else None
    valid_T = torch.tensor(valid, dtype=torch.bool)
    return logits.to(dtype), valid_T, uniform, None, None, top_k, normalize, policy, tau, 0, 0


def check_routing(call: Call, arguments, seed=0):
    """Forward and backward, both as the reference says."""
    mine, wanted = call("route_topk", *arguments), reference.route_topk(*arguments)
    for one, other in zip(mine, wanted, strict=True):
        assert_near(one, other)
    probs_TE, ids_TK, weights_TK, active_TK = wanted
    d_probs_TE = randn(seed, *probs_TE.shape, dtype=probs_TE.dtype)
    d_weights_TK = randn(seed + 1, *weights_TK.shape, dtype=weights_TK.dtype)
    backward = (d_probs_TE, d_weights_TK, probs_TE, ids_TK, active_TK, arguments[6])
    assert_near(call("route_topk_backward", *backward), reference.route_topk_backward(*backward))


def check_ties(call: Call, top_k):
    logits = torch.zeros(3, 64)
    logits[1, ::2] = -0.0
    logits[2, 40:] = 1.0
    valid = torch.ones(3, dtype=torch.bool)
    ids_TK = call("route_topk", logits, valid, *[None] * 3, top_k, True, "all", 0.5, 0, 0)[1]
    ordered = list(range(64))
    assert ids_TK.tolist() == [ordered[:top_k], ordered[:top_k], (ordered[40:] + ordered[:40])[:top_k]]


def check_draws(call: Call, count, part=0):
    """A decision between two logits compares the draw with a number of our choice: one just above and one just
    below what the reference draws, half a step of the draws away, leave no other draw possible."""
    seed, layer = (part - 76) * (2**56 + 12345), (40000 + part * 429) % 2**16
    sample_T, position_T = randint(part, 2**40, count), randint(part + 1, 2**32, count)
    counters, valid = (sample_T, position_T), torch.ones(count, dtype=torch.bool)
    draw_T = reference.uniform(*counters, seed, philox.SECOND_EXPERT, layer, 1, 0)[:, 0].double()
    for step in (2.0**-25, -(2.0**-25)):
        threshold_T = (draw_T + step).clamp_min(2.0**-30)
        logits = torch.stack((torch.zeros_like(draw_T), -(2 / threshold_T - 1).log()), dim=1)
        routing = (logits, valid, None, *counters, 2, True, "random", 0.5, seed, layer)
        used_T = call("route_topk", *routing)[3][:, 1]
        assert torch.equal(used_T, threshold_T > draw_T)


def check_experts_out_of_range(call: Call):
    """They get no gradient, and disturb no other token."""
    d_probs, d_weights, probs = randn(0, 3, 4), randn(1, 3, 2), randn(2, 3, 4).softmax(-1)
    ids, active = torch.tensor([[0, 3]] * 3), torch.ones(3, 2, dtype=torch.bool)
    for normalize in (True, False):
        arguments = (d_probs, d_weights, probs, ids, active, normalize)
        wanted = reference.route_topk_backward(*arguments)
        for wrong in (4, -1, 2**62):
            ids_TK = ids.clone()
            ids_TK[1, 1] = wrong
            got = call("route_topk_backward", d_probs, d_weights, probs, ids_TK, active, normalize)
            assert_near(got[[0, 2]], wanted[[0, 2]])
            assert got[1].isfinite().all()


# --------------------------------------------------------------------------------------------- slots
SLOT_KINDS = ("random", "all_to_one", "none_active")


def check_slots(call: Call, kind, size, groups, experts):
    expert_A = torch.zeros(size, dtype=torch.int64) if kind == "all_to_one" else randint(0, experts, size)
    active_A = randint(1, 3, size) > 0 if kind != "none_active" else torch.zeros(size, dtype=torch.bool)
    for capacity in (-1, 0, 1, 10, 2**62):
        arguments = (expert_A, randint(2, groups, size), active_A, groups, experts, capacity)
        pairs = zip(call("assign_slots", *arguments), reference.assign_slots(*arguments), strict=True)
        for mine, wanted in pairs:
            assert_near(mine, wanted)


def check_entries_out_of_range(call: Call):
    """They take no slot."""
    expert = torch.tensor([0, 4, 0, -1, 2**62, 0, 3])
    group = torch.tensor([0, 0, 2, 0, 0, -1, 1])
    active = torch.ones(7, dtype=torch.bool)
    slot_A, demand_GE = call("assign_slots", expert, group, active, 2, 4, -1)
    assert slot_A.tolist() == [0, -1, -1, -1, -1, -1, 0]
    assert demand_GE.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert call("assign_slots", expert, group, active, 0, 4, -1)[0].tolist() == [-1] * 7


# ---------------------------------------------------------------------------------------------- rows
def row_cases(seed=0):
    """Tokens, width, and the token of each row: none, one, many, all the same, some without rows."""
    yield 0, 3, torch.tensor([], dtype=torch.int64)
    yield 4, 5, torch.tensor([], dtype=torch.int64)
    yield 1, 1, torch.tensor([0])
    yield 3, 0, torch.tensor([2, 2])
    yield 6, 33, torch.tensor([5, 0, 0, 5, 2, 0])
    yield 6, 33, torch.tensor([5, -1, 0, 5, 2, -1])  # two that belong to nobody
    yield 2, 64, torch.tensor([1] * 50)
    yield 300, 100, randint(seed, 300, 700)
    yield 40, 300, randint(seed, 40, 90)


def long_row_cases():
    """Rows of several warps, and tokens with 31 to 65 rows: more than a CUDA kernel lists."""
    yield 5, 1032, randint(1, 5, 12)
    yield (
        9,
        24,
        torch.arange(9).repeat_interleave(torch.tensor([31, 0, 32, 1, 33, 0, 64, 65, 2]))[
            torch.randperm(228, generator=torch.Generator().manual_seed(SEED))
        ],
    )


def check_uniform(call: Call) -> None:
    """Every seed, stream, layer, sample and position at its ends, and lanes that fill no block."""
    ends = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 - 1, 2**40, 2**63 - 1])
    sample_T, position_T = ends.repeat_interleave(len(ends)), ends.repeat(len(ends))
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 7 + SEED):
        for stream, layer in ((0, 0), (5, 65535), (255, 1)):
            for lanes, first in ((0, 0), (1, 0), (4, 0), (7, 0), (9, 4), (3, 4 * (2**30 - 1))):
                arguments = (sample_T, position_T, seed, stream, layer, lanes, first)
                assert_same_bits(call("uniform", *arguments), reference.uniform(*arguments))
    none = ends[:0]
    assert_same_bits(call("uniform", none, none, 3, 1, 0, 5, 0), torch.empty(0, 5))


def check_permute(call: Call, tokens, width, token_N, dtype):
    x_TD = randn(0, tokens, width, dtype=dtype)
    assert_same_bits(call("permute", x_TD, token_N), reference.permute(x_TD, token_N))


def check_combine(call: Call, tokens, width, token_N, dtype, weight_dtype):
    rows_ND = randn(1, len(token_N), width, dtype=dtype)
    weight_N = None if weight_dtype is None else randn(2, len(token_N), dtype=weight_dtype)
    arguments = (rows_ND, weight_N, token_N, tokens)
    assert_same_bits(call("combine", *arguments), reference.combine(*arguments))


def check_combine_backward(call: Call, tokens, width, token_N, dtype, weight_dtype):
    d_y_TD, rows_ND = randn(3, tokens, width, dtype=dtype), randn(1, len(token_N), width, dtype=dtype)
    weight_N = randn(2, len(token_N), dtype=weight_dtype)
    arguments = (d_y_TD, rows_ND, weight_N, token_N)
    d_rows_ND, d_weight_N = call("combine_backward", *arguments)
    wanted_ND, wanted_N = reference.combine_backward(*arguments)
    assert_same_bits(d_rows_ND, wanted_ND)
    assert d_weight_N.dtype == weight_dtype
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(d_weight_N, wanted_N, rtol=64 * eps, atol=64 * eps * max(width, 1) ** 0.5)


def check_special_numbers(call: Call, dtype):
    """NaN, infinities, overflow and underflow of the 16-bit types round as torch rounds them."""
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-7, 6e-8, 1e-40, 65504.0, 65520.0, 3.39e38, 1.0]
    rows_ND = torch.tensor(special * 75, dtype=torch.float64).view(3, -1).to(dtype)
    token_N = torch.tensor([0, 1, 1])
    most_nan = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)  # adding to its bits overflows
    for weight in (*torch.tensor([1.0, 1.00390625, -3.1, torch.inf]), most_nan):
        arguments = (rows_ND, weight.repeat(3), token_N, 2)
        assert_same_bits(call("combine", *arguments), reference.combine(*arguments))


def check_strides(call: Call):
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


def check_alignment(call: Call, tokens):
    """Rows of whole vectors that do not begin where vectors may begin."""
    token_N = randint(0, tokens, 60)
    x_TD, rows_ND = randn(1, tokens * 32 + 1)[1:].view(tokens, 32), randn(2, 60 * 32 + 1)[1:].view(60, 32)
    assert_same_bits(call("permute", x_TD, token_N), reference.permute(x_TD, token_N))
    assert_same_bits(
        call("combine", rows_ND, None, token_N, tokens), reference.combine(rows_ND, None, token_N, tokens)
    )


def check_rows_out_of_range(call: Call, tokens):
    """Rows of tokens that do not exist are left out of sums; what would have come from the token is zero."""
    token_N = randint(0, tokens, 60)
    wrong = torch.tensor([0, 17, 18, 59])
    token_N[wrong] = torch.tensor([-1, tokens, 2**62, -(2**62)])
    right = torch.tensor([n for n in range(60) if n not in wrong])
    x_TD, rows_ND, weight_N = randn(1, tokens, 24), randn(2, 60, 24), randn(3, 60)
    for got, wanted in (
        (call("permute", x_TD, token_N), reference.permute(x_TD, token_N[right])),
        *zip(
            call("combine_backward", x_TD, rows_ND, weight_N, token_N),
            reference.combine_backward(x_TD, rows_ND[right], weight_N[right], token_N[right]),
            strict=True,
        ),
    ):
        assert_near(got[right], wanted)
        assert (got[wrong] == 0).all()
    assert_same_bits(
        call("combine", rows_ND, weight_N, token_N, tokens),
        reference.combine(rows_ND[right], weight_N[right], token_N[right], tokens),
    )
