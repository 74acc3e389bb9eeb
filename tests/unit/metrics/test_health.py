"""The history: bounded, the same after a resume, and right about which router is ill."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from epmoe.config import MoEConfig
from epmoe.metrics.router_health import MAX_BINS, RouterHistory
from epmoe.metrics.step_record import StepRecord, record_to_json
from epmoe.moe.build import ROUTERS
from epmoe.moe.layer import routing_metrics
from epmoe.moe.plan import plan_local, plan_slots
from epmoe.types import Limits, RouterInputs
from tests.unit.metrics.samples import health, record


def history(*records) -> RouterHistory:
    made = RouterHistory()
    for one in records:
        made.add(one)
    return made


@pytest.mark.parametrize("count", [1, 200, 201, 1000, 5003])
def test_memory_is_bounded_and_nothing_is_lost(count: int):
    made = history(
        *(record(step, loss=float(step), layers={1: health(1, 2)}) for step in range(1, count + 1))
    )
    bins = made.bins
    assert len(bins) <= MAX_BINS
    assert sum(b.records for b in bins) == count
    assert sum(b.layers[1].assignments for b in bins) == 3 * count
    assert sum(b.loss * b.losses for b in bins) == pytest.approx(count * (count + 1) / 2)
    assert [b.first_step for b in bins[1:]] == [b.last_step + 1 for b in bins[:-1]]
    assert len({b.records for b in bins[:-1]}) <= 1


def test_a_history_rebuilt_after_a_resume_equals_the_uninterrupted_one(tmp_path: Path):
    records = [record(step, val={"a": 1.0} if step % 50 == 0 else {}) for step in range(1, 431)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(record_to_json(r) + "\n" for r in records[:300]))
    rebuilt = RouterHistory.from_jsonl(path)
    for one in records[300:]:
        rebuilt.add(one)
    assert rebuilt.bins == history(*records).bins
    assert RouterHistory.from_jsonl(tmp_path / "none.jsonl").bins == ()


def test_the_summary_is_about_the_last_fifth_of_the_steps():
    early = [record(step, layers={1: health(40, 0, 0, 0)}) for step in range(1, 81)]
    late = [record(step, layers={1: health(10, 10, 10, 10)}) for step in range(81, 101)]
    (recovered,) = history(*early, *late).summary()
    assert not recovered.flagged
    assert recovered.health.demand_E == (200, 200, 200, 200)
    (ill,) = history(*early, *late).summary(last=1.0)
    assert ill.overloaded_experts == (0,)


def test_overload_is_more_than_three_times_an_even_share():
    at_limit = history(record(1, layers={1: health(3, 1, 1, 1, 1, 1, 0, 0)})).summary()[0]
    assert at_limit.overloaded_experts == ()
    above = history(record(1, layers={1: health(31, 10, 10, 10, 10, 9, 0, 0)})).summary()[0]
    assert above.overloaded_experts == (0,)


def routed_step(step: int, busiest: int, experts: int = 8, tokens: int = 80) -> StepRecord:
    """A step whose router sends ``busiest`` tokens to expert 0 and the others round the rest."""
    choice = torch.tensor([0 if t < busiest else 1 + t % (experts - 1) for t in range(tokens)])
    logits_TE = 4.0 * torch.nn.functional.one_hot(choice, experts).double()
    moe = MoEConfig(num_experts=experts, router="topk", top_k=1)
    inputs = RouterInputs(logits_TE=logits_TE, valid_T=torch.ones(tokens, dtype=torch.bool))
    routing = ROUTERS["topk"].route(inputs, moe.router, 1)
    slots = plan_slots(routing, Limits(num_experts=experts, group_size=tokens, capacity=-1))
    demand = routing_metrics(routing, plan_local(routing, slots)).demand_E
    return record(step, layers={1: health(*demand.tolist())})


@pytest.mark.parametrize(("one_more", "flagged"), [(0, False), (1, True)])
def test_a_router_is_flagged_above_three_even_shares_on_average_over_the_last_fifth(
    one_more: int, flagged: bool
):
    """The line is at 3/8 of 80 tokens, 30: steps with 40 and 20 in turn lie on it, one token more lies above. What was
    before, everything to one expert, does not count."""
    before = [routed_step(step, 80) for step in range(1, 81)]
    window = [
        routed_step(step, (40 if step % 2 else 20) + one_more * (step == 90)) for step in range(81, 101)
    ]
    (summary,) = history(*before, *window).summary()
    assert sum(summary.health.demand_E) == 20 * 80
    assert summary.health.demand_E[0] == 20 * 30 + one_more
    assert summary.flagged == flagged
    assert summary.overloaded_experts == ((0,) if flagged else ())
    assert ("OVERLOADED experts 0" in summary.sentence()) == flagged


def test_dead_experts_are_named_only_when_dead_all_along():
    made = history(
        *(record(s, layers={0: health(5, s % 2, 0, 5), 2: health(1, 1, 1, 1)}) for s in (1, 2, 3, 4))
    )
    first, second = made.summary(last=1.0)
    assert (first.layer, first.health.dead_experts, first.flagged) == (0, (2,), True)
    assert (second.layer, second.flagged) == (2, False)
    assert "DEAD experts 2" in first.sentence()
    assert "at most 1.39" in second.sentence()


def test_many_dead_experts_are_counted_not_listed():
    (one,) = history(record(1, layers={1: health(9, *[0] * 63)})).summary()
    assert "DEAD experts 1, 2, 3, 4, 5, 6, 7, 8 and 55 more" in one.sentence()


def test_losses_that_are_not_finite_and_layers_that_come_and_go():
    made = RouterHistory()
    for step in range(1, 500):
        layers = {} if step % 3 else {1: health(1, 1)}
        made.add(record(step, loss=math.nan if step < 400 else 2.0, layers=layers))
    assert len(made.bins) <= MAX_BINS
    assert math.isnan(made.bins[0].loss)
    assert made.bins[-1].loss == 2.0
    assert made.summary()[0].health.assignments > 0
    assert history(record(1, layers={})).summary() == ()
    assert RouterHistory().summary() == ()


def test_a_change_of_the_number_of_experts_starts_afresh():
    made = history(record(1, layers={1: health(1, 1)}), record(2, layers={1: health(2, 2, 2)}))
    assert made.summary(last=1.0)[0].health.demand_E == (2, 2, 2)
