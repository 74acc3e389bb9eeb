"""Records: derived numbers and their way through JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest

from epmoe.metrics.step_record import LayerHealth, StepRecord, merge_health, record_from_json, record_to_json
from tests.unit.metrics.samples import health, record


def test_rates_count_assignments_and_tokens_each_by_their_own():
    layer = LayerHealth(
        demand_E=(8, 4, 0, 4),
        kept_E=(5, 4, 0, 3),
        assignments=16,
        kept=12,
        overflow_tokens=2,
        valid_tokens=8,
        nonfinite_tokens=0,
        entropy=1.0,
    )
    assert (layer.drop_rate, layer.overflow_rate) == (0.25, 0.25)
    assert layer.share_E == (0.5, 0.25, 0.0, 0.25)
    assert layer.max_over_mean == 2.0
    assert layer.load_cv == pytest.approx(math.sqrt(8) / 4)
    assert layer.dead_experts == (2,)


@pytest.mark.parametrize("demand", [(), (0,), (0, 0, 0)])
def test_a_layer_without_assignments_divides_by_nothing(demand: tuple[int, ...]):
    layer = health(*demand, tokens=0)
    assert (layer.drop_rate, layer.overflow_rate, layer.max_over_mean, layer.load_cv) == (0.0, 0.0, 0.0, 0.0)
    assert layer.dead_experts == ()


def test_merging_adds_counts_and_averages_entropy_by_tokens():
    merged = merge_health(health(1, 2, tokens=10, entropy=1.0), health(3, 0, tokens=30, entropy=2.0))
    assert (merged.demand_E, merged.assignments, merged.valid_tokens) == ((4, 2), 6, 40)
    assert merged.entropy == 1.75
    assert merge_health(health(0, tokens=0), health(0, tokens=0)).entropy == 0.0
    with pytest.raises(ValueError, match="shorter"):
        merge_health(health(1, 2), health(1))


def test_a_record_survives_json():
    original = record(
        7, val={"stdlib": 3.5}, mfu=0.4, skipped_steps=2, layers={1: health(1, 2), 13: health(3, 4)}
    )
    assert record_from_json(record_to_json(original)) == original
    assert record_from_json(record_to_json(record(7, mfu=None))).mfu is None


def test_numbers_that_are_not_finite_stay_standard_json():
    line = record_to_json(record(1, loss=math.nan, grad_norm=math.inf, aux={"z": math.nan}))
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["loss"] is None
    back = record_from_json(line)
    assert math.isnan(back.loss)
    assert math.isnan(back.aux["z"])


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "3", "{}", '{"step": 1, "layers": {}}', '{"layers": {"x": {}}}']
)
def test_a_line_that_is_no_record_says_so(line: str):
    with pytest.raises(ValueError):
        record_from_json(line)


def test_a_record_from_a_newer_version_may_know_more():
    values = json.loads(record_to_json(record(3)))
    assert record_from_json(json.dumps({**values, "news": [1]})) == record(3)


def test_the_drop_rate_of_a_step_weighs_layers_by_assignments():
    layers = {1: health(10, 10, kept=(10, 0)), 3: health(60, 20)}
    assert record(1, layers=layers).drop_rate == pytest.approx(0.1)
    assert record(1, layers={}).drop_rate == 0.0


def test_every_field_of_a_line_is_in_the_docs() -> None:
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    if not page.is_file():
        pytest.skip("not a source tree")
    described = re.findall(r"^\| `(\w+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert described == [field.name for cls in (StepRecord, LayerHealth) for field in fields(cls)]
