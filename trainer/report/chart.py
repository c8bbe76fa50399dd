"""Line charts as SVG.

The drawing is stretched to whatever width the page gives it (`preserveAspectRatio="none"`), with strokes that do not
stretch; labels are HTML beside it, placed in percent. So text keeps its size on a phone, in print and on a wide screen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from trainer.report.read import Series
from trainer.report.text import compact, escape, number

POINTS = 1500
"""No line has more points than this: more cannot be seen, and a page about a million steps stays small."""
WIDTH, HEIGHT = 1000, 400


@dataclass
class Line:
    """One line of a chart. `style` names its look in the style sheet: `raw`, `smooth`, `val`, `extra1`, ..."""

    name: str
    series: Series
    style: str
    points: bool = False


@dataclass
class Mark:
    """A vertical line at a step where the run was resumed, perhaps more than once."""

    step: int
    times: int = 1


@dataclass
class Chart:
    """What one figure shows. `zero`: the axis starts at nought, for amounts that are compared by their size."""

    key: str
    title: str
    unit: str
    lines: list[Line]
    zero: bool = False
    tall: bool = False
    marks: list[Mark] = field(default_factory=list)
    skipped: Sequence[int] = ()


@dataclass
class Frame:
    """The part of the plane that is drawn, and how many values lie outside it."""

    x0: float
    x1: float
    y0: float
    y1: float
    above: int = 0
    peak: float = 0.0
    peak_step: int = 0

    def x(self, step: float) -> float:
        """Horizontal position, 0 to 1."""
        return (step - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        """Vertical position from the top, 0 to 1."""
        return (self.y1 - value) / (self.y1 - self.y0)


def usual(values: np.ndarray) -> tuple[float, float]:
    """The range that nearly all values share, with room around it: what lies outside is a spike, or a first step.

    Half a percent at each end may be left out, if it lies further off than half of what the others span.
    """
    ordered = np.sort(values)
    low, high = float(ordered[0]), float(ordered[-1])
    if len(ordered) < 20:
        return low, high
    aside = int(0.005 * (len(ordered) - 1)) + 1
    inner_low, inner_high = float(ordered[aside]), float(ordered[-1 - aside])
    room = 0.5 * (inner_high - inner_low)
    return max(low, inner_low - room), min(high, inner_high + room)


def smooth(series: Series) -> Series | None:
    """A moving mean over about a fiftieth of the run, free of lag; None when there is too little to smooth.

    The window shrinks towards the start, where losses fall steeply, and loses its right half towards the end, so that
    the last value is a mean too. A spike counts as no more than the usual range, lest it show as a plateau.
    """
    series = series.finite()
    count = len(series)
    if count < 40:
        return None
    radius = max(2, count // 100)
    values = np.clip(series.values, *usual(series.values))
    index = np.arange(count)
    first = index - np.minimum(radius, index)
    last = np.minimum(index + np.minimum(radius, index), count - 1)
    for _ in range(2):  # a box, and once more: without the corners that one box has
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[last + 1] - sums[first]) / (last + 1 - first)
    return Series(series.steps, values)


def downsample(series: Series, limit: int = POINTS) -> Series:
    """At most `limit` points, true ones: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(series) <= limit:
        return series
    finite = series.finite()
    if len(finite) <= limit:
        return finite
    # The two ends of the run are kept as they are; what lies between is shared out.
    bounds = np.linspace(1, len(finite) - 1, (limit - 2) // 2 + 1).astype(int)
    keep = [0]
    for start, stop in pairwise(bounds.tolist()):
        part = finite.values[start:stop]
        keep += sorted({start + int(part.argmin()), start + int(part.argmax())})
    keep.append(len(finite) - 1)
    return Series(finite.steps[keep], finite.values[keep])


def frame(lines: Sequence[Line], x0: int, x1: int, *, zero: bool) -> Frame:
    """Chooses the axes so that a few extreme values (a first step that compiles, one spike) do not flatten the rest."""
    measured = [line.series.finite() for line in lines if line.style != "smooth"]
    values = np.concatenate([series.values for series in measured])
    steps = np.concatenate([series.steps for series in measured])
    assert len(values), "a chart is only drawn when it has a value"
    low, high = float(values.min()), usual(values)[1]
    if zero and low >= 0:
        low = 0.0
    span = (high - low) or abs(high) or 1.0
    y0, y1 = (low if zero and low == 0 else low - 0.06 * span), high + 0.06 * span
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    peak = int(values.argmax())
    return Frame(x0, x1, y0, y1, int((values > y1).sum()), float(values[peak]), int(steps[peak]))


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[float]:
    """Round numbers within [low, high], `about` of them: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.8 * rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def draw(chart: Chart, x0: int, x1: int) -> str:
    """The figure as HTML. All charts of a page share the range of steps, so that one crosshair crosses them all."""
    area = frame(chart.lines, x0, x1, zero=chart.zero)
    y_ticks = ticks(area.y0, area.y1, 6 if chart.tall else 4)
    x_ticks = ticks(area.x0, area.x1, 8 if chart.tall else 5, whole=True)
    drawn = [Line(line.name, downsample(line.series), line.style, line.points) for line in chart.lines]
    key = escape(chart.key)
    return f"""
<figure class="chart{" tall" if chart.tall else ""}" id="chart-{key}" data-x0="{area.x0}" data-x1="{area.x1}">
<figcaption><h3>{escape(chart.title)} <small>{escape(chart.unit)}</small><span class="at"></span></h3>{_legend(chart)}
</figcaption>
<div class="plot" tabindex="0" aria-label="{escape(chart.title)}: arrow keys move the crosshair">
<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-labelledby="t-{key} d-{key}">
<title id="t-{key}">{escape(chart.title)}</title><desc id="d-{key}">{escape(_description(chart))}</desc>
{_grid(area, y_ticks)}{_skipped(area, chart.skipped)}{_mark_lines(area, chart.marks)}
{"".join(_line(area, line) for line in drawn)}
</svg>
{_labels(area, x_ticks, y_ticks)}{_mark_labels(area, chart.marks) if chart.tall else ""}
<div class="crosshair" hidden></div>
</div>{_remark(area)}
<script type="application/json">{_data(drawn)}</script>
</figure>"""


def _description(chart: Chart) -> str:
    told = []
    for line in chart.lines:
        finite = line.series.finite()
        if len(finite) and line.style != "smooth":
            first, last = number(finite.values[0]), number(finite.values[-1])
            told.append(
                f"{line.name}: {first} at step {finite.steps[0]}, {last} at step {finite.steps[-1]}, "
                f"lowest {number(finite.values.min())}, highest {number(finite.values.max())}."
            )
    return " ".join(told)


def _legend(chart: Chart) -> str:
    items = []
    for index, line in enumerate(chart.lines):
        finite = line.series.finite()
        last = number(finite.values[-1]) if len(finite) else "–"
        swatch = f'<svg viewBox="0 0 24 10" aria-hidden="true"><path class="{line.style}" d="M1 5H23"/>'
        swatch += f'<path class="dot {line.style}" d="M12 5h.01"/></svg>' if line.points else "</svg>"
        items.append(f'<li>{swatch}{escape(line.name)} <b data-line="{index}" data-last="{last}">{last}</b></li>')
    if chart.marks and chart.tall:
        items.append(
            '<li><svg viewBox="0 0 24 10" aria-hidden="true"><path class="mark" d="M12 0V10"/></svg>resumed</li>'
        )
    if len(chart.skipped):
        items.append(
            '<li><svg viewBox="0 0 24 10" aria-hidden="true"><path class="skip" d="M12 1V9"/></svg>skipped</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _grid(area: Frame, y_ticks: list[float]) -> str:
    rows = "".join(f"M0 {HEIGHT * area.y(value):.1f}H{WIDTH}" for value in y_ticks)
    return f'<path class="grid" d="{rows}"/>' if rows else ""


def _skipped(area: Frame, steps: Sequence[int]) -> str:
    if not len(steps):
        return ""
    # Many skipped steps fall together on the same pixels; a set of rounded positions keeps the path short.
    places = sorted({round(WIDTH * area.x(step), 1) for step in steps})
    ticks_down = "".join(f"M{place:g} {HEIGHT}V{HEIGHT * 0.93:.0f}" for place in places)
    return f'<path class="skip" d="{ticks_down}"/>'


def _mark_lines(area: Frame, marks: Sequence[Mark]) -> str:
    lines = []
    for mark in marks:
        place = WIDTH * area.x(mark.step)
        lines.append(
            f'<path class="mark" d="M{place:.1f} 0V{HEIGHT}"><title>resumed at step {mark.step:,}</title></path>'
        )
    return "".join(lines)


def _mark_labels(area: Frame, marks: Sequence[Mark]) -> str:
    labels, free_from = [], -1.0
    for mark in marks:
        place = area.x(mark.step)
        if place < free_from:
            continue  # the line is there, and its text would lie on its neighbour's
        free_from = place + 0.2
        side = ' class="left"' if place > 0.8 else ""
        times = f" × {mark.times}" if mark.times > 1 else ""
        text = f"<i>resumed at </i>{mark.step:,}{times}"  # a narrow page leaves the words to the legend
        labels.append(f'<span{side} style="left:{100 * place:.2f}%">{text}</span>')
    return f'<div class="marks" aria-hidden="true">{"".join(labels)}</div>'


def _line(area: Frame, line: Line) -> str:
    steps = WIDTH * (line.series.steps - area.x0) / (area.x1 - area.x0)
    heights = HEIGHT * (area.y1 - line.series.values) / (area.y1 - area.y0)
    heights = np.clip(heights, -0.1 * HEIGHT, 1.1 * HEIGHT)  # NaN stays NaN
    path, dots, pen_down = [], [], False
    for x, y in zip(steps.tolist(), heights.tolist(), strict=True):
        if math.isnan(y):
            pen_down = False
            continue
        # A point between two gaps has no line to belong to; a stroke of no length with round ends is a dot.
        path.append(f"L{x:.1f} {y:.1f}" if pen_down else f"M{x:.1f} {y:.1f}h0")
        dots.append(f"M{x:.1f} {y:.1f}h0")
        pen_down = True
    drawn = f'<path class="{line.style}" d="{"".join(path)}"/>'
    if len(dots) == 1 or (line.points and len(dots) <= 60):
        drawn += f'<path class="dot {line.style}" d="{"".join(dots)}"/>'
    return drawn


def _labels(area: Frame, x_ticks: list[float], y_ticks: list[float]) -> str:
    rows = "".join(f'<span style="top:{100 * area.y(value):.2f}%">{compact(value, 6)}</span>' for value in y_ticks)
    columns = "".join(f'<span style="left:{100 * area.x(step):.2f}%">{compact(step, 6)}</span>' for step in x_ticks)
    return f'<div class="ys" aria-hidden="true">{rows}</div><div class="xs" aria-hidden="true">{columns}</div>'


def _remark(area: Frame) -> str:
    if not area.above:
        return ""
    values = "One value lies" if area.above == 1 else f"{area.above:,} values lie"
    return (
        f'<p class="remark">{values} above the frame; '
        f"the highest is {number(area.peak)} at step {area.peak_step:,}.</p>"
    )


def _data(lines: Sequence[Line]) -> str:
    """What the crosshair reads. The text sits in a script element, where only `<` could end it."""
    columns = []
    for line in lines:
        finite = line.series.finite()
        values = [float(f"{value:.5g}") for value in finite.values.tolist()]
        columns.append({"steps": finite.steps.tolist(), "values": values})
    return json.dumps(columns, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
