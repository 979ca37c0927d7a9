"""What the figures of a report are made of: panels as inline SVG in light and in dark, lines, axes and legends.

Imports matplotlib, so import this module only where figures are drawn.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from jlt.config import PREDICTIONS, Prediction
from jlt.report import palette
from jlt.report.palette import INK, LINE, MUTED, PAPER, PREDICTION, SHORT_NAMES, TIME, swatch
from jlt.report.study import Spread, System, spread
from jlt.report.wording import listed, number, percent

HALF: tuple[float, float] = (4.5, 3.0)
THIRD: tuple[float, float] = (3.4, 2.8)
"""Panel sizes in inches, for two and for three in a row; text stays readable when a phone shrinks them."""

LOG_RATIO = 5.0
"""A curve whose values span more than this ratio is drawn on a logarithmic axis."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jlt",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK.light,
    "axes.labelsize": 9.5,
    "axes.labelcolor": MUTED.light,
    "axes.edgecolor": LINE.light,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LINE.light,
    "grid.linewidth": 0.6,
    "xtick.color": LINE.light,
    "ytick.color": LINE.light,
    "xtick.labelcolor": MUTED.light,
    "ytick.labelcolor": MUTED.light,
    "text.color": INK.light,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
}


@dataclass(frozen=True)
class Panel:
    """One drawing as two data URIs, its size in CSS pixels and its description for screen readers."""

    light: str
    dark: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class LegendEntry:
    """One line of a legend in the page: a drawn swatch and its name."""

    swatch: str
    label: str


@dataclass(frozen=True)
class Figure:
    """Panels in a row with one legend and a caption."""

    title: str
    panels: tuple[Panel, ...]
    caption: str
    legend: tuple[LegendEntry, ...] = ()


def figure_of(
    title: str, panels: Iterable[Panel | None], caption: str, legend: Iterable[LegendEntry] = ()
) -> Figure | None:
    """Return a figure of the panels that could be drawn, None if there are none."""
    shown = tuple(panel for panel in panels if panel)
    return Figure(title, shown, caption, tuple(legend)) if shown else None


def draw(paint: Callable[[Axes], object], alt: str, size: tuple[float, float] = HALF) -> Panel:
    """Render one axes as SVG, and recolour it for dark paper."""
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=size, layout="constrained")
        axes = canvas.subplots()
        paint(axes)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # The viewer's own interface font instead of matplotlib's; metrics are close enough for these short labels.
    svg = re.sub(
        r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", buffer.getvalue()
    )
    roles = [*PREDICTION.values(), *TIME, *palette.SCALE, INK, MUTED, LINE, PAPER]
    dark = {role.light: role.dark for role in roles}
    recoloured = re.sub(r"#[0-9a-f]{6}\b", lambda match: dark.get(match[0], match[0]), svg)
    width, height = (round(96 * side) for side in size)
    return Panel(_data_uri(svg), _data_uri(recoloured), width, height, alt)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def make_log(axes: Axes, values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic with plain numbers, more of them if the values span few decades."""
    axes.set_yscale("log")
    subs = (1.0, 2.0, 5.0) if max(values) / min(values) < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 1)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def system_legend(systems: Sequence[System]) -> tuple[LegendEntry, ...]:
    """Return one entry per system; systems that differ in the loss space alone share one."""
    entries = [LegendEntry(swatch(system.prediction, system.patch_size), system.name) for system in systems]
    return tuple(dict.fromkeys(entries))


def prediction_legend(predictions: Iterable[Prediction] = PREDICTIONS) -> tuple[LegendEntry, ...]:
    """Return one entry per prediction, for figures of the targets themselves."""
    return tuple(LegendEntry(swatch(prediction, 1), SHORT_NAMES[prediction]) for prediction in predictions)


def curve_style(system: System) -> dict[str, Any]:
    """Return colour, dashes and marker of a system."""
    return {
        "color": PREDICTION[system.prediction].light,
        "dashes": palette.dashes(system.patch_size) or (None, None),
        "marker": palette.MARKER[system.prediction],
        "markersize": 5,
        "markeredgecolor": PAPER.light,
        "markeredgewidth": 0.6,
    }


@dataclass(frozen=True)
class Line:
    """One curve of a panel, with a band from `low` to `high` around it if they are given."""

    name: str
    """Empty for a line that the description of the panel leaves out."""
    x: Sequence[float]
    y: Sequence[float]
    style: Mapping[str, Any]
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    @classmethod
    def of(cls, name: str, points: Mapping[int, Spread], style: Mapping[str, Any]) -> Line:
        """Return the means over seeds against the step, with their ranges as a band if there are several seeds."""
        spreads = list(points.values())
        banded = spreads if any(point.count > 1 for point in spreads) else []
        low, high = [point.low for point in banded], [point.high for point in banded]
        return cls(name, list(points), [point.mean for point in spreads], style, low, high)

    def draw(self, axes: Axes) -> None:
        """Draw the line and its band."""
        axes.plot(self.x, self.y, **self.style)
        if self.low:
            axes.fill_between(self.x, self.low, self.high, color=self.style["color"], alpha=0.18, linewidth=0)


def draw_spreads(axes: Axes, points: Sequence[tuple[float, Spread]], **style: Any) -> None:
    """Draw means over seeds at their places, with bars from the smallest to the largest."""
    where, spreads = zip(*points, strict=True) if points else ((), ())
    bars = [[spread.mean - spread.low for spread in spreads], [spread.high - spread.mean for spread in spreads]]
    means = [spread.mean for spread in spreads]
    axes.errorbar(where, means, yerr=bars, markersize=5, capsize=2, linewidth=1.2, **style)


def step_panel(
    title: str,
    lines: Sequence[Line | None],
    *,
    write: Callable[[float], str] = number,
    linear: bool = False,
    zero: bool = False,
    restarts: Sequence[int] = (),
    paint: Callable[[Axes], object] | None = None,
    size: tuple[float, float] = HALF,
) -> Panel | None:
    """Draw lines over the training steps, the starts of later sessions as thin lines; None without any line.

    The vertical axis begins at 0 (`zero`), or is logarithmic if the values span much and it is not `linear`.
    """
    drawn = [line for line in lines if line]
    if not drawn:
        return None
    values = [value for line in drawn for value in (*line.y, *line.low, *line.high)]

    def paint_all(axes: Axes) -> None:
        for restart in restarts:
            axes.axvline(restart, color=MUTED.light, linewidth=0.8, dashes=(1.2, 2.4))
        for line in drawn:
            line.draw(axes)
        if zero:
            axes.set_ylim(0, 1.12 * max(values) or 1)
        elif not linear:
            log_if_wide(axes, values)
        if write is percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
        elif zero:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9f}".rstrip("0").rstrip(".")))
        axes.set(title=title, xlabel="training step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.margins(x=0.03)
        if paint:
            paint(axes)

    ends = [f"{line.name} ends at {write(line.y[-1])}" for line in drawn if line.name]
    return draw(paint_all, f"{title}. Against the training step, {listed(ends)}.", size)


def spans_much(values: Sequence[float]) -> bool:
    """Return whether the values are positive and their ratio is so large that an axis should be logarithmic."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_RATIO


def log_if_wide(axes: Axes, values: Sequence[float]) -> bool:
    """Make the vertical axis logarithmic if the values span much, and return whether they do."""
    if wide := spans_much(values):
        make_log(axes, values)
    return wide


def moving_average(values: Sequence[float | None]) -> list[float | None]:
    """Return the trailing mean over a twentieth of the values, None where all of them are None."""
    window = max(1, len(values) // 20)
    totals = [0.0, *accumulate(value or 0.0 for value in values)]
    counts = [0, *accumulate(int(value is not None) for value in values)]
    spans = [(max(0, end - window), end) for end in range(1, len(totals))]
    return [
        (totals[end] - totals[start]) / (counts[end] - counts[start]) if counts[end] > counts[start] else None
        for start, end in spans
    ]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known, None if there are none."""
    found = spread(values)
    return found.mean if found else None
