"""``route_topk``: decisions exactly, weights and gradients to rounding, as the oracle says."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from epmoe import ops
from tests.oracle import cases, routing
from tests.oracle.philox import draw

SHAPES = [(tokens, experts) for tokens in (0, 1, 7, 64) for experts in (1, 2, 5, 8)]
POLICIES = [
    ("all", 0.5),
    ("none", 0.5),
    ("random", 0.5),
    ("random", 0.2),
    ("random", 1.0),
    ("threshold", 0.3),
]


def run(
    logits, valid, k, normalize, policy="all", tau=0.5, uniform=None, seed=0, layer=0, counters=(None, None)
):
    """The operator with the oracle's arguments."""
    uniform_T = None if uniform is None else torch.tensor(uniform, dtype=torch.float32)
    valid_T = torch.tensor(valid, dtype=torch.bool)
    return ops.route_topk(logits, valid_T, uniform_T, *counters, k, normalize, policy, tau, seed, layer)


def compare(output, decision, experts):
    """Integers exactly, probabilities and weights to 1e-12, inactive entries neutral."""
    probs_TE, ids_TK, weights_TK, active_TK = output
    wanted = {(a.token, a.choice): a for a in decision.assignments}
    active = {(t, c) for t, c in active_TK.nonzero().tolist()}
    assert active == set(wanted)
    assert ((ids_TK >= 0) & (ids_TK < experts)).all()
    for (token, choice), a in wanted.items():
        assert ids_TK[token, choice] == a.expert
        assert abs(weights_TK[token, choice].item() - a.weight.item()) < 1e-12
    assert (weights_TK[~active_TK] == 0).all()
    expected_TE = torch.zeros_like(probs_TE)
    for token, row in decision.probs.items():
        expected_TE[token] = torch.tensor([p.item() for p in row], dtype=torch.float64)
    assert torch.allclose(probs_TE, expected_TE, rtol=0, atol=1e-12)


def check_gradient(logits, valid, run_op, run_oracle):
    """d(sum of weights and probabilities, each times its own factor)/d(logits) on both sides."""
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    probs_TE, _, weights_TK, _ = run_op(mine)
    factor_TE = torch.linspace(-1, 2, probs_TE.numel(), dtype=torch.float64).view_as(probs_TE)
    factor_TK = torch.linspace(1, -3, weights_TK.numel(), dtype=torch.float64).view_as(weights_TK)
    ((probs_TE * factor_TE).sum() + (weights_TK * factor_TK).sum()).backward()
    decision = run_oracle(theirs)
    total = torch.zeros((), dtype=torch.float64)
    for a in decision.assignments:
        total = total + a.weight * factor_TK[a.token, a.choice]
    for token, row in decision.probs.items():
        total = total + sum(p * f for p, f in zip(row, factor_TE[token], strict=True))
    expected = torch.zeros_like(logits)
    if total.requires_grad:
        total.backward()
        expected = theirs.grad
    rows = sorted(decision.probs)
    scale = max(expected[rows].abs().max().item() if rows else 0.0, 1.0)
    assert (mine.grad[rows] - expected[rows]).abs().sum() <= 1e-10 * scale
    others = [token for token in range(len(valid)) if token not in decision.probs]
    assert (mine.grad[others] == 0).all(), "a token that is not routed sends no gradient"


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize(("tokens", "experts"), SHAPES)
def test_plain_topk(tokens, experts, kind):
    logits, valid = cases.logits_and_valid(kind, tokens, experts)
    for k in sorted({1, 2, 3, experts} & set(range(1, experts + 1))):
        for normalize in (True, False):
            decision = routing.topk(logits, valid, k=k, normalize=normalize)
            compare(run(logits, valid, k, normalize), decision, experts)


@pytest.mark.parametrize(("policy", "tau"), POLICIES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_gshard_policies(kind, policy, tau):
    for tokens, experts in SHAPES:
        if experts < 2:
            continue
        logits, valid = cases.logits_and_valid(kind, tokens, experts, seed=1)
        uniform = cases.uniforms(tokens)
        decision = routing.gshard_top2(logits, valid, policy=policy, tau=tau, uniform=uniform)
        compare(run(logits, valid, 2, True, policy, tau, uniform), decision, experts)


@pytest.mark.parametrize("experts", [2, 5])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_gradients_equal_the_oracles(kind, tokens, experts):
    logits, valid = cases.logits_and_valid(kind, tokens, experts, seed=2)
    uniform = cases.uniforms(tokens)
    for policy in ("all", "random", "none"):
        check_gradient(
            logits,
            valid,
            lambda h, p=policy: run(h, valid, 2, True, p, 0.5, uniform),
            lambda h, p=policy: routing.gshard_top2(h, valid, policy=p, uniform=uniform),
        )
    for k, normalize in ((1, False), (2, False), (experts, True)):
        check_gradient(
            logits,
            valid,
            lambda h, k=k, n=normalize: run(h, valid, k, n),
            lambda h, k=k, n=normalize: routing.topk(h, valid, k=k, normalize=n),
        )


def test_ties_go_to_the_lowest_expert_even_when_there_are_many():
    ids_TK = run(torch.zeros(3, 64), [True] * 3, 64, True)[1]
    assert ids_TK.tolist() == [list(range(64))] * 3


def test_random_comparison_is_strict_and_hits_the_exact_boundary():
    equal = torch.zeros(2, 3, dtype=torch.float64)  # a2 is exactly one half
    just_below = 0.5 - 2**-24
    active = run(equal, [True] * 2, 2, True, "random", 1.0, [0.5, just_below])[3]
    assert active[:, 1].tolist() == [False, True]
    assert run(equal, [True] * 2, 2, True, "random", 0.5, [1 - 2**-24, 0.0])[3].all()
    assert not run(equal, [True] * 2, 2, True, "threshold", 0.5)[3][:, 1].any()
    assert run(equal, [True] * 2, 2, True, "threshold", 0.499999)[3].all()


def test_the_second_expert_decision_is_made_in_float64_from_both_logits():
    """The difference of float32 logits must not be rounded to float32 before it is used."""
    logits = torch.tensor([[1.0, 1e-9, -5.0]], dtype=torch.float32)
    tau = 1.0 / (1.0 + math.exp(1.0))
    assert routing.second_is_used("threshold", 1.0, logits[0, 1].item(), tau, None)
    assert run(logits, [True], 2, True, "threshold", tau)[3].tolist() == [[True, True]]


def test_counters_and_explicit_uniforms_say_the_same():
    logits, valid = cases.logits_and_valid("random", 64, 5)
    sample = torch.arange(64) // 8 + 2**33
    position = torch.arange(64) % 8
    uniform = [draw(11, 0, 3, int(s), int(p), 0) for s, p in zip(sample, position, strict=True)]
    explicit = run(logits, valid, 2, True, "random", 0.5, uniform)
    counted = run(logits, valid, 2, True, "random", 0.5, None, 11, 3, (sample, position))
    for one, other in zip(explicit, counted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_underflow_still_gives_two_different_experts(dtype):
    logits = torch.tensor([[2000.0, -2000.0, -1999.0]], dtype=dtype)
    _, ids, weights, active = run(logits, [True], 2, True)
    assert ids.tolist() == [[0, 2]]
    assert active.all()
    assert weights.tolist() == [[1.0, 0.0]]


def test_float32_is_close_to_float64():
    logits, valid = cases.logits_and_valid("random", 64, 8)
    single = run(logits.float(), valid, 2, True)
    double = run(logits.float().double(), valid, 2, True)
    assert single[0].dtype == torch.float32
    assert torch.equal(single[1], double[1])
    for one, other in ((single[0], double[0]), (single[2], double[2])):
        assert torch.allclose(one.double(), other, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    logits = torch.tensor([[0.3, -0.2, 1.1], [2.0, 0.1, -1.0]], dtype=torch.float64, requires_grad=True)

    def smooth(h):
        probs, _, weights, _ = run(h, [True, True], 2, normalize)
        return probs, weights

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(smooth, logits)


@pytest.mark.parametrize(
    ("uniform", "counters"),
    [
        (None, (None, None)),
        (None, (torch.arange(4), None)),
        ([0.5] * 4, (torch.arange(4), torch.arange(4))),
        ([0.5] * 4, (None, torch.arange(4))),
    ],
)
def test_a_random_policy_needs_exactly_one_kind_of_draws(uniform, counters):
    logits = torch.zeros(4, 3)
    # A native kernel says the same in a RuntimeError.
    with pytest.raises((ValueError, RuntimeError), match="either uniform or both sample and position"):
        run(logits, [True] * 4, 2, True, "random", 0.5, uniform, counters=counters)
    assert run(logits, [True] * 4, 2, True, "all", 0.5, uniform, counters=counters)[3].all()


def test_input_is_left_alone():
    logits, valid = cases.logits_and_valid("broken", 16, 5)
    before = logits.clone()
    run(logits, valid, 2, True, "random", 0.5, cases.uniforms(16))
    assert torch.equal(logits.nan_to_num(9.0), before.nan_to_num(9.0))
