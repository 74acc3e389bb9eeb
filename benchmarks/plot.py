"""Horizontal bars in groups, and curves in panels, as one self-contained SVG, readable in light and dark viewers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from common import Spread

from epmoe.metrics.router_chart import nice_ticks

WIDTH, LEFT, RIGHT, TOP = 960, 250, 150, 84
_BAR, _STEP, _GROUP = 14, 19, 34
_STYLE = """
  text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 12px; fill: #57606a; }
  .page { fill: #ffffff; } .grid { stroke: #e4e8ec; } .mark { stroke: #d55e00; stroke-dasharray: 4 3; }
  .h1 { font-size: 20px; font-weight: 600; fill: #1f2328; } .h2 { font-size: 13px; font-weight: 600; fill: #1f2328; }
  .bar { fill: #9fb3c8; } .ours { fill: #0072b2; } .spread { stroke: #1f2328; }
  @media (prefers-color-scheme: dark) {
    text { fill: #9aa4af; } .page { fill: #0d1117; } .grid { stroke: #21272f; } .h1, .h2 { fill: #e6edf3; }
    .bar { fill: #47566a; } .ours { fill: #56b4e9; } .spread { stroke: #e6edf3; } .mark { stroke: #f0883e; }
  }"""

_MARGIN, _LEGEND, _COLOURS = 66, 190, 6
_LINE_STYLE = """
  .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .dash { stroke-dasharray: 6 3; }
  .base { stroke: #1f2328; stroke-width: 3; } .c0 { stroke: #0072b2; } .c1 { stroke: #d55e00; } .c2 { stroke: #009e73; }
  .c3 { stroke: #cc79a7; } .c4 { stroke: #8a6d00; } .c5 { stroke: #56b4e9; }
  @media (prefers-color-scheme: dark) {
    .base { stroke: #e6edf3; } .c0 { stroke: #4a9fe0; } .c4 { stroke: #e3c74a; }
  }"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar; ``low`` and ``high`` draw its quartiles."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    ours: bool = False


def share_bar(label: str, share: Spread, *, ours: bool) -> Bar:
    """A bar for a share of something, as a percentage with its quartiles."""
    return Bar(
        label=label, value=share.median, text=f"{share.median:.0%}", low=share.low, high=share.high, ours=ours
    )


def bar_chart(
    title: str, subtitle: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, axis: str, mark: float | None
) -> str:
    """The picture as text.

    Args:
        groups: Heading and bars.
        axis: What the length of a bar means.
        mark: A value with a dashed line, such as a bound; None = no line.
    """
    values = [bar.high or bar.value for _, bars in groups for bar in bars]
    top = max([*values, mark or 0.0, 1e-12]) * 1.02
    scale = (WIDTH - LEFT - RIGHT) / top
    height = TOP + sum(_GROUP + _STEP * len(bars) for _, bars in groups) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}\n</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="h1" x="24" y="36">{escape(title)}</text>',
        f'<text x="24" y="58">{escape(subtitle)}</text>',
    ]
    for tick in nice_ticks(0.0, top, 6):
        x = LEFT + tick * scale
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP - 10}V{height - 38}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 22}" text-anchor="middle">{tick:g}</text>')
    y = float(TOP)
    for heading, bars in groups:
        parts.append(f'<text class="h2" x="24" y="{y + 14:.0f}">{escape(heading)}</text>')
        y += _GROUP - 12
        for bar in bars:
            parts += _bar(bar, y, scale)
            y += _STEP
        y += 12
    if mark is not None:
        parts.append(f'<path class="mark" d="M{LEFT + mark * scale:.1f} {TOP - 10}V{height - 38}"/>')
    x = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{x:.0f}" y="{height - 6}" text-anchor="middle">{escape(axis)}</text>\n</svg>\n')
    return "\n".join(parts)


def _bar(bar: Bar, y: float, scale: float) -> list[str]:
    end = LEFT + bar.value * scale
    middle = y + _BAR / 2
    parts = [
        f'<text x="{LEFT - 10}" y="{y + 11:.1f}" text-anchor="end">{escape(bar.label)}</text>',
        f'<rect class="{"ours" if bar.ours else "bar"}" x="{LEFT}" y="{y:.1f}" width="{bar.value * scale:.1f}" '
        f'height="{_BAR}"/>',
    ]
    if bar.low is not None and bar.high is not None:
        end = max(end, LEFT + bar.high * scale)
        parts.append(
            f'<path class="spread" d="M{LEFT + bar.low * scale:.1f} {middle:.1f}H{LEFT + bar.high * scale:.1f}"/>'
        )
    parts.append(f'<text x="{end + 6:.1f}" y="{y + 11:.1f}">{escape(bar.text)}</text>')
    return parts


# -------------------------------------------------------------------------------------------------- lines
@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve; all panels have the same lines in the same order."""

    label: str
    points: Sequence[tuple[float, float]]
    base: bool = False
    """The one that the others are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Curves over one axis."""

    axis: str
    lines: Sequence[Line]


def line_chart(title: str, subtitle: str, panels: Sequence[Panel], *, axis: str) -> str:
    """Panels side by side with one vertical axis -> the picture as text.

    The steep beginning is cut off: the highest value shown is the largest one a quarter of the way along the curves.
    """
    lines = panels[0].lines
    low = min((y for line in lines for _, y in line.points), default=0.0)
    high = max((line.points[len(line.points) // 4][1] for line in lines if line.points), default=1.0)
    height, top, bottom = 460, TOP, 400
    width = (WIDTH - _LEGEND - _MARGIN * len(panels)) / len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{_LINE_STYLE}\n</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="h1" x="24" y="36">{escape(title)}</text>',
        f'<text x="24" y="58">{escape(subtitle)}</text>',
        f'<text text-anchor="middle" transform="translate(18 {(top + bottom) / 2:.0f}) rotate(-90)">'
        f"{escape(axis)}</text>",
    ]
    for index, panel in enumerate(panels):
        box = _Box(
            left=_MARGIN + index * (width + _MARGIN), width=width, top=top, bottom=bottom, low=low, high=high
        )
        parts += _panel(panel, box)
    parts += _legend(lines, WIDTH - _LEGEND + 24, top)
    return "\n".join([*parts, "</svg>\n"])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """Where a panel lies, and the values at its lower and upper edge."""

    left: float
    width: float
    top: float
    bottom: float
    low: float
    high: float

    def height_of(self, value: float) -> float:
        return self.bottom - (value - self.low) / max(self.high - self.low, 1e-12) * (self.bottom - self.top)


def _panel(panel: Panel, box: _Box) -> list[str]:
    end = max((x for line in panel.lines for x, _ in line.points), default=1.0)
    scale = box.width / end
    parts = []
    for tick in nice_ticks(box.low, box.high, 6):
        y = box.height_of(tick)
        parts.append(f'<path class="grid" d="M{box.left:.1f} {y:.1f}h{box.width:.1f}"/>')
        parts.append(f'<text x="{box.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in nice_ticks(0.0, end, 5):
        x = box.left + tick * scale
        parts.append(f'<text x="{x:.1f}" y="{box.bottom + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    for index, line in enumerate(panel.lines):
        shown = [(box.left + x * scale, box.height_of(y)) for x, y in line.points if y <= box.high]
        path = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(shown))
        parts.append(
            f'<path class="{_line_class(line, index)}" d="{path}"><title>{escape(line.label)}</title></path>'
        )
    middle = box.left + box.width / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{box.bottom + 40:.0f}" text-anchor="middle">{escape(panel.axis)}</text>'
    )
    return parts


def _legend(lines: Sequence[Line], x: float, y: float) -> list[str]:
    """Labels with the last values, the smallest of them first."""
    parts = []
    order = sorted((line.points[-1][1], index) for index, line in enumerate(lines) if line.points)
    for place, (last, index) in enumerate(order):
        middle, line = y + 10 + 22 * place, lines[index]
        parts.append(f'<path class="{_line_class(line, index)}" d="M{x:.0f} {middle:.0f}h26"/>')
        parts.append(f'<text x="{x + 34:.0f}" y="{middle + 4:.0f}">{escape(line.label)} {last:.3f}</text>')
    return parts


def _line_class(line: Line, index: int) -> str:
    return "line base" if line.base else f"line c{index % _COLOURS}{' dash' if index // _COLOURS % 2 else ''}"
