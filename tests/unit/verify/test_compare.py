"""Errors per tensor, and the words for wrong factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from epmoe.config import Config
from epmoe.engines.protocol import ParameterRows
from epmoe.verify.cases import Cell, Scenario, usable_cells
from epmoe.verify.compare import compare, meaning_of, tensor_errors
from epmoe.verify.measure import KNOWN_NORM, Measurement
from epmoe.verify.router_checks import router_violations
from epmoe.verify.small_config import make_subject

SUBJECT = make_subject(Config(), 4, "small", ranks_per_node=2)
CELL = replace(usable_cells(SUBJECT, 4, 2)[0], accumulation=1)
EXPERT, DENSE = "blocks.1.moe.experts.w_in", "blocks.0.ffn.up.weight"


def part(tensor: Tensor, first_row: int = 0, rows: int | None = None) -> ParameterRows:
    return ParameterRows(
        local=tensor, first_row=first_row, shape=(rows or tensor.shape[0], *tensor.shape[1:])
    )


def values(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, math.prod(shape), dtype=torch.float64).view(shape)


def measured(gradients: Mapping[str, Tensor], **changes: object) -> Measurement:
    plain: dict[str, object] = {
        "losses": [4.0, 3.9], "auxiliary": {"balance": [1.1, 1.1]}, "demand": [[[3, 3], [3, 3]]], "kept": [],
        "objectives": [4.011, 3.911], "meant": [4.011, 3.911],
        "norms": [2.0, 2.0], "clips": [0.5, 0.5], "gradients": {n: part(g) for n, g in gradients.items()},
        "weights": {}, "micro_collectives": [{"all_to_all_single": 4}], "end_collectives": {}, "known_norm": KNOWN_NORM,
        "clipped_norm": 1.0, "margin": 1.0,
    }  # fmt: skip
    return Measurement(**(plain | changes))  # type: ignore[arg-type]


def test_rows_of_an_expert_tensor_are_compared_with_their_own_rows():
    whole = values(4, 3)
    [error] = tensor_errors({EXPERT: part(whole[2:].clone(), 2, 4)}, {EXPERT: part(whole)})
    assert error.error == 0.0
    [error] = tensor_errors({EXPERT: part(whole[2:] + 0.2, 2, 4)}, {EXPERT: part(whole)})
    assert error.error == pytest.approx(0.1)
    assert error.factor is None


def test_a_missing_tensor_a_zero_and_nothing_but_rounding():
    wanted = {"a": part(values(3)), "zero": part(torch.zeros(3, dtype=torch.float64))}
    assert [e.error for e in tensor_errors({"zero": wanted["zero"]}, wanted)] == [math.inf, 0.0]
    noise = {"a": wanted["a"], "zero": part(torch.full((3,), 1e-15, dtype=torch.float64))}
    assert [e.error for e in tensor_errors(noise, wanted)] == [0.0, 0.0]
    wrong = {"a": wanted["a"], "zero": part(torch.full((3,), 1e-9, dtype=torch.float64))}
    assert [e.error for e in tensor_errors(wrong, wanted)] == [0.0, math.inf]


@pytest.mark.parametrize(
    ("name", "factor", "world_size", "ep_size", "words"),
    [
        (EXPERT, 4.0, 4, 4, "ep_size 4: expert gradients were also summed over the expert-parallel group"),
        (EXPERT, 0.25, 4, 1, "1 / edp_size 4"),
        (DENSE, 0.25, 4, 4, "1 / world size 4: averaged"),
        (DENSE, 0.5, 4, 4, "1 / 2 micro-batches"),
        (EXPERT, 0.37, 4, 2, "weighted or divided by something else"),
    ],
)
def test_known_factors_have_words(name: str, factor: float, world_size: int, ep_size: int, words: str):
    cell = replace(usable_cells(SUBJECT, world_size, ep_size)[0], accumulation=2)
    [error] = tensor_errors({name: part(factor * values(4, 3))}, {name: part(values(4, 3))})
    assert words in meaning_of(error, cell)


def test_the_first_wrong_tensor_of_the_model_is_named():
    wanted = measured({DENSE: values(4, 3), "later": values(3), EXPERT: values(4, 2)})
    got = measured({DENSE: values(4, 3), "later": 2 * values(3), EXPERT: 4 * values(4, 2)})
    found = compare(CELL, got, wanted)
    assert [(v.item, v.tensor) for v in found.violations] == [("gradients", "later")]
    assert "2 of 3 tensors" in found.violations[0].what
    assert (found.dense.name, found.expert.name) == ("later", EXPERT)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "item", "words"),
    [
        ({"losses": [4.1, 3.9]}, "gradients", "loss 4.1 instead of 4"),
        ({"losses": [4.0, float("nan")]}, "gradients", "second step"),
        ({"auxiliary": {"balance": [2.2, 1.1]}}, "balance", "auxiliary loss balance is 2.2 instead of 1.1"),
        ({"objectives": [4.02, 3.9]}, "balance", "what is differentiated is 4.02"),
        ({"demand": [[[2, 4], [3, 3]]]}, "gradients", "other assignments"),
        ({"norms": [2.1, 2.0]}, "norm", "gradient norm 2.1 instead of 2"),
        ({"known_norm": 7.236068}, "norm", "7.236068, not 10.954451"),
        ({"clipped_norm": 1.1}, "norm", "leaves a norm of 1.1"),
        ({"clips": [1.0, 1.0]}, "norm", "not active"),
        ({"micro_collectives": [{"all_reduce": 1}, {}]}, "collectives", "micro-batches of one step differ"),
    ],
)  # fmt: skip
def test_everything_else_that_can_be_wrong(changes: dict[str, object], item: str, words: str):
    gradients = {DENSE: values(4, 3)}
    assert not compare(CELL, measured(gradients), measured(gradients)).violations
    [violation] = compare(CELL, measured(gradients, **changes), measured(gradients)).violations
    assert violation.item == item
    assert words in violation.what


def scenario(name: Scenario) -> Cell:
    return replace(CELL, scenario=name)


def test_a_router_that_the_task_does_not_train():
    name = "blocks.1.moe.router.weight"
    alive, dead = measured({name: values(2, 3)}), measured({name: torch.zeros(2, 3)})
    assert not list(router_violations({scenario("task_only"): alive}))
    [violation] = router_violations({scenario("task_only"): dead})
    assert (violation.item, violation.tensor) == ("liveness", name)


def test_a_balance_loss_that_does_not_see_a_skew():
    skewed = {"demand": [[[6, 0], [3, 3]]]}
    even = measured({})
    seen = measured({}, **skewed, auxiliary={"balance": [1.5, 1.1]})
    blind = measured({}, **skewed)
    assert not list(router_violations({scenario("one_token"): seen, scenario("parity"): even}))
    [violation] = router_violations({scenario("one_token"): blind, scenario("parity"): even})
    assert violation.item == "balance"
