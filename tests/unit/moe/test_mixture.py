"""Losses of mixtures and EDD against the oracle, their gradients as the papers give them, and what they are fed by."""

from __future__ import annotations

import math

import pytest
import torch

from epmoe.comm.exchange import Exchange
from epmoe.config import Config, MoEConfig
from epmoe.config_routers import EddOptions
from epmoe.moe.build import build_dispatcher, build_moe_layer
from epmoe.moe.dispatch import AllToAllDispatcher
from epmoe.moe.expert_outputs import SOFTMAX_ROUTERS, run_experts
from epmoe.moe.experts import ModuleExperts
from epmoe.moe.mixture import (
    EDD_PRESETS,
    competitive_loss,
    cooperative_loss,
    cross_entropies,
    edd_loss,
    edd_terms,
    mixture_nll,
    posterior,
    squared_errors,
)
from epmoe.moe.routers.dense import route
from epmoe.types import RouterInputs, TokenContext
from tests.oracle import cases, philox
from tests.oracle import mixture as oracle
from tests.oracle.experts import ffn
from tests.unit.moe.helpers import LAYER, SEED, by_name, close, config, context, make_layer, tokens
from tests.unit.moe.test_routers import check_routing

SHAPES = [(0, 3, 2), (1, 1, 1), (6, 1, 3), (5, 2, 1), (9, 4, 3)]


def case(shape, kind="random", seed=0):
    """Logits [T, K], outputs [T, K, O] and targets [T, O]; ``gaps``: experts and whole tokens are missing."""
    num_tokens, width, out = shape
    generator = torch.Generator().manual_seed(17 + seed)

    def normals(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    logits_TK = 2 * normals(num_tokens, width)
    if kind == "gaps":
        for t in range(num_tokens):
            logits_TK[t, [k for k in range(width) if (t + k) % 3 == 0]] = -math.inf
        logits_TK[3::4] = -math.inf
    if kind == "broken":
        logits_TK[::3, 0] = math.nan
        logits_TK[1::3, -1] = math.inf
    return logits_TK, normals(num_tokens, width, out), normals(num_tokens, out)


def evaluated(logits_TK):
    """Which experts of a token are there: none where a logit is broken."""
    return [
        [h > -math.inf and not any(math.isnan(x) or x == math.inf for x in row) for h in row]
        for row in logits_TK.tolist()
    ]


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def same_gradients(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        wanted = torch.zeros_like(other) if other.grad is None else other.grad
        assert one.grad is not None
        assert one.grad.isfinite().all()
        close(one.grad, wanted.nan_to_num(), 1e-12)


@pytest.mark.parametrize("kind", ["random", "gaps", "broken"])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_of_mixtures(shape, kind):
    logits_TK, outputs_TKO, target_TO = case(shape, kind)
    mine, theirs = leaves(logits_TK, outputs_TKO), leaves(logits_TK, outputs_TKO)
    errors_TK = squared_errors(mine[1], target_TO)
    got = {
        "cooperative": cooperative_loss(*mine, target_TO),
        "competitive": competitive_loss(mine[0], errors_TK),
        "mixture_nll": mixture_nll(mine[0], errors_TK / 2),
    }
    counted = [any(row) for row in evaluated(logits_TK)]
    wanted = oracle.mixture_losses(*theirs, target_TO, counted)
    for name, value in wanted.items():
        assert got[name].item() == pytest.approx(value.item(), rel=1e-12, abs=1e-12), name
        for one, other in ((mine, got[name]), (theirs, value + 0 * theirs[1].sum())):
            for leaf in one:
                leaf.grad = None
            other.backward(retain_graph=True)
        same_gradients(mine, theirs)


def test_gradients_are_those_of_the_papers():
    logits_TK, outputs_TKO, target_TO = case((7, 4, 3))
    logits, outputs = leaves(logits_TK, outputs_TKO)
    p, e = logits_TK.softmax(-1), squared_errors(outputs_TKO, target_TO)
    competitive_loss(logits, squared_errors(outputs, target_TO)).backward()
    close(logits.grad, p * (e - (p * e).sum(-1, keepdim=True)), 1e-12)
    logits.grad = outputs.grad = None
    mixture_nll(logits, squared_errors(outputs, target_TO) / 2).backward()
    h = p * torch.exp(-e / 2)
    h = h / h.sum(-1, keepdim=True)
    close(posterior(logits_TK, e / 2), h, 1e-12)
    close(logits.grad, p - h, 1e-12)
    close(outputs.grad, -h.unsqueeze(-1) * (target_TO.unsqueeze(1) - outputs_TKO), 1e-12)


def test_classes():
    """-log sum p q[y], with posterior p q[y]; never from probabilities that underflow."""
    logits_TK, outputs_TKO, _ = case((7, 3, 5))
    label_T = torch.arange(7) % 5
    nll_TK = cross_entropies(outputs_TKO, label_T)
    for t in range(7):
        for k in range(3):
            assert nll_TK[t, k].item() == pytest.approx(
                oracle.cross_entropy(outputs_TKO[t, k], int(label_T[t])).item(), rel=1e-12
            )
    p, q = logits_TK.softmax(-1), torch.exp(-nll_TK)
    assert mixture_nll(logits_TK, nll_TK).item() == pytest.approx(
        -(p * q).sum(-1).log().sum().item(), rel=1e-12
    )
    far = mixture_nll(torch.tensor([[0.0, -3000.0]]), torch.tensor([[5000.0, 1.0]]))
    assert far.item() == pytest.approx(3001.0)
    assert cross_entropies(outputs_TKO.bfloat16(), label_T).dtype == torch.float32


def test_two_levels_mix_the_likelihood_the_same_way():
    """Jordan and Jacobs: -log sum_i g_i sum_j g_{j|i} P_ij, from the two-level gate of the dense router."""
    layer = make_layer(config("dense_groups", num_experts=6))
    x_BSD, target_TO = tokens(1, 5), tokens(1, 5, seed=4)[0]
    found = run_experts(layer, x_BSD)
    nll_TK = squared_errors(found.outputs_TKO, target_TO) / 2
    outer = (x_BSD[0] @ layer.router.group_weight.T).softmax(-1)
    inner = (x_BSD[0] @ layer.router.weight.T).unflatten(1, (2, 3)).softmax(-1)
    wanted = 0.0
    for t in range(5):
        density = 0.0
        for k in range(6):
            i, j = divmod(int(found.expert_TK[t, k]), 3)
            density = density + outer[t, i] * inner[t, i, j] * torch.exp(-nll_TK[t, k])
        wanted = wanted - density.log()
    assert mixture_nll(found.logits_TK, nll_TK).item() == pytest.approx(wanted.item(), rel=1e-12)


# ---------------------------------------------------------------------------------------------------- EDD
@pytest.mark.parametrize("options", [{}, {"similarity": "rbf", "alpha": 0.7}, {"temperature": 0.5}])
@pytest.mark.parametrize("kind", ["random", "gaps", "broken"])
@pytest.mark.parametrize("shape", SHAPES)
def test_edd(shape, kind, options):
    options = EddOptions(**options)
    logits_TK, outputs_TKO, target_TO = case(shape, kind)
    mine, theirs = leaves(logits_TK, outputs_TKO), leaves(logits_TK, outputs_TKO)
    losses_TK = squared_errors(outputs_TKO, target_TO)
    got = edd_loss(edd_terms(*mine, losses_TK, options), options)
    wanted = oracle.edd(
        *theirs,
        losses_TK,
        evaluated(logits_TK),
        alpha=options.alpha,
        kind=options.similarity,
        temperature=options.temperature,
    )
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12, abs=1e-12)
    assert got.item() >= 0.0
    got.backward()
    if wanted.requires_grad:
        wanted.backward()
    same_gradients(mine, theirs)


def test_diversification_trains_experts_and_dispatching_the_router():
    logits_TK, outputs_TKO, target_TO = case((6, 3, 2))
    logits, outputs = leaves(logits_TK, outputs_TKO)
    loss_TK = squared_errors(outputs, target_TO)
    terms = edd_terms(logits, outputs, loss_TK)
    (gradient,) = torch.autograd.grad(edd_loss(terms), logits, retain_graph=True)
    best = torch.nn.functional.one_hot(loss_TK.argmin(-1), 3)
    close(gradient, 0.9 * (logits_TK.softmax(-1) - best) / 6, 1e-12)
    only = torch.autograd.grad(terms.dispatching, outputs, allow_unused=True, retain_graph=True)
    assert only == (None,)
    only = torch.autograd.grad(terms.diversification, logits, allow_unused=True)
    assert only == (None,)


def test_equal_experts_are_as_alike_as_can_be():
    same_TKO = torch.ones(2, 3, 4, dtype=torch.float64)
    apart_TKO = torch.eye(3, 4, dtype=torch.float64).expand(2, 3, 4)
    zero_TKO = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True)
    logits, loss = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    only = EddOptions(alpha=1.0)
    assert edd_loss(edd_terms(logits, same_TKO, loss), only).item() == pytest.approx(1.0, rel=1e-12)
    assert edd_loss(edd_terms(logits, apart_TKO, loss), only).item() == 0.0
    dead = edd_loss(edd_terms(logits, zero_TKO, loss), only)
    dead.backward()
    assert dead.item() == 0.0
    assert zero_TKO.grad.isfinite().all()
    one = edd_terms(logits[:, :1], same_TKO[:, :1], loss[:, :1])
    assert (one.diverse_tokens.item(), one.tokens.item(), edd_loss(one, only).item()) == (0, 2, 0.0)


def test_edd_adds_up_over_parts_of_the_batch():
    logits_TK, outputs_TKO, target_TO = case((12, 3, 2), "gaps")
    logits_TK[1, 1:] = -math.inf
    loss_TK = squared_errors(outputs_TKO, target_TO)
    whole = edd_terms(logits_TK, outputs_TKO, loss_TK)
    parts = [edd_terms(logits_TK[i:j], outputs_TKO[i:j], loss_TK[i:j]) for i, j in ((0, 5), (5, 12))]
    counts = {
        "diverse_tokens": sum(part.diverse_tokens for part in parts),
        "tokens": sum(part.tokens for part in parts),
    }
    assert whole.diverse_tokens < whole.tokens < 12, "the case has tokens with one output and with none"
    total = sum(edd_loss(part, **counts) for part in parts)
    assert total.item() == pytest.approx(edd_loss(whole).item(), rel=1e-13)


def test_the_best_expert_is_the_lowest_of_equals_and_never_a_broken_one():
    logits_TK = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    loss_TK = torch.tensor([[1.0, 0.5, 0.5], [math.nan, 3.0, 2.0], [math.inf, math.inf, 4.0]]).double()
    edd_terms(logits_TK, torch.ones(3, 3, 2).double(), loss_TK).dispatching.backward()
    assert logits_TK.grad.argmin(-1).tolist() == [1, 2, 2]


def test_presets():
    assert {name: (o.weight, o.alpha) for name, o in EDD_PRESETS.items()} == {
        "gentle": (0.1, 0.1),
        "strong": (0.5, 0.7),
    }


# ----------------------------------------------------------------------------------------- what feeds them
@pytest.mark.parametrize(
    "name", ["dense", "dense_pick", "dense_groups", "top2", "switch_retry", "noisy2", "top1"]
)
@pytest.mark.parametrize("factor", [0.6, None])
def test_run_experts_says_what_the_layer_does(name, factor):
    moe = config(name, num_experts=4, capacity_factor=factor, min_capacity=0)
    layer = make_layer(moe)
    x_BSD = tokens(2, 5)
    ctx = context(x_BSD, "some")
    found = run_experts(layer, x_BSD, ctx)
    y_BSD, report = layer(x_BSD, ctx)
    assert torch.equal(found.y_BSO, y_BSD)
    assert torch.equal(found.report.metrics.kept_E, report.metrics.kept_E)
    assert (found.expert_TK >= 0).sum() == report.metrics.kept_E.sum()
    logits_TE = layer.route(x_BSD, ctx).logits_TE
    for t in range(10):
        for k, e in enumerate(found.expert_TK[t].tolist()):
            if e < 0:
                assert found.logits_TK[t, k] == -math.inf
                assert (found.outputs_TKO[t, k] == 0).all()
                continue
            assert found.logits_TK[t, k] == logits_TE[t, e]
            wanted = ffn(x_BSD.flatten(0, 1)[t], layer.experts.w_in[e], layer.experts.w_out[e], "swiglu")
            close(found.outputs_TKO[t, k], wanted, 1e-12)


def test_hidden_results_and_plain_ones_are_the_same():
    """The weights are applied inside the experts, and an expert's own output has none."""
    plain, hidden = (make_layer(config("top2", num_experts=4, save=save)) for save in ("output", "hidden"))
    x_BSD = tokens(2, 5)
    close(run_experts(hidden, x_BSD).outputs_TKO, run_experts(plain, x_BSD).outputs_TKO, 0.0)


def test_probes_are_other_experts_drawn_by_their_own_numbers():
    layer = make_layer(config("top2", num_experts=6, capacity_factor=None))
    x_BSD = tokens(2, 4)
    ctx = context(x_BSD, "some")
    plain, found = run_experts(layer, x_BSD, ctx), run_experts(layer, x_BSD, ctx, probes=3)
    assert torch.equal(found.y_BSO, plain.y_BSO)
    for name, metric in by_name(plain.report.metrics).items():
        assert torch.equal(getattr(found.report.metrics, name), metric), name
    places = [(int(sample), s) for sample in ctx.sample_B for s in range(4)]
    for t, (sample, s) in enumerate(places):
        row = found.expert_TK[t].tolist()
        if not ctx.valid_BS.flatten()[t]:
            assert row == [-1] * 5
            continue
        u = [philox.draw(SEED, 7, LAYER, sample, s, e) for e in range(6)]
        free = [e for e in range(6) if e not in row[:2]]
        assert row[2:] == sorted(free, key=lambda e: u[e])[:3]
        wanted = ffn(
            x_BSD.flatten(0, 1)[t], layer.experts.w_in[row[4]], layer.experts.w_out[row[4]], "swiglu"
        )
        close(found.outputs_TKO[t, 4], wanted, 1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_experts_may_be_narrower_than_their_input(shape):
    """Classifiers as experts; one of them gets no row."""
    modules = [torch.nn.Linear(4, 3).double() for _ in range(5)]
    moe = MoEConfig(num_experts=5, router="topk", top_k=1, losses={})
    layer = build_moe_layer(moe, d_model=4, experts=ModuleExperts(modules, d_out=3)).double()
    x_BSD = tokens(*shape).requires_grad_()
    found = run_experts(layer, x_BSD)
    assert found.y_BSO.shape == (*shape, 3)
    assert torch.equal(layer(x_BSD)[0], found.y_BSO)
    terms = edd_terms(found.logits_TK, found.outputs_TKO, found.outputs_TKO.sum(-1))
    (found.y_BSO.sum() + edd_loss(terms)).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_what_has_no_output_per_expert_is_refused_with_the_reason():
    x_BSD = tokens(1, 3)
    layer = make_layer(config("top2", num_experts=4))
    layer.dispatcher = AllToAllDispatcher(Exchange(groups=(None,), sizes=(1,)))
    with pytest.raises(ValueError, match=r"AllToAllDispatcher.*one sum.*ep_size=1"):
        run_experts(layer, x_BSD)
    with pytest.raises(ValueError, match=r"router_loss=true announces EDD.*ep_size=2.*use ep_size=1"):
        build_dispatcher(
            config("dense_pick", num_experts=4),
            Exchange(groups=(None,), sizes=(2,)),
            device_type="cpu",
        )
    for name in ("v3", "two_levels"):
        with pytest.raises(ValueError, match=r"not the softmax.*" + ", ".join(SOFTMAX_ROUTERS)):
            run_experts(make_layer(config(name)), x_BSD)
    with pytest.raises(ValueError, match=r"probes=3 .* the 2 experts"):
        run_experts(make_layer(config("top2", num_experts=4)), x_BSD, probes=3)
    with pytest.raises(ValueError, match="sample_B"):
        run_experts(make_layer(config("top2", num_experts=4)), x_BSD, TokenContext(), probes=1)
    router = {"name": "topk", "smoothing": {"draws": 2, "reroute": True}}
    with pytest.raises(ValueError, match="reroute: false"):
        run_experts(make_layer(MoEConfig(router=router)), x_BSD)


# ------------------------------------------------------------------------------------------ the dense router
@pytest.mark.parametrize("pooling", ["weighted_sum", "max_scaled", "max_pick"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["random", "underflow", "broken", "ties"])
def test_evaluation_of_a_dense_mixture_runs_what_counts(pooling, groups, kind):
    router = {"name": "dense", "pooling_eval": pooling, "num_groups": groups}
    moe = MoEConfig(num_experts=4, router=router)
    logits_TE, valid = cases.logits_and_valid(kind, 16, 4)
    group_TP = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    group_TP = group_TP if groups == 2 else None
    inputs = RouterInputs(
        logits_TE=logits_TE, valid_T=torch.tensor(valid), training=False, group_logits_TP=group_TP
    )
    decision = oracle.dense(logits_TE, valid, pooling=pooling, training=False, group_logits_TP=group_TP)
    check_routing(route(inputs, moe.router, 4), decision, 4)


def test_a_dense_mixture_has_as_many_choices_as_experts():
    assert MoEConfig(router="dense", num_experts=5).top_k == 5
    assert MoEConfig(router="dense", num_experts=1).top_k == 1
    with pytest.raises(ValueError, match=r"all 8 experts, got top_k=2.*leave top_k out"):
        MoEConfig(router="dense", top_k=2)
    with pytest.raises(ValueError, match=r"max_scaled.*pooling_eval: max_pick.*router_loss: true"):
        MoEConfig(router={"name": "dense", "pooling": "max_pick"})
    with pytest.raises(ValueError, match="valid values: 1, 2, 4, 8"):
        MoEConfig(router={"name": "dense", "num_groups": 3})


def test_epmoe_train_refuses_losses_it_cannot_add():
    with pytest.raises(ValueError, match=r"epmoe train has none"):
        Config.model_validate({"moe": {"router": {"name": "dense", "router_loss": True}}})
    for name in ("cooperative", "competitive", "mixture_nll", "edd"):
        wanted = rf"{name} is made from the target.*in a decoder.*\(epmoe.moe.mixture\).*ep_size=1.*balance"
        with pytest.raises(ValueError, match=wanted):
            Config.model_validate({"moe": {"losses": {name: 0.1}}})


def test_picking_gives_the_router_no_gradient_and_its_own_loss_does():
    layer = make_layer(config("dense_pick", num_experts=3))
    x_BSD = tokens(2, 4)
    found = run_experts(layer, x_BSD)
    found.y_BSO.square().sum().backward(retain_graph=True)
    assert layer.router.weight.grad is None or not layer.router.weight.grad.any()
    edd_loss(edd_terms(found.logits_TK, found.outputs_TKO, found.outputs_TKO.square().sum(-1))).backward()
    assert layer.router.weight.grad.abs().max() > 1e-3
