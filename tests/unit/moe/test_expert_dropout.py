"""Dropout inside experts: exactly the units that the draws name, whoever computes them."""

from __future__ import annotations

import pytest
import torch

from epmoe import ModuleExperts, MoEConfig, TokenContext, build_moe_layer
from epmoe.moe.expert_dropout import EXPERT_STRIDE, LABEL_WIDTH, with_labels
from epmoe.ops import philox
from epmoe.types import Draws
from tests.oracle import philox as oracle
from tests.oracle.experts import gelu
from tests.unit.moe.helpers import tokens

SEED, LAYER, P, D, F = 2**40 + 7, 3, 0.35, 4, 6
STREAM = 8


def layer(dispatcher: str = "auto", save: str = "output"):
    moe = MoEConfig(
        num_experts=4,
        router="topk",
        activation="gelu",
        expert_dropout=P,
        dispatcher=dispatcher,
        save=save,
        capacity_factor=1.25 if dispatcher == "padded" else None,
        capacity_factor_eval=None,
        min_capacity=64,
    )
    torch.manual_seed(0)
    return build_moe_layer(moe, d_model=D, d_ff=F, layer=LAYER, seed=SEED).double()


@pytest.mark.parametrize(
    ("dispatcher", "save"), [("auto", "output"), ("padded", "output"), ("local", "hidden")]
)
def test_the_units_that_are_dropped_are_those_of_the_definition(dispatcher: str, save: str) -> None:
    moe_layer, x_BSD = layer(dispatcher, save), tokens(2, 5)
    sample = (2**32 + 11, 3)
    x_BSD.requires_grad_()
    ctx = TokenContext(sample_B=torch.tensor(sample))
    y_BSD, _ = moe_layer(x_BSD, ctx)
    routing = moe_layer.route(x_BSD, ctx)
    wanted_TD = torch.zeros(10, D, dtype=torch.float64)
    rows_TD = x_BSD.flatten(0, 1)
    for token, expert, weight in zip(routing.token_A, routing.expert_A, routing.weight_A, strict=True):
        position = (int(token) % 5 + int(expert) * EXPERT_STRIDE) % 2**32
        draws = [oracle.draw(SEED, STREAM, LAYER, sample[int(token) // 5], position, f) for f in range(F)]
        keep = torch.tensor([float(u >= P) / (1 - P) for u in draws], dtype=torch.float64)
        hidden = gelu(rows_TD[token] @ moe_layer.experts.w_in[expert]) * keep
        wanted_TD = wanted_TD.index_add(
            0, token.view(1), weight * (hidden @ moe_layer.experts.w_out[expert])[None]
        )
    torch.testing.assert_close(y_BSD.flatten(0, 1), wanted_TD, rtol=1e-12, atol=1e-13)
    leaves = [x_BSD, moe_layer.experts.w_in, moe_layer.experts.w_out, moe_layer.router.weight]
    got = torch.autograd.grad(y_BSD.square().sum(), leaves, retain_graph=True)
    for mine, theirs in zip(got, torch.autograd.grad(wanted_TD.square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_labels_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    sample_T, position_T = (
        torch.tensor([0, 255, 2**40 - 1, 123_456_789_012]),
        torch.tensor([0, 2**24 - 1, 256, 77]),
    )
    draws = Draws(seed=1, layer=2, sample_T=sample_T, position_T=position_T)
    rows_TX = with_labels(torch.randn(4, 3).to(dtype), draws)
    assert rows_TX.shape == (4, 3 + LABEL_WIDTH)
    byte = rows_TX[:, 3:].long()
    assert (byte[:, :5] << torch.arange(0, 40, 8)).sum(1).tolist() == sample_T.tolist()
    assert (byte[:, 5:] << torch.arange(0, 24, 8)).sum(1).tolist() == position_T.tolist()


def test_the_share_of_dropped_units_and_their_mean() -> None:
    moe_layer = layer()
    ones_RF, dropout = torch.ones(4000, F, dtype=torch.float64), moe_layer.experts.dropout
    label_RX = with_labels(
        torch.zeros(4000, 0),
        Draws(seed=0, layer=0, sample_T=torch.arange(4000), position_T=torch.zeros(4000).long()),
    )
    kept_RF = dropout(ones_RF, label_RX, torch.zeros(4000).long())
    assert float((kept_RF == 0).double().mean()) == pytest.approx(P, abs=0.01)
    assert float(kept_RF.mean()) == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(kept_RF, dropout(ones_RF, label_RX, torch.ones(4000).long())), (
        "another expert draws anew"
    )


def test_nothing_is_dropped_in_evaluation_and_samples_must_be_known_in_training() -> None:
    moe_layer, x_BSD = layer(), tokens(2, 5)
    with pytest.raises(ValueError, match=r"expert_dropout.*TokenContext\.sample_B"):
        moe_layer(x_BSD)
    without = build_moe_layer(
        moe_layer.moe.model_copy(update={"expert_dropout": 0.0}), d_model=D, d_ff=F, layer=LAYER
    )
    without.double().load_state_dict(moe_layer.state_dict())
    assert torch.equal(moe_layer.eval()(x_BSD)[0], without.eval()(x_BSD)[0])


def test_modules_bring_their_own_dropout() -> None:
    experts = ModuleExperts([torch.nn.Linear(D, D) for _ in range(2)])
    with pytest.raises(ValueError, match=r"put nn\.Dropout"):
        build_moe_layer(MoEConfig(num_experts=2, expert_dropout=0.1), d_model=D, experts=experts)


def test_its_stream_is_its_own() -> None:
    assert philox.EXPERT_DROPOUT == STREAM
