"""Hash, sentence, task and soft mixtures: tables, shared choices, and a layer that chooses nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epmoe.config import Config, MoEConfig
from epmoe.config_file import load_config
from epmoe.errors import ConfigError
from epmoe.models.decoder import Decoder
from epmoe.moe.build import ROUTERS as FAMILIES
from epmoe.moe.build import build_moe_layer
from epmoe.moe.router import Router
from epmoe.moe.routers.hash import balanced_table
from epmoe.moe.soft_layer import SoftMoELayer
from epmoe.ops import philox
from epmoe.types import Draws, TokenContext
from tests.oracle.groups import greedy_table, soft_moe
from tests.oracle.layer import ffn_experts
from tests.unit.moe.helpers import close, config, context, extras, make_layer, tokens
from tests.unit.moe.test_families import MODEL
from tests.unit.moe.test_routers import route


# ------------------------------------------------------------------------------------------- hash
@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize("counts", [[5, 1, 9, 9, 0, 0, 0, 2, 7, 1], [0] * 10, list(range(10)), [1]])
def test_a_balanced_table_is_the_greedy_one(counts, experts):
    assert balanced_table(counts, experts).tolist() == greedy_table(counts, experts)


def test_tables_are_fixed_by_seed_and_layer_and_travel_in_the_state(tmp_path):
    counts = tmp_path / "counts.txt"
    counts.write_text("".join(f"{100 // (i + 1)}\n" for i in range(19)))
    for options in ({"table": "random"}, {"table": "balanced", "counts": str(counts)}):
        moe = MoEConfig(num_experts=4, every=1, router={"name": "hash", **options})
        one, two = (Decoder(MODEL, moe, vocab_size=19, seed=3).state_dict() for _ in range(2))
        table_V = one["blocks.0.moe.router.table"]
        assert table_V.dtype == torch.int64
        assert torch.equal(table_V, two["blocks.0.moe.router.table"])
        assert torch.bincount(table_V, minlength=4).tolist() == [5, 5, 5, 4] or options["table"] == "balanced"
        other = one["blocks.1.moe.router.table"]
        assert torch.equal(table_V, other) == (options["table"] == "balanced"), (
            "each layer has its own permutation"
        )
        assert (
            Decoder(MODEL, moe, vocab_size=19, seed=3)
            .bfloat16()
            .state_dict()["blocks.0.moe.router.table"]
            .equal(table_V)
        ), "a narrow model keeps its integers"


@pytest.mark.parametrize("text", ["1\nx\n", "-1\n", "1\n" * 20, None])
def test_counts_that_cannot_be_read_are_refused(text, tmp_path):
    path = tmp_path / "counts.txt"
    if text is not None:
        path.write_text(text)
    moe = MoEConfig(num_experts=4, router={"name": "hash", "table": "balanced", "counts": str(path)})
    with pytest.raises(ConfigError, match=r"moe.router.counts"):
        Decoder(MODEL, moe, vocab_size=19, seed=0)


def test_hash_needs_ids_and_a_table_needs_their_number():
    layer = make_layer(config("hash", num_experts=4))
    x_BSD = tokens(1, 4)
    for ctx in (None, TokenContext(sample_B=torch.zeros(1).long())):
        with pytest.raises(ValueError, match=r"needs TokenContext.token_BS"):
            layer(x_BSD, ctx)
    moe = MoEConfig(num_experts=4, router={"name": "hash", "table": "random"})
    with pytest.raises(ValueError, match="set vocab_size, or table: mod"):
        build_moe_layer(moe, d_model=4, d_ff=3)
    build_moe_layer(moe, d_model=4, d_ff=3, vocab_size=9)


def test_a_decoder_tells_its_routers_the_ids():
    """Without a context too, as in generation."""
    moe = MoEConfig(num_experts=4, every=1, router="hash")
    model = Decoder(MODEL, moe, vocab_size=19, seed=0).eval()
    token_BS = torch.tensor([[4, 1, 5, 9]])
    _, reports = model(token_BS)
    assert reports[0].metrics.demand_E.tolist() == [1, 3, 0, 0]
    assert reports[0].losses == {}


# ------------------------------------------------------------------------------------------- sentence
def experts_of(routed, token):
    mine = routed.active_A & (routed.token_A == token)
    return sorted(zip(routed.choice_A[mine].tolist(), routed.expert_A[mine].tolist(), strict=True))


@pytest.mark.parametrize("policy", ["random", "sampling"])
@pytest.mark.parametrize("name", ["sentence", "task"])
def test_a_units_tokens_share_experts_and_draws(name, policy):
    options = {"name": name, "second_policy": policy, **({"num_tasks": 3} if name == "task" else {})}
    layer = make_layer(MoEConfig(num_experts=6, router=options, capacity_factor=None))
    x_BSD = tokens(12, 6)
    ctx = replace(context(x_BSD), segment_BS=(torch.arange(6) // 3 + 7).expand(12, 6))
    routed = layer.router(x_BSD, ctx)
    unit = 3 if name == "sentence" else 6
    found = [experts_of(routed, t) for t in range(72)]
    assert all(found[t] == found[t // unit * unit] for t in range(72))
    if policy == "random":
        assert {len(mine) for mine in found} == {1, 2}, "some units skip their second expert"
    else:
        assert len({tuple(mine) for mine in found}) > 3


def test_the_draw_of_a_document_is_its_first_tokens():
    moe = config("sentence", num_experts=4)
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double()
    draws = Draws(seed=9, layer=2, sample_T=torch.full((8,), 4), position_T=torch.arange(8))
    u_T = philox.uniform(9, philox.SECOND_EXPERT, 2, draws.sample_T, draws.position_T, 1)[:, 0].tolist()
    given = replace(extras(moe, 8), unit=[0, 0, 0, 1, 1, 1, 1, 1], seq_len=8)
    drawn = route(moe, logits, [True] * 8, replace(given, uniform=None), draws=draws)
    wanted = route(moe, logits, [True] * 8, replace(given, uniform=[u_T[0]] * 3 + [u_T[3]] * 5))
    assert torch.equal(drawn.active_A, wanted.active_A)


@pytest.mark.parametrize("name", ["sentence", "sentence_drawn", "task"])
def test_given_numbers_of_another_shape_are_refused(name):
    moe = config(name, num_experts=4)
    given = extras(moe, 6)
    short = replace(
        given,
        uniform=given.uniform and given.uniform[:5],
        gumbel=None if given.gumbel is None else given.gumbel[:5],
    )
    logits = torch.zeros(6, 4).double()
    with pytest.raises(ValueError, match=r"shape \(6"):
        route(moe, logits, [True] * 6, short)
    with pytest.raises(ValueError, match="sample_B"):
        route(moe, logits, [True] * 6, replace(given, uniform=None, gumbel=None))


def test_documents_do_not_reach_across_sequences():
    """The last document of one sequence and the first of the next have the same number."""
    layer = make_layer(config("sentence", num_experts=4, capacity_factor=None))
    x_BSD = tokens(2, 4)
    ctx = TokenContext(sample_B=torch.arange(2), segment_BS=torch.tensor([[0, 0, 4, 4], [0, 0, 0, 0]]))
    both = layer(x_BSD, ctx)[0]
    alone = layer(x_BSD[:1], TokenContext(sample_B=torch.arange(1), segment_BS=ctx.segment_BS[:1]))[0]
    assert torch.equal(both[:1], alone)


# ------------------------------------------------------------------------------------------- task
def test_a_task_needs_no_expert_but_its_own():
    """Evaluation without capacity is the same with all other experts' weights gone."""
    layer = make_layer(config("task", num_experts=6)).eval()
    x_BSD = tokens(2, 5)
    ctx = replace(context(x_BSD), task_B=torch.tensor([2, 2]))
    whole, report = layer(x_BSD, ctx)
    mine = report.metrics.demand_E.nonzero().flatten()
    assert len(mine) == 2
    with torch.no_grad():
        for e in set(range(6)) - set(mine.tolist()):
            layer.experts.w_in[e] = float("nan")
            layer.experts.w_out[e] = float("nan")
    assert torch.equal(layer(x_BSD, ctx)[0], whole)


def test_training_names_the_task_and_evaluation_has_a_default():
    layer = make_layer(
        MoEConfig(num_experts=6, router={"name": "task", "num_tasks": 3, "default_task": 1, "tau": 0.4})
    )
    x_BSD = tokens(1, 5)
    unknown = TokenContext(sample_B=torch.zeros(1).long())
    with pytest.raises(ValueError, match=r"num_tasks=3.*TokenContext.task_B"):
        layer(x_BSD, unknown)
    wanted = layer.eval()(x_BSD, replace(unknown, task_B=torch.tensor([1])))[0]
    assert torch.equal(layer(x_BSD)[0], wanted)
    assert not torch.equal(layer(x_BSD, replace(unknown, task_B=torch.tensor([2])))[0], wanted)


def test_every_source_is_a_task(tmp_path):
    sources = [{"name": "a"}, {"name": "b"}]
    moe = {"router": {"name": "task", "num_tasks": 1}}
    with pytest.raises(ValueError, match=r"less than the 2 data.sources.*set num_tasks to at least 2"):
        Config.model_validate({"data": {"sources": sources}, "moe": moe})
    path = tmp_path / "run.yaml"
    path.write_text("data: {sources: [{name: a}, {name: b}]}\nmoe: {router: {name: task, num_tasks: 2}}\n")
    assert load_config(path).moe.router.num_tasks == 2


# ------------------------------------------------------------------------------------------- soft
def soft_layer(slots=2, num_experts=3, **fields):
    return make_layer(MoEConfig(num_experts=num_experts, router={"name": "soft", "slots": slots}, **fields))


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("group", ["sequence", "rank"])
@pytest.mark.parametrize("padding", ["none", "some", "all"])
def test_soft_mixtures_equal_the_oracle(padding, group, experts):
    layer = soft_layer(group=group, num_experts=experts)
    x_BSD = tokens(2, 5)
    mine, theirs = x_BSD.clone().requires_grad_(), x_BSD.clone().requires_grad_()
    weights = {key: p.detach().clone().requires_grad_() for key, p in layer.named_parameters()}
    ctx = context(x_BSD, padding)
    usable = [[True] * 5] * 2 if padding == "none" else ctx.valid_BS.tolist()
    rows = [list(x_SD.unbind()) for x_SD in theirs.unbind()]
    if group == "rank":
        rows, usable = [rows[0] + rows[1]], [usable[0] + usable[1]]
    wanted = soft_moe(
        rows,
        usable,
        [list(phi_PD.unbind()) for phi_PD in weights["router.phi"].view(experts, 2, 4).unbind()],
        weights["router.scale"][0],
        ffn_experts(weights["experts.w_in"], weights["experts.w_out"], "swiglu"),
    )
    wanted_TD = torch.stack([y for ys in wanted for y in ys])
    y_BSD, report = layer(mine, ctx)
    close(y_BSD.flatten(0, 1), wanted_TD, 1e-12)
    y_BSD.square().sum().backward()
    (wanted_TD.square().sum() + theirs.sum() * 0).backward()
    close(mine.grad, theirs.grad, 1e-11)
    for key, parameter in layer.named_parameters():
        expected = weights[key].grad
        close(parameter.grad, torch.zeros_like(parameter) if expected is None else expected, 1e-11)
    groups = 0 if padding == "all" else 1 if group == "rank" else 2
    assert report.metrics.demand_E.tolist() == [2 * groups] * experts
    assert report.metrics.valid_tokens.item() == sum(sum(row) for row in usable)
    assert report.metrics.overflow_tokens.item() == 0


def test_soft_mixtures_leave_broken_tokens_out():
    layer = soft_layer()
    x_BSD = tokens(1, 6)
    valid_BS = torch.ones(1, 6).bool()
    valid_BS[0, 2] = False
    wanted, _ = layer(x_BSD, TokenContext(valid_BS=valid_BS))
    broken = x_BSD.clone()
    broken[0, 2, 1] = float("nan")
    broken.requires_grad_()
    y_BSD, report = layer(broken, TokenContext())
    assert torch.equal(y_BSD, wanted)
    assert report.metrics.nonfinite_tokens.item() == 1
    y_BSD.sum().backward()
    assert broken.grad.isfinite().all()
    assert layer.router.phi.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("group", ["sequence", "rank"])
def test_soft_mixtures_of_nothing(shape, group):
    layer = soft_layer(group=group)
    x_BSD = torch.zeros(*shape, 4, dtype=torch.float64, requires_grad=True)
    y_BSD, report = layer(x_BSD, None)
    assert y_BSD.shape == x_BSD.shape
    y_BSD.sum().backward()
    assert all((p.grad == 0).all() for p in layer.parameters())
    assert report.metrics.demand_E.tolist() == [0] * 3


def test_soft_mixtures_in_low_precision_and_as_a_router():
    layer = soft_layer().bfloat16()
    exact = soft_layer()
    exact.load_state_dict(layer.state_dict())
    x_BSD = tokens(2, 6).bfloat16()
    y_BSD, _ = layer(x_BSD)
    assert y_BSD.dtype == torch.bfloat16
    close(y_BSD, exact(x_BSD.double())[0].detach(), 0.05)
    assert isinstance(layer, SoftMoELayer)
    moe = layer.moe
    router = Router(4, 3, top_k=1, family=FAMILIES["soft"], options=moe.router)
    with pytest.raises(TypeError, match="SoftMoELayer"):
        router(tokens(1, 3).float(), TokenContext())
