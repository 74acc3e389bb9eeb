"""Noise on logits and inputs: where it goes, what it is keyed by, and what it makes smooth."""

from __future__ import annotations

import pytest
import torch

from epmoe.config import ModelConfig, MoEConfig
from epmoe.config_routers import SmoothingOptions
from epmoe.models.decoder import Decoder
from epmoe.moe.expert_outputs import run_experts
from epmoe.moe.smoothing import smoothed_probability
from epmoe.ops import philox
from epmoe.types import TokenContext
from tests.oracle import mixture as oracle
from tests.oracle import noisy, routing
from tests.oracle import philox as oracle_philox
from tests.oracle.capacity import assign_slots
from tests.oracle.layer import combine, ffn_experts, router_logits
from tests.unit.moe.helpers import LAYER, SEED, close, config, context, make_layer, tokens

SMOOTHING_STREAM = 6


def smoothed(**smoothing):
    """Top-2 of four experts with smoothing, dropless."""
    router = {"name": "topk", "smoothing": smoothing}
    return MoEConfig(num_experts=4, capacity_factor=None, top_k=2, router=router)


def oracle_copies(x_BSD, sample_B, draws, sigma):
    """x + sigma * eps: lane d of copy i is lane i * (D rounded up to 4) + d."""
    num_sequences, seq_len, width = x_BSD.shape
    stride = -(-width // 4) * 4
    copies = []
    for i in range(draws):
        rows = []
        for b in range(num_sequences):
            for s in range(seq_len):
                lanes = range(i * stride, i * stride + width + width % 2)
                u = [
                    oracle_philox.draw(SEED, SMOOTHING_STREAM, LAYER, int(sample_B[b]), s, lane)
                    for lane in lanes
                ]
                eps = [z for pair in zip(u[::2], u[1::2], strict=True) for z in noisy.box_muller(pair)]
                rows.append([x_BSD[b, s, d].item() + sigma * eps[d] for d in range(width)])
        copies.append(torch.tensor(rows, dtype=torch.float64).view(-1, width))
    return copies


def oracle_decision(layer, x_TD):
    return routing.topk(router_logits(x_TD, layer.router.weight), [True] * x_TD.shape[0], k=2, normalize=True)


@pytest.mark.parametrize("reroute", [False, True])
@pytest.mark.parametrize("d_model", [4, 3])
def test_the_output_is_the_mean_over_noisy_inputs(d_model, reroute):
    layer = make_layer(smoothed(draws=3, sigma=0.4, reroute=reroute), d_model=d_model)
    x_BSD = tokens(2, 3, d_model)
    ctx = context(x_BSD)
    y_BSD, report = layer(x_BSD, ctx)
    experts = ffn_experts(layer.experts.w_in, layer.experts.w_out, "swiglu")
    total, decisions = 0.0, []
    for copy_TD in oracle_copies(x_BSD, ctx.sample_B, 3, 0.4):
        decisions.append(oracle_decision(layer, copy_TD if reroute else x_BSD.flatten(0, 1)))
        kept = assign_slots(decisions[-1].assignments, [0] * 6, None)
        total = total + combine(copy_TD, decisions[-1], kept, experts)
    close(y_BSD.flatten(0, 1), total / 3, 1e-12)
    assert report.metrics.assignments.item() == 12, "a token is counted once"
    chosen = [sum(a.expert == e for a in decisions[0].assignments) for e in range(4)]
    assert report.metrics.demand_E.tolist() == chosen
    plain = make_layer(config("top2", num_experts=4, capacity_factor=None), d_model=d_model)
    if not reroute:
        for name, loss in plain(x_BSD, ctx)[1].losses.items():
            assert report.losses[name].item() == loss.item()
            (gradient,) = torch.autograd.grad(report.losses[name], layer.router.weight, retain_graph=True)
            assert gradient.abs().max() > 0
    assert torch.equal(layer.eval()(x_BSD)[0], plain.eval()(x_BSD)[0]), "evaluation sees the input itself"


def test_losses_of_rerouted_copies_are_averaged():
    layer = make_layer(smoothed(draws=4, sigma=0.5, reroute=True))
    x_BSD = tokens(1, 5)
    ctx = context(x_BSD)
    report = layer(x_BSD, ctx)[1]
    plain = make_layer(config("top2", num_experts=4, capacity_factor=None))
    copies = oracle_copies(x_BSD, ctx.sample_B, 4, 0.5)
    each = [plain(copy_TD.view_as(x_BSD), ctx)[1].losses for copy_TD in copies]
    for name, loss in report.losses.items():
        assert loss.item() == pytest.approx(sum(losses[name].item() for losses in each) / 4, rel=1e-12)


def test_expert_outputs_are_smoothed_too():
    layer = make_layer(smoothed(draws=3, sigma=0.4))
    x_BSD = tokens(2, 3)
    ctx = context(x_BSD)
    found = run_experts(layer, x_BSD, ctx)
    close(found.y_BSO, layer(x_BSD, ctx)[0].detach(), 1e-14)
    mixed_TO = (found.logits_TK.softmax(-1).unsqueeze(-1) * found.outputs_TKO).sum(1)
    close(mixed_TO.view_as(x_BSD), found.y_BSO.detach(), 1e-12)


@pytest.mark.parametrize("gate", ["uniform", "normal"])
def test_noise_of_the_gate(gate):
    """It moves decisions in training, is off in evaluation, and the router's weight starts at zero."""
    layer = make_layer(smoothed(gate=gate))
    x_BSD = tokens(1, 64)
    plain = make_layer(config("top2", num_experts=4, capacity_factor=None))
    ctx = context(x_BSD)
    noise_TE = (layer.route(x_BSD, ctx).logits_TE - plain.route(x_BSD, ctx).logits_TE).detach()
    if gate == "uniform":
        assert 0 <= noise_TE.min() < 0.05 < 0.95 < noise_TE.max() < 1
    else:
        assert abs(noise_TE.std().item() - 1) < 0.15
    assert torch.equal(layer.eval()(x_BSD)[0], plain.eval()(x_BSD)[0])
    model = ModelConfig(d_model=8, num_layers=1, num_heads=2, d_ff=12)
    moe = MoEConfig(every=1, num_experts=4, router={"name": "switch", "smoothing": {"gate": gate}})
    decoder = Decoder(model, moe, vocab_size=11, seed=0)
    assert not decoder.blocks[0].moe.router.weight.any()
    ids_BS = torch.arange(22).remainder(11).view(2, 11)
    _, (report,) = decoder(ids_BS, TokenContext(sample_B=torch.arange(2)))
    assert (report.metrics.demand_E > 0).all(), "the noise alone spreads the tokens"


def test_noise_needs_to_know_the_samples():
    x_BSD = tokens(1, 4)
    for smoothing in ({"gate": "uniform"}, {"draws": 2}):
        layer = make_layer(smoothed(**smoothing))
        with pytest.raises(ValueError, match="sample_B"):
            layer(x_BSD)
        layer.eval()(x_BSD)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("noisy_topk", "own"),
        ("hierarchical", "own"),
        ("hash", "a table has none"),
        ("task", "the task's"),
        ("sentence", "mean over a document"),
    ],
)
def test_noise_is_for_logits_of_a_token_that_have_none_yet(name, reason):
    with pytest.raises(ValueError, match=rf"smoothing.gate=uniform.*{reason}.*router: topk"):
        MoEConfig(router={"name": name, "smoothing": {"gate": "uniform"}})
    smoothed_input = MoEConfig(router={"name": name, "smoothing": {"draws": 2, "sigma": 0.5}})
    layer, plain = make_layer(smoothed_input), make_layer(MoEConfig(router=name))
    x_BSD = tokens(1, 4)
    assert not torch.equal(layer(x_BSD, context(x_BSD))[0], plain(x_BSD, context(x_BSD))[0])


def test_a_layer_without_choices_is_not_smoothed():
    with pytest.raises(ValueError, match=r"smoothing=.*does not apply to router soft"):
        MoEConfig(router={"name": "soft", "smoothing": {"draws": 2}})


def test_smoothed_probabilities():
    """Counted as the oracle counts, and E^2-Lipschitz in the logits up to what the draws leave open."""
    generator = torch.Generator().manual_seed(3)
    logits_TE = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    noise_NTE = torch.rand(40, 6, 3, generator=generator, dtype=torch.float64)
    noise_NTE[:2] = 0.5
    logits_TE[0] = 0.5  # ties
    got_TE = smoothed_probability(logits_TE, noise_NTE)
    assert got_TE.tolist() == oracle.smoothed_probability(logits_TE, noise_NTE)
    many_NTE = torch.rand(20_000, 6, 3, generator=generator, dtype=torch.float64)
    for step in (1e-3, 0.02, 0.1):
        moved_TE = logits_TE + step * (2 * torch.rand(6, 3, generator=generator) - 1)
        change = (smoothed_probability(moved_TE, many_NTE) - smoothed_probability(logits_TE, many_NTE)).abs()
        assert change.max() <= 9 * (moved_TE - logits_TE).abs().max() + 0.01
    hard = smoothed_probability(logits_TE, torch.zeros(1, 6, 3))
    assert set(hard.unique().tolist()) == {0.0, 1.0}


def test_draws_may_start_at_any_block_of_lanes():
    sample_T, position_T = torch.tensor([2**33, 5]), torch.tensor([0, 7])
    place = (3, philox.SMOOTHING, 1, sample_T, position_T)
    for draw in (philox.uniform, philox.normal):
        assert torch.equal(draw(*place, 3, 8), draw(*place, 11)[:, 8:])


def test_defaults_smooth_nothing():
    assert SmoothingOptions() == SmoothingOptions(gate="none", draws=0)
    layer, plain = make_layer(smoothed()), make_layer(config("top2", num_experts=4, capacity_factor=None))
    x_BSD = tokens(1, 4)
    assert torch.equal(layer(x_BSD)[0], plain(x_BSD)[0])
