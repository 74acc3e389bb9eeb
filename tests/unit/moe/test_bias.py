"""Balance without a loss: the bias of DeepSeek-V3's router, and who moves it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from epmoe.config import MoEConfig
from epmoe.config_routers import DeepSeekOptions
from epmoe.moe.routers import deepseek
from epmoe.types import RouterInputs
from tests.oracle.deepseek import moved_bias
from tests.unit.moe.helpers import config, context, make_layer, tokens


def decide(logits, bias, top_k, **options):
    inputs = RouterInputs(
        logits_TE=torch.tensor(logits, dtype=torch.float64, requires_grad=True),
        valid_T=torch.ones(len(logits), dtype=torch.bool),
        bias_E=torch.tensor(bias, dtype=torch.float64),
    )
    return inputs, deepseek.route(inputs, DeepSeekOptions(**options), top_k)


@pytest.mark.parametrize("counts", [[3, 1, 2, 2], [0, 0, 0, 0], [7, 0, 0, 1], [5, 5, 5, 5]])
def test_a_step_moves_the_bias_towards_balance(counts):
    before = torch.tensor([0.5, -0.25, 0.0, 1.0], dtype=torch.float64)
    after = deepseek.balance_step(before, torch.tensor(counts), DeepSeekOptions(bias_rate=0.125), 3)
    assert after.tolist() == moved_bias(before.tolist(), counts, 0.125)


def test_the_bias_stops_moving_when_it_is_told_to():
    bias, counts = torch.zeros(3), torch.tensor([4, 1, 1])
    for options, step, moves in (
        (DeepSeekOptions(bias_steps=10), 9, True),
        (DeepSeekOptions(bias_steps=10), 10, False),
        (DeepSeekOptions(bias_rate=0.0), 0, False),
    ):
        assert bool(deepseek.balance_step(bias, counts, options, step).any()) == moves
    layer = make_layer(MoEConfig(num_experts=4, router={"name": "deepseek", "bias_rate": None}))
    assert list(layer.router.buffers()) == []
    layer.router.after_step(torch.tensor([1, 2, 3, 4]), 0)


def test_the_bias_chooses_and_does_not_weigh():
    """Expert 2 is chosen for its bias; the weights are the sigmoids of 1 and -1, rescaled and times 2.5."""
    inputs, routed = decide([[1.0, 0.5, -1.0]], [0.0, 0.0, 2.0], 2, scale=2.5)
    assert routed.expert_A.tolist() == [2, 0]
    s = torch.tensor([-1.0, 1.0], dtype=torch.float64).sigmoid()
    assert torch.allclose(routed.weight_A, 2.5 * s / s.sum(), rtol=0, atol=1e-12)
    routed.weight_A[0].backward()
    assert inputs.logits_TE.grad[0, 1] == 0
    assert inputs.logits_TE.grad[0, 2] != 0


def test_a_closed_group_never_wins_against_negative_scores():
    """Every biased score is negative, so that closed groups set to 0 instead of -inf would be chosen."""
    _, routed = decide([[0.0, 0.0, -1.0, -1.0]], [-1.0] * 4, 2, num_groups=2, groups_kept=1)
    assert sorted(routed.expert_A.tolist()) == [0, 1]


def test_a_group_is_worth_its_available_experts():
    """Expert 1 is not available; expert 0 alone is worth more than the two of the other group."""
    _, routed = decide([[5.0, -torch.inf, 0.0, 0.1]], [-0.4] * 4, 2, num_groups=2, groups_kept=1)
    assert routed.expert_A[routed.active_A].tolist() == [0]


def test_group_scores():
    """The best single expert is in the second group, the best pair in the first."""
    logits = [[1.0, 0.9, 1.5, -2.0]]
    for group_score, group in (("top2", 0), ("max", 1)):
        _, routed = decide(logits, [0.0] * 4, 2, num_groups=2, groups_kept=1, group_score=group_score)
        assert {expert // 2 for expert in routed.expert_A.tolist()} == {group}


def test_only_the_training_step_moves_the_bias():
    """Not a forward pass, not evaluation, not recomputation, which reports its counts once."""
    layer = make_layer(config("v3", num_experts=4, capacity_factor=1.0, min_capacity=0))
    before = layer.router.bias.clone()
    x_BSD = tokens(2, 8).requires_grad_()
    demands = []
    for run in (layer, lambda x, ctx: checkpoint(layer, x, ctx, use_reentrant=False)):
        y_BSD, report = run(x_BSD, context(x_BSD))
        y_BSD.square().sum().backward()
        demands.append(report.metrics.demand_E)
    layer.eval()(x_BSD)
    assert torch.equal(layer.router.bias, before)
    assert torch.equal(*demands)
    layer.router.after_step(demands[0], 0)
    assert (layer.router.bias - before).abs().max().item() == pytest.approx(0.001)
    assert "bias" in layer.router.state_dict()
    assert "bias" not in dict(layer.router.named_parameters())


def test_the_bias_brings_a_skewed_router_into_balance():
    router = {"name": "deepseek", "bias_rate": 0.005}
    moe = MoEConfig(num_experts=4, top_k=1, capacity_factor=None, router=router)
    layer = make_layer(moe, scale=0.3)
    layer.router.bias.zero_()
    x_BSD = tokens(4, 64) + torch.tensor([2.0, 0.0, 0.0, 0.0])
    busiest = []
    for step in range(60):
        demand_E = layer(x_BSD, context(x_BSD))[1].metrics.demand_E
        busiest.append(demand_E.max().item() * 4 / 256)
        layer.router.after_step(demand_E, step)
    assert busiest[0] > 1.8
    assert busiest[-1] < 1.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3}, "valid values: 1, 2, 4, 8"),
        ({"num_groups": 2, "groups_kept": 3}, "groups_kept=3 is larger than num_groups=2"),
        ({"num_groups": 8, "groups_kept": 1}, "keep at least 2"),
    ],
)
def test_impossible_groups_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(router={"name": "deepseek", **options})


@pytest.mark.parametrize("router", ["switch", "deepseek"])
@pytest.mark.parametrize("loss", ["device_balance", "communication_balance"])
def test_losses_over_groups_need_groups(router, loss):
    with pytest.raises(ValueError, match=f"losses={loss}.*hierarchical, deepseek"):
        MoEConfig(router=router, losses={loss: 0.1})
