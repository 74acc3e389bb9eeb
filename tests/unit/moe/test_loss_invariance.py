"""Which losses no layout may change: the table, every line of it tried in all three ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epmoe.config import AUX_LOSSES
from epmoe.moe.expert_outputs import run_experts
from epmoe.moe.mixture import edd_loss, edd_terms, squared_errors
from epmoe.types import TokenContext
from tests.unit.moe.helpers import config, context, make_layer, tokens

INVARIANCES = (
    # loss, its scope, a router that has it: may ranks, micro-batches, appended padding change it? True = they may not
    ("balance", {"balance_scope": "group"}, "top2", True, True, True),
    ("balance", {"balance_scope": "group", "group": "rank"}, "top2", False, False, True),
    ("balance", {"balance_scope": "sequence", "group": "rank"}, "gshard_random", True, True, True),
    ("balance", {"balance_scope": "global"}, "top2", True, False, True),
    ("balance", {"balance_scope": "micro_batch"}, "top2", False, False, True),
    ("z", {"group": "rank"}, "top2", True, True, True),
    ("sequence_balance", {"group": "rank"}, "v3", True, True, True),
    ("importance", {}, "noisy2", False, False, True),
    ("load", {}, "noisy2", False, False, True),
    ("batchwise_threshold", {"group": "rank"}, "strict2", False, False, True),
    ("batchwise_threshold", {"group": "sequence"}, "strict2", True, True, True),
    ("device_balance", {}, "v2", False, False, True),
    ("communication_balance", {}, "v2", False, False, True),
    ("edd", {}, "top2", True, True, True),
    ("edd", {}, "dense", True, True, True),
)
MINE = pytest.mark.parametrize(
    ("loss", "scope", "router", "ranks", "micro_batches", "padding"),
    INVARIANCES,
    ids=["-".join((row[0], row[2], *row[1].values())) for row in INVARIANCES],
)
HALVES = (slice(0, 2), slice(2, 4))


def ctx_of(ctx: TokenContext, rows: slice) -> TokenContext:
    return replace(ctx, valid_BS=ctx.valid_BS[rows], sample_B=ctx.sample_B[rows])


class Case:
    """A layer with one loss, and a batch of four sequences of six tokens, some of them padding."""

    def __init__(self, loss: str, scope: dict, router: str) -> None:
        losses = {} if loss == "edd" else {loss: 1.0}
        self.loss = loss
        self.layer = make_layer(config(router, num_experts=4, capacity_factor=None, losses=losses, **scope))
        self.x_BSD = tokens(4, 6, seed=2)
        known = context(self.x_BSD, "some")
        self.ctx = TokenContext(valid_BS=known.valid_BS, sample_B=known.sample_B)
        self.told = None

    def edd_of(self, x_BSD, ctx):
        found = run_experts(self.layer, x_BSD, ctx)
        wanted_TO = x_BSD.flatten(0, 1).flip(-1)
        return edd_terms(found.logits_TK, found.outputs_TKO, squared_errors(found.outputs_TKO, wanted_TO))

    def value_and_gradients(self, parts):
        """Sums over passes: of the loss, and of its gradient by parameter."""
        self.layer.zero_grad()
        if self.loss == "edd":
            terms = [self.edd_of(x_BSD, ctx) for x_BSD, ctx in parts]
            counts = {key: sum(getattr(t, key) for t in terms) for key in ("tokens", "diverse_tokens")}
            values = [edd_loss(t, **counts) for t in terms]
        else:
            values = [self.layer(x_BSD, ctx)[1].losses[self.loss] for x_BSD, ctx in self.passes(parts)]
        total = sum(values)
        total.backward()
        grads = [p.grad.flatten() for p in self.layer.parameters() if p.grad is not None]
        return torch.cat((total.detach().view(1), *grads))

    def passes(self, parts):
        """One after the other; after the first the layer knows what it did, if it is told."""
        self.layer.earlier = None
        for part in parts:
            yield part
            self.layer.earlier = self.told

    def whole(self):
        return self.value_and_gradients([(self.x_BSD, self.ctx)])

    def halves(self):
        return [(self.x_BSD[rows], ctx_of(self.ctx, rows)) for rows in HALVES]

    def check(self, found, same):
        whole = self.whole()
        assert whole[0].abs() > 1e-3
        if same:
            assert torch.allclose(found, whole, rtol=1e-11, atol=1e-12)
        else:
            assert (found[0] - whole[0]).abs() > 1e-3 * whole[0].abs(), (
                "it says that it differs, and does not"
            )


@MINE
def test_ranks(loss, scope, router, ranks, micro_batches, padding):
    """Each rank has half of the batch; what the layer sums over ranks is the sum of both halves."""
    case = Case(loss, scope, router)
    metrics = [case.layer(x_BSD, ctx)[1].metrics for x_BSD, ctx in case.halves()]
    assert metrics[0].valid_tokens != metrics[1].valid_tokens, "ranks with unequal numbers of tokens"
    if metrics[0].counted_E is not None:
        total = sum(torch.cat((m.counted_E, m.valid_tokens.view(1))) for m in metrics)
        case.layer.sum_over_ranks = lambda _: total
    found = case.value_and_gradients(case.halves())
    case.layer.sum_over_ranks = None
    case.check(found, ranks)


@MINE
def test_micro_batches(loss, scope, router, ranks, micro_batches, padding):
    """One half after the other; the second knows what the first one counted."""
    case = Case(loss, scope, router)
    first, second = case.halves()
    case.told = case.layer(*first)[1].metrics
    case.check(case.value_and_gradients([first, second]), micro_batches)


@MINE
def test_padding(loss, scope, router, ranks, micro_batches, padding):
    """Rubbish after the end of every sequence, and a whole sequence of it."""
    case = Case(loss, scope, router)
    x_BSD = torch.cat((torch.cat((case.x_BSD, 9.0 * tokens(4, 2, seed=3)), 1), 5.0 * tokens(1, 8, seed=4)))
    valid_BS = torch.zeros(5, 8, dtype=torch.bool)
    valid_BS[:4, :6] = case.ctx.valid_BS
    sample_B = torch.cat((case.ctx.sample_B, torch.tensor([77])))
    longer = TokenContext(valid_BS=valid_BS, sample_B=sample_B)
    case.check(case.value_and_gradients([(x_BSD, longer)]), padding)


def test_the_table_has_every_loss():
    assert {row[0] for row in INVARIANCES} == {*AUX_LOSSES, "edd"}
