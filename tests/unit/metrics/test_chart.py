"""The picture of a run: well-formed, self-contained, and showing the numbers it was given."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from epmoe.metrics.router_chart import LEFT, RIGHT, WIDTH, level, nice_ticks, render_chart, write_chart
from epmoe.metrics.router_health import RouterHistory
from tests.unit.metrics.samples import health, record

SVG = "{http://www.w3.org/2000/svg}"


def history(*records) -> RouterHistory:
    made = RouterHistory()
    for one in records:
        made.add(one)
    return made


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_every_cell_of_the_map_stands_where_its_expert_and_steps_are():
    made = history(
        record(10, layers={1: health(4, 4)}),
        record(20, layers={1: health(4, 4)}),
        record(40, layers={1: health(8, 0)}),
    )
    root = ElementTree.fromstring(render_chart(made, "t"))
    cells = {
        path.get("class") or "c0": [
            tuple(map(float, re.findall(r"[-\d.]+", part))) for part in path.get("d").split("z")[:-1]
        ]
        for group in root.iter(f"{SVG}g")
        if group.get("shape-rendering")
        for path in group
    }
    middle, right = LEFT + (WIDTH - LEFT - RIGHT) / 2, WIDTH - RIGHT
    # two equal bins became one rectangle per expert; then one expert has everything (2x) and the other nothing
    (top_left, bottom_left) = cells["c4"]
    assert (top_left[0], top_left[2]) == (LEFT, middle)
    assert bottom_left[1] == top_left[1] + 16
    assert [(c[0], c[1], c[2]) for c in cells["c6"]] == [(middle, top_left[1], right)]
    assert [(c[0], c[1], c[2]) for c in cells["c0"]] == [(middle, bottom_left[1], right)]


def test_the_curve_goes_through_the_losses_and_validation_points_are_labelled():
    made = history(record(10, loss=4.0), record(20, loss=2.0, val={"stdlib": 3.0}), record(30, loss=math.nan))
    root = ElementTree.fromstring(render_chart(made, "t"))
    path = next(p for p in root.iter(f"{SVG}path") if p.get("class") == "train")
    (x0, y0), (x1, y1) = re.findall(r"([\d.]+) ([\d.]+)", path.get("d"))
    assert (float(x1) - float(x0)) == pytest.approx((WIDTH - LEFT - RIGHT) / 3, abs=0.11)
    assert float(y1) > float(y0)
    circle = next(root.iter(f"{SVG}circle"))
    assert float(circle.get("cy")) == pytest.approx((float(y0) + float(y1)) / 2, abs=0.11)
    assert circle.find(f"{SVG}title").text == "stdlib, step 20: 3.0000"


def test_flags_captions_axes_and_legend_are_in_words():
    made = history(
        *(record(s, val={"a": 1.0}, layers={3: health(90, 0, 4, 6, kept=(40, 0, 4, 6))}) for s in (5, 10))
    )
    shown = " | ".join(texts(render_chart(made, "runs/x & <y>")))
    for part in (
        "runs/x & <y>",
        "Layer 3",
        "busiest expert 3.60× an even share · 50.0% dropped · overloaded: 0 · without tokens: 1",
        "loss, nats per token",
        "expert",
        "step",
        "validation: a",
        "load of an expert relative to an even share",
        "none",
    ):
        assert part in shown


def test_it_is_one_file_that_adapts_to_dark_viewers():
    svg = render_chart(history(record(1)), "t")
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r"href|url\((?!#)|<script|@import|@font-face", svg)
    defined = set(re.findall(r"\.(\w+) \{", svg))
    used = {name for names in re.findall(r'class="([\w ]+)"', svg) for name in names.split()}
    assert used <= defined


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(1)],
        [record(1, loss=math.nan)],
        [record(1, layers={}), record(2, layers={})],
        [record(1, layers={0: health(0, 0)})],
        [record(1, layers={0: health(*[3] * 256)}, val=dict.fromkeys("abcdef", 2.0))],
        [record(s, loss=1.0) for s in range(1, 5)],
    ],
    ids=["empty", "one", "nan", "dense", "no-tokens", "256-experts", "flat"],
)
def test_unusual_histories_give_a_picture_too(records, tmp_path: Path):
    write_chart(history(*records), tmp_path / "load.svg", "t")
    svg = (tmp_path / "load.svg").read_text()
    root = ElementTree.fromstring(svg)
    assert "nan" not in re.sub(r"<text.*?</text>|<title.*?</title>|<desc.*?</desc>", "", svg)
    height = float(root.get("height"))
    lowest = max(float(node.get("y", 0)) for node in root.iter(f"{SVG}rect"))
    assert lowest < height


def test_a_long_run_of_a_large_model_stays_a_small_file():
    made = RouterHistory()
    for step in range(1, 1200):
        layers = {n: health(*[(e * 7 + step // 40 + n) % 30 + 1 for e in range(64)]) for n in (1, 3)}
        made.add(record(step, layers=layers))
    assert len(render_chart(made, "t")) < 1_000_000


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 2000, 8) == [0, 500, 1000, 1500, 2000]
    assert nice_ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(1.93, 2.11, 5) == pytest.approx([1.95, 2.0, 2.05, 2.1])
    assert nice_ticks(3, 3, 5) == [3]


def test_levels_of_load():
    assert [level(r) for r in (0, 0.1, 0.25, 0.7, 1.0, 1.5, 2.5, 3.0)] == [0, 1, 2, 3, 4, 5, 6, 7]
