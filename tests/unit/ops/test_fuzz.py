"""Every operator on arguments that hypothesis makes up: the serving kernel, the reference and a naive loop agree.

Any shape down to none, every dtype, memory in any order, numbers that are not finite, ties, all to one, all dropped.
Without native kernels the first two are the same.
"""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe import ops
from epmoe.ops import reference
from tests.oracle import cases, routing
from tests.oracle.capacity import assign_slots, demand
from tests.oracle.philox import draw
from tests.oracle.routing import Assignment
from tests.unit.ops.helpers import LAYOUTS, as_tuple, call, laid_out, plain
from tests.unit.ops.twins import FLOATING, WIDE, assert_near, assert_same_bits, randint, randn

SEEDS, LAYOUT = st.integers(0, 2**32 - 1), st.sampled_from(LAYOUTS)
SPECIAL = st.sampled_from(
    [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1.0 + 2**-23, -3.5, 1e30, -1e30, 1e-40, 80.0]
)
EXACT = 1e-12
NEEDS = list(itertools.product([False, True], repeat=3))


def agree(name, arguments, near=assert_near):
    """What the operator gives: twice the same bits, and what the reference gives."""
    first, again = as_tuple(call(name, *arguments)), as_tuple(call(name, *arguments))
    wanted = as_tuple(plain(name)(*arguments))
    for one, two, other in zip(first, again, wanted, strict=True):
        assert_same_bits(one, two)
        near(one, other)
        assert one.is_contiguous()
    return first


# ------------------------------------------------------------------------------------------- routing
@st.composite
def routings(draw_from):
    """Arguments of ``route_topk`` for which at least one expert can be chosen."""
    tokens, experts = draw_from(st.integers(0, 6)), draw_from(st.integers(1, 12))
    seed = draw_from(SEEDS)
    logits_TE, valid = cases.logits_and_valid(
        draw_from(st.sampled_from(cases.KINDS)), tokens, experts, seed % 1000
    )
    if draw_from(st.booleans()):
        values = draw_from(st.lists(SPECIAL, min_size=1, max_size=12))
        count = tokens * experts
        logits_TE = torch.tensor((values * (count + 1))[:count], dtype=torch.float64).view(tokens, experts)
    dtype = draw_from(st.sampled_from(WIDE))
    logits_TE = laid_out(logits_TE.to(dtype), draw_from(LAYOUT))
    valid_T = laid_out(torch.tensor(valid, dtype=torch.bool), draw_from(LAYOUT))
    policy = draw_from(st.sampled_from(["all", "none", "threshold", "random"])) if experts > 1 else "all"
    top_k = draw_from(st.integers(1 if policy == "all" else 2, experts))
    uniform_T, sample_T, position_T = None, None, None
    if draw_from(st.booleans()):
        dtype = draw_from(st.sampled_from(WIDE))
        uniform_T = laid_out(torch.tensor(cases.uniforms(tokens, seed), dtype=dtype), draw_from(LAYOUT))
    else:
        sample_T = laid_out(randint(seed, 2**40, tokens), draw_from(LAYOUT))
        position_T = laid_out(randint(seed + 1, 2**32, tokens), draw_from(LAYOUT))
    tau = draw_from(st.sampled_from([0.05, 0.3, 0.5, 1.0, 3.0]))
    counters = (draw_from(st.integers(-(2**63), 2**63 - 1)), draw_from(st.integers(0, 2**16 - 1)))
    normalize = draw_from(st.booleans())
    return (logits_TE, valid_T, uniform_T, sample_T, position_T, top_k, normalize, policy, tau, *counters)


def oracle_routing(arguments):
    """The oracle's assignments and probabilities, from the logits as float64."""
    logits_TE, valid_T, uniform_T, sample_T, position_T, top_k, normalize, policy, tau, seed, layer = (
        arguments
    )
    logits_TE = logits_TE.detach().double().requires_grad_()
    decision = routing.topk(logits_TE, valid_T.tolist(), k=top_k, normalize=normalize)
    second = {a.token: a for a in decision.assignments if a.choice == 1}
    first = {a.token: a for a in decision.assignments if a.choice == 0}
    for token, a in second.items():
        if policy == "random" and uniform_T is None:
            u = draw(seed % 2**64, 0, layer, int(sample_T[token]), int(position_T[token]), 0)
        else:
            u = None if uniform_T is None else uniform_T[token].item()
        gap = [logits_TE[token, x.expert].item() for x in (first[token], a)]
        if not routing.second_is_used(policy, *gap, tau, u):
            decision.assignments.remove(a)
    return logits_TE, decision


@settings(max_examples=300, deadline=None)
@given(routings())
def test_route_topk_and_its_gradient(arguments):
    probs_TE, ids_TK, weights_TK, active_TK = agree("route_topk", arguments)
    logits_TE, decision = oracle_routing(arguments)
    eps = EXACT if probs_TE.dtype == torch.float64 else 1e-6
    wanted = {(a.token, a.choice): a for a in decision.assignments}
    assert {(t, k) for t, k in active_TK.nonzero().tolist()} == set(wanted)
    assert all(ids_TK[index] == a.expert for index, a in wanted.items())
    assert all(len(set(row)) == len(row) and max(row) < logits_TE.shape[1] for row in ids_TK.tolist())
    expected_TK, expected_TE = torch.zeros_like(weights_TK).double(), torch.zeros_like(probs_TE).double()
    for index, a in wanted.items():
        expected_TK[index] = a.weight.detach()
    for token, row in decision.probs.items():
        expected_TE[token] = torch.stack(row).detach()
    torch.testing.assert_close(weights_TK.double(), expected_TK, rtol=0, atol=eps)
    torch.testing.assert_close(probs_TE.double(), expected_TE, rtol=0, atol=eps)
    check_routing_gradient(arguments, decision, logits_TE, eps)


def check_routing_gradient(arguments, decision, oracle_TE, eps):
    """Of sum(weights * f) + sum(probs * g) with respect to the logits, for random f and g in any memory order."""
    top_k, normalize, seed = arguments[5], arguments[6], arguments[9]
    probs_TE, ids_TK, _, active_TK = reference.route_topk(*arguments)
    f_TK = laid_out(randn(seed % 999, *ids_TK.shape, dtype=probs_TE.dtype), LAYOUTS[seed % 6])
    g_TE = laid_out(randn(seed % 998, *probs_TE.shape, dtype=probs_TE.dtype), LAYOUTS[top_k % 6])
    (d_logits_TE,) = agree("route_topk_backward", (g_TE, f_TK, probs_TE, ids_TK, active_TK, normalize))
    total = torch.zeros((), dtype=torch.float64)
    for a in decision.assignments:
        total = total + a.weight * f_TK[a.token, a.choice]
    for token, row in decision.probs.items():
        total = total + sum(p * g for p, g in zip(row, g_TE[token], strict=True))
    expected_TE = torch.zeros_like(oracle_TE)
    if total.requires_grad:
        expected_TE = torch.autograd.grad(total, oracle_TE)[0]
    usable = sorted(decision.probs)
    finite_TE = oracle_TE.detach().isfinite()  # the oracle's own derivative at -inf is NaN; 0 is meant
    torch.testing.assert_close(
        d_logits_TE[usable].double(),
        expected_TE[usable].masked_fill(~finite_TE[usable], 0.0),
        rtol=0,
        atol=30 * eps,
    )
    others = [token for token in range(len(oracle_TE)) if token not in decision.probs]
    assert (d_logits_TE[others] == 0).all(), "a token that is not routed sends no gradient"


# --------------------------------------------------------------------------------------------- slots
@st.composite
def slot_lists(draw_from):
    groups, experts = draw_from(st.integers(0, 3)), draw_from(st.integers(0, 5))
    size = draw_from(st.integers(0, 40))
    seed, how = draw_from(SEEDS), draw_from(st.sampled_from(["some", "all", "none", "to_one"]))
    active_A = {"some": randint(seed, 3, size) > 0, "none": torch.zeros(size, dtype=torch.bool)}.get(
        how, torch.ones(size, dtype=torch.bool)
    )
    if groups * experts == 0:
        active_A = torch.zeros(size, dtype=torch.bool)
    expert_A = randint(seed + 1, experts, size) if how != "to_one" else torch.zeros(size, dtype=torch.int64)
    group_A = randint(seed + 2, groups, size)
    active_A = laid_out(active_A, draw_from(LAYOUT))
    anything_A = randint(seed + 3, 2**62, size) - 2**61  # in entries that nobody reads
    expert_A = laid_out(torch.where(active_A, expert_A, anything_A), "strided")
    group_A = laid_out(torch.where(active_A, group_A, -anything_A), draw_from(st.sampled_from(LAYOUTS[:4])))
    capacity = draw_from(st.sampled_from([-1, 0, 1, 2, 5, 2**63 - 1]))
    return expert_A, group_A, active_A, groups, experts, capacity


@settings(max_examples=300, deadline=None)
@given(slot_lists())
def test_assign_slots(arguments):
    expert_A, group_A, active_A, groups, experts, capacity = arguments
    slot_A, demand_GE = agree("assign_slots", arguments)
    weight = torch.ones((), dtype=torch.float64)
    entries = enumerate(zip(expert_A.tolist(), active_A.tolist(), strict=True))
    wishes = [Assignment(i, 0, expert, weight) for i, (expert, active) in entries if active]
    kept = assign_slots(wishes, group_A.tolist(), None if capacity == ops.DROPLESS else capacity)
    assert slot_A.tolist() == [kept.get((i, 0), -1) for i in range(expert_A.numel())]
    assert demand_GE.tolist() == demand(wishes, group_A.tolist(), groups, experts)


# ---------------------------------------------------------------------------------------------- rows
@st.composite
def row_lists(draw_from):
    """Tokens, rows [N, D], weights, the token of each row, and one vector per token."""
    tokens = draw_from(st.integers(0, 7))
    rows = draw_from(st.integers(0, 20))
    width = draw_from(st.sampled_from([0, 1, 2, 7, 31, 32, 33, 64, 71]))
    dtype, weight_dtype = draw_from(st.sampled_from(FLOATING)), draw_from(st.sampled_from(FLOATING))
    seed, unfilled = draw_from(SEEDS), draw_from(st.sampled_from([0, 2, 4]))
    token_N = randint(seed + 2, tokens, rows)
    token_N[(randint(seed + 4, 4, rows) < unfilled) | (tokens == 0)] = ops.UNFILLED
    rows_ND = randn(seed, rows, width, dtype=dtype)
    if rows_ND.numel() and draw_from(st.integers(0, 3)) == 0:
        for at, value in enumerate(draw_from(st.lists(SPECIAL, max_size=5))):
            rows_ND.view(-1)[at * 13 % rows_ND.numel()] = value
    return (
        tokens,
        laid_out(rows_ND, draw_from(LAYOUT)),
        laid_out(randn(seed + 1, rows, dtype=weight_dtype), draw_from(LAYOUT)),
        laid_out(token_N, draw_from(LAYOUT)),
        laid_out(randn(seed + 3, tokens, width, dtype=dtype), draw_from(LAYOUT)),
    )


def assert_within(one, exact, terms, summed_in):
    """As close to the exact sum as rounding allows, ``terms`` being the sum of absolute values; where a term is not
    finite, the sum is not."""
    result, sums_up = torch.finfo(one.dtype), torch.finfo(summed_in)
    rounding = max(result.eps if result.bits < 64 else 0.0, 2.0**-18 if sums_up.bits < 64 else EXACT)
    allowed = terms * rounding + max(result.smallest_normal, sums_up.smallest_normal)
    in_range = terms <= min(result.max, sums_up.max)
    assert ((one.double() - exact).abs() <= allowed)[in_range].all()
    assert not one[~terms.isfinite()].isfinite().any()


def sums(terms_ND, token_N, tokens):
    """Row by row, those that belong to a token."""
    y_TD = torch.zeros(tokens, terms_ND.shape[1], dtype=torch.float64)
    for row_D, token in zip(terms_ND, token_N.tolist(), strict=True):
        if token != ops.UNFILLED:
            y_TD[token] += row_D
    return y_TD


def moved(x_TD, token_N):
    """The row of each token, zeros where there is none."""
    nothing_D = x_TD.new_zeros(x_TD.shape[1])
    rows = [nothing_D if t == ops.UNFILLED else x_TD[t] for t in token_N.tolist()]
    return torch.stack(rows) if rows else x_TD.new_zeros(0, x_TD.shape[1])


@settings(max_examples=250, deadline=None)
@given(row_lists(), st.booleans())
def test_permute_and_combine(lists, weighted):
    tokens, rows_ND, weight_N, token_N, x_TD = lists
    (moved_ND,) = agree("permute", (x_TD, token_N), assert_same_bits)
    assert moved_ND.tolist() == moved(x_TD, token_N).tolist()
    weight_N = weight_N if weighted else None
    (y_TD,) = agree("combine", (rows_ND, weight_N, token_N, tokens), assert_same_bits)
    factor_N = torch.ones(len(token_N)) if weight_N is None else weight_N
    compute = torch.promote_types(rows_ND.dtype, torch.float32)
    terms_ND = rows_ND.double() * factor_N.to(compute).double().unsqueeze(1)
    assert_within(y_TD, sums(terms_ND, token_N, tokens), sums(terms_ND.abs(), token_N, tokens), compute)


@settings(max_examples=250, deadline=None)
@given(row_lists())
def test_combine_backward(lists):
    _, rows_ND, weight_N, token_N, d_y_TD = lists
    compute = torch.promote_types(rows_ND.dtype, torch.float32)
    d_y_ND, filled_N1 = moved(d_y_TD, token_N).double(), (token_N != ops.UNFILLED).unsqueeze(1)
    terms_ND = torch.where(filled_N1, d_y_ND * rows_ND.double(), 0.0)  # an unfilled row may hold anything

    def near(one, other):
        if one.dim() == 2:
            assert_same_bits(one, other)
            factor_ND = weight_N.to(compute).double().unsqueeze(1)
            assert_within(one, d_y_ND * factor_ND, (d_y_ND * factor_ND).abs(), compute)
        else:
            for d_weight_N in (one, other):
                assert d_weight_N.dtype == weight_N.dtype
                assert_within(d_weight_N, terms_ND.sum(1), terms_ND.abs().sum(1), compute)

    agree("combine_backward", (d_y_TD, rows_ND, weight_N, token_N), near)


# ------------------------------------------------------------------------------------------- experts
@st.composite
def blocks(draw_from):
    """Rows, stacked matrices and rows per expert."""
    dtype, seed = draw_from(st.sampled_from(FLOATING)), draw_from(SEEDS)
    counts = draw_from(st.lists(st.sampled_from([0, 0, 1, 2, 5]), max_size=4))
    rows = sum(counts)
    d, f = draw_from(st.integers(0, 5)), draw_from(st.integers(0, 5))
    weight = randn(seed, len(counts), d, f, dtype=dtype)
    return (
        laid_out(randn(seed + 1, rows, d, dtype=dtype), draw_from(LAYOUT)),
        laid_out(weight.transpose(1, 2).contiguous().transpose(1, 2), draw_from(LAYOUT)),
        laid_out(torch.tensor(counts, dtype=torch.int64), draw_from(st.sampled_from(LAYOUTS[:4]))),
        laid_out(randn(seed + 2, rows, f, dtype=dtype), draw_from(LAYOUT)),
    )


@settings(max_examples=250, deadline=None)
@given(blocks(), st.sampled_from(ops.ACTIVATIONS), st.booleans(), st.booleans(), st.sampled_from(NEEDS))
def test_experts(arguments, kind, weighted, even, needs):
    """The values of activations are tested elsewhere; here the native kernel and the plain one, in any memory order."""
    rows_RD, w_in_LDX, counts_L, hidden_RX = arguments
    if kind == "swiglu":
        w_in_LDX, hidden_RX = torch.cat((w_in_LDX, w_in_LDX), 2), torch.cat((hidden_RX, hidden_RX), 1)
    (num_rows, columns), dtype = hidden_RX.shape, rows_RD.dtype
    width = columns // (2 if kind == "swiglu" else 1)
    w_out_LFD = laid_out(randn(3, len(counts_L), width, 3, dtype=dtype), "offset")
    even = even and len(set(counts_L.tolist())) == 1
    more = (
        laid_out(randn(1, num_rows), "strided") if weighted else None,
        w_in_LDX,
        w_out_LFD,
        counts_L,
        int(counts_L[0]) if even else None,
    )
    agree("expert_ffn", (rows_RD, *more, kind), near_in_sums)
    hidden_RX = laid_out(hidden_RX, "transposed")
    d_y_RD = laid_out(randn(2, num_rows, 3, dtype=dtype), "transposed")
    agree("expert_ffn_backward", (d_y_RD, rows_RD, *more, hidden_RX, kind, *needs), near_in_sums)


def near_in_sums(one, other):
    """Sums of few numbers around 1 in any order."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    allowed = (
        64
        * torch.finfo(one.dtype).eps
        * max(1.0, other.double().abs().max().item() if other.numel() else 0.0)
    )
    torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=allowed)


# ------------------------------------------------------------------------------------------- threads
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([1, 3, 17, 64]), st.sampled_from(WIDE), SEEDS)
def test_threads_change_no_bit(tokens, width, dtype, seed):
    """Around the sizes at which work is split."""
    logits_TE, token_N = randn(seed, tokens, width, dtype=dtype), randint(seed, tokens, 2 * tokens)
    rows_ND, weight_N = randn(seed + 1, 2 * tokens, width, dtype=dtype), randn(seed + 2, 2 * tokens)
    routing = (logits_TE, torch.ones(tokens, dtype=torch.bool), None, None, None, 1, False, "all", 0.5, 0, 0)
    calls = [
        ("route_topk", routing),
        ("permute", (logits_TE, token_N)),
        ("combine", (rows_ND, weight_N, token_N, tokens)),
        ("combine_backward", (logits_TE, rows_ND, weight_N, token_N)),
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [out for name, arguments in calls for out in agree(name, arguments, lambda *_: None)]
        torch.set_num_threads(3)
        together = [out for name, arguments in calls for out in agree(name, arguments, lambda *_: None)]
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert_same_bits(one, other)
