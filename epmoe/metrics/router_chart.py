"""One self-contained SVG of a run: the loss curve, and what every expert of every MoE layer was asked to do.

Readable in light and dark viewers and by colour-blind people: blue is less than an even share, orange is more,
and an expert without any tokens is hatched rather than coloured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from epmoe.data.files import write_atomically
from epmoe.errors import printable
from epmoe.metrics.router_health import Bin, LayerSummary, RouterHistory

WIDTH, LEFT, RIGHT = 960, 76, 28
_TOP, _LOSS_HEIGHT, _GAP, _LEGEND = 92, 230, 62, 74
_MAP_HEIGHT, _ROW_MIN, _ROW_MAX = 128, 2.0, 16.0
_EDGES = (0.25, 0.5, 0.8, 1.25, 2.0, 3.0)
_LEVELS = ("none", "under ¼×", "¼–½×", "½–0.8×", "0.8–1¼×", "1¼–2×", "2–3×", "over 3×")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A validation point."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Validation of one source."""

    name: str
    colour: int
    path: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPanel:
    """The upper picture."""

    top: float
    height: float
    ticks: tuple[Tick, ...]
    path: str
    series: tuple[Series, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """One MoE layer: experts downwards, steps to the right."""

    layer: int
    caption: str
    flagged: bool
    top: float
    height: float
    ticks: tuple[Tick, ...]
    paths: tuple[tuple[int, str], ...]
    """Level and outline of all its cells."""


def write_chart(history: RouterHistory, path: Path, title: str) -> None:
    """Writes the SVG of a run; an empty history gives a picture that says so."""
    write_atomically(path, render_chart(history, title).encode())


def render_chart(history: RouterHistory, title: str) -> str:
    """The SVG of a run as text."""
    bins = history.bins
    last_step = max(bins[-1].last_step, 1) if bins else 1
    scale = (WIDTH - LEFT - RIGHT) / last_step
    loss = _loss_panel(bins, scale)
    maps = tuple(_heat_maps(history, scale, loss.top + loss.height + _GAP))
    bottom = maps[-1].top + maps[-1].height if maps else loss.top + loss.height
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("router_chart.svg.jinja").render(
        title=printable(title),
        subtitle=_subtitle(bins),
        width=WIDTH,
        height=round(bottom + 46 + (_LEGEND if maps else 0)),
        left=LEFT,
        right=WIDTH - RIGHT,
        loss=loss if bins else None,
        maps=maps,
        steps=tuple(Tick(at=_r(LEFT + t * scale), label=f"{t:,.0f}") for t in nice_ticks(0, last_step, 8)),
        bottom=bottom,
        levels=_LEVELS,
    )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from low to high, about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def level(ratio: float) -> int:
    """Colour of a cell: 0 = no tokens at all, then seven steps of load relative to an even share."""
    return 0 if ratio == 0 else 1 + sum(ratio >= edge for edge in _EDGES)


def _loss_panel(bins: Sequence[Bin], scale: float) -> LossPanel:
    points = [(part.last_step, part.loss) for part in bins if part.losses]
    by_source: dict[str, list[tuple[int, float]]] = {}
    for part in bins:
        for name, (step, value) in part.val.items():
            if math.isfinite(value):
                by_source.setdefault(name, []).append((step, value))
    values = [v for _, v in points] + [v for source in by_source.values() for _, v in source] or [0.0, 1.0]
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad

    def place(step: float, value: float) -> tuple[float, float]:
        return _r(LEFT + step * scale), _r(_TOP + (high - value) / (high - low) * _LOSS_HEIGHT)

    ticks = nice_ticks(low, high, 5)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 2
    series = tuple(
        Series(
            name=name,
            colour=i % 4,
            path=_polyline([place(*point) for point in source]),
            marks=tuple(
                Mark(x=place(*p)[0], y=place(*p)[1], text=f"{name}, step {p[0]:,}: {p[1]:.4f}")
                for p in source
            ),
        )
        for i, (name, source) in enumerate(by_source.items())
    )
    return LossPanel(
        top=_TOP,
        height=_LOSS_HEIGHT,
        ticks=tuple(Tick(at=place(0, t)[1], label=f"{t:.{digits}f}") for t in ticks),
        path=_polyline([place(*point) for point in points]),
        series=series,
    )


def _heat_maps(history: RouterHistory, scale: float, top: float) -> Iterator[HeatMap]:
    for summary in history.summary():
        experts = len(summary.health.demand_E)
        row = min(max(_MAP_HEIGHT / max(experts, 1), _ROW_MIN), _ROW_MAX)
        every = max(1, math.ceil(12 / row), math.ceil(experts / 8))
        yield HeatMap(
            layer=summary.layer,
            caption=_caption(summary),
            flagged=summary.flagged,
            top=top,
            height=_r(experts * row),
            ticks=tuple(Tick(at=_r(top + (e + 0.5) * row), label=str(e)) for e in range(0, experts, every)),
            paths=_cells(history.bins, summary.layer, experts, scale, top, row),
        )
        top += experts * row + _GAP - 14


def _cells(
    bins: Sequence[Bin], layer: int, experts: int, scale: float, top: float, row: float
) -> tuple[tuple[int, str], ...]:
    """All cells of a map, one outline per level; neighbours of one level in a row become one rectangle."""
    columns: list[tuple[float, float, tuple[int, ...]]] = []
    start = 0
    for part in bins:
        health = part.layers.get(layer)
        if health is not None and len(health.demand_E) == experts and sum(health.demand_E) > 0:
            levels = tuple(level(share * experts) for share in health.share_E)
            columns.append((_r(LEFT + start * scale), _r(LEFT + part.last_step * scale), levels))
        start = part.last_step
    outlines: dict[int, list[str]] = {}
    for expert in range(experts):
        y = _r(top + expert * row)
        runs: list[tuple[float, float, int]] = []
        for left, right, levels in columns:
            if runs and runs[-1][1] == left and runs[-1][2] == levels[expert]:
                runs[-1] = (runs[-1][0], right, levels[expert])
            else:
                runs.append((left, right, levels[expert]))
        for left, right, shade in runs:
            outlines.setdefault(shade, []).append(f"M{left:g} {y:g}H{right:g}v{_r(row):g}H{left:g}z")
    return tuple((shade, "".join(parts)) for shade, parts in sorted(outlines.items()))


def _caption(summary: LayerSummary) -> str:
    health = summary.health
    words = [f"busiest expert {health.max_over_mean:.2f}× an even share", f"{health.drop_rate:.1%} dropped"]
    if summary.overloaded_experts:
        words.append(f"overloaded: {_some(summary.overloaded_experts)}")
    if health.dead_experts:
        words.append(f"without tokens: {_some(health.dead_experts)}")
    return " · ".join(words)


def _some(experts: tuple[int, ...]) -> str:
    return ", ".join(map(str, experts[:6])) + (f" and {len(experts) - 6} more" if len(experts) > 6 else "")


def _subtitle(bins: Sequence[Bin]) -> str:
    if not bins:
        return "no records yet"
    words = [f"{bins[-1].last_step:,} steps"]
    finite = [part for part in bins if part.losses]
    if finite:
        words.append(f"training loss {finite[0].loss:.3f} → {finite[-1].loss:.3f}")
    latest: dict[str, tuple[int, float]] = {}
    for part in bins:
        latest |= part.val
    words += [f"validation {name} {value:.3f}" for name, (_, value) in latest.items()]
    return " · ".join(words)


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))


def _r(value: float) -> float:
    return round(value, 1)
