"""The figures of a report: small panels as inline SVG, in light and in dark, in the colours of `jlt.report.palette`.

Imports matplotlib, so import this module only where figures are drawn.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from jlt.report import palette
from jlt.report.cells import Cells
from jlt.report.palette import INK, LINE, MUTED, PAPER, PREDICTION, SHORT_WORDS, SYMBOL, TIME, swatch
from jlt.report.published import SOURCE, Points, published
from jlt.report.results import Spread, Study, System, spread
from jlt.report.wording import listed, number, percent

HALF: tuple[float, float] = (4.5, 3.0)
THIRD: tuple[float, float] = (3.4, 2.8)
"""Panel sizes in inches, for two and for three beside each other; text stays readable when a phone shrinks them."""

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
    """One drawing as two data URIs, its size in CSS pixels and its words for those who cannot see it."""

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
    """Panels beside each other with one legend and a caption that says what to see."""

    title: str
    panels: tuple[Panel, ...]
    caption: str
    legend: tuple[LegendEntry, ...] = ()


def draw(paint: Callable[[Axes], None], alt: str, size: tuple[float, float] = HALF) -> Panel:
    """Render one axes once, as SVG, and recolour it for dark paper."""
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
    width, height = (round(96 * side) for side in size)
    return Panel(_data_uri(svg), _data_uri(_darken(svg)), width, height, alt)


def _darken(svg: str) -> str:
    roles = [*PREDICTION.values(), *TIME, *palette.SCALE, INK, MUTED, LINE, PAPER]
    dark = {role.light: role.dark for role in roles}
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: dark.get(match[0], match[0]), svg)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def plain_log(axis: Any, values: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers, closer together where it spans little."""
    decades = max(values) / min(values)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 300 else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 1)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


NOT_DRAWN = 1e-9
"""Of the largest value of a spectrum: what is smaller is the rounding of latents, and nothing that one should see."""


def without_rounding(values: Sequence[float], largest: float) -> list[float]:
    """Return the values of a spectrum for a logarithmic axis, not a number where they are rounding."""
    return [value if value > NOT_DRAWN * largest else float("nan") for value in values]


def drawn_only(values: Iterable[float], largest: float) -> list[float]:
    """Return those of the values that `without_rounding` leaves."""
    return [value for value in values if value > NOT_DRAWN * largest]


def system_legend(systems: Sequence[System]) -> tuple[LegendEntry, ...]:
    """Return one entry per system; loss spaces have panels of their own and share the entry."""
    entries = [LegendEntry(swatch(system.prediction, system.patch_size), system.name) for system in systems]
    return tuple(dict.fromkeys(entries))


def prediction_legend() -> tuple[LegendEntry, ...]:
    """Return one entry per prediction, for figures of the targets themselves."""
    return tuple(LegendEntry(swatch(prediction, 1), SHORT_WORDS[prediction]) for prediction in PREDICTION)


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


METRIC_PANELS: Mapping[str, tuple[str, str]] = {
    "frechet_distance": ("Fréchet distance", "lower is better"),
    "inception_score": ("Inception score", "higher is better"),
    "label_agreement": ("Label agreement", "higher is better"),
}


def training_figure(study: Study) -> Figure | None:
    """Draw metrics and the loss against the training step; None before the first number.

    Every loss space and variant has panels of its own: of several variants those of the distance and the loss alone.
    """
    alike = systems_that_compare(study.systems)
    variants = {system.variant for system in study.systems}
    metrics = list(METRIC_PANELS)[: 1 if len(variants) > 1 else None]
    panels: list[Panel] = []
    for suffix, systems in alike.items():
        drawn = [*(_metric_panel(systems, metric, suffix) for metric in metrics), _loss_panel(systems, suffix)]
        panels.extend(panel for panel in drawn if panel)
    if not panels:
        return None
    seeds = max(len(system.runs) for system in study.systems)
    band = " Lines are means over seeds, bands run from the smallest to the largest." if seeds > 1 else ""
    several = len(study.systems) > 1
    what = "Colour and marker name the prediction, the dash of the line the patch size." if several else ""
    smoothing = " The loss is a moving average over a twentieth of the training."
    look = (
        "Look at how early the curves part, and whether the order still changes at the end."
        if several
        else "Look at whether the curves are still moving at the end."
    )
    known = any(_published(metric, system) for metric in METRIC_PANELS for system in study.systems)
    beside = f" Dotted lines with open markers are as published ({SOURCE}), in part read off a plot." if known else ""
    return Figure(
        "Along the training",
        tuple(panels),
        f"{what}{band}{smoothing}{beside} {look}".strip(),
        system_legend(study.systems),
    )


def systems_that_compare(systems: Sequence[System]) -> dict[str, list[System]]:
    """Group systems by loss space and variant, under words for these, empty where there is one of each."""
    spaces = {system.loss_space for system in systems}
    groups: dict[str, list[System]] = {}
    for system in systems:
        told = [f"{SYMBOL[system.loss_space]}-space loss"] * (len(spaces) > 1) + [system.variant] * bool(system.variant)
        groups.setdefault(f" ({', '.join(told)})" if told else "", []).append(system)
    return groups


def _metric_panel(systems: Sequence[System], metric: str, suffix: str) -> Panel | None:
    curves: list[tuple[System, list[int], list[Spread]]] = []
    for system in systems:
        points = {step: value for step in system.evaluated_steps if (value := system.measured(metric, step))}
        if points:
            curves.append((system, list(points), list(points.values())))
    if not any(len(steps) > 1 for _, steps, _ in curves):
        # Single points are in the table of results.
        return None
    beside = {system.name: (system, known) for system, _, _ in curves if (known := _published(metric, system))}
    name, direction = METRIC_PANELS[metric]
    share = metric == "label_agreement"
    write = percent if share else number
    values = [bound for _, _, points in curves for point in points for bound in (point.low, point.high)]
    values += [value for _, known in beside.values() for _, value in known]

    def paint(axes: Axes) -> None:
        for system, steps, points in curves:
            _line_with_band(axes, system, steps, points)
        for system, known in beside.values():
            style = {**curve_style(system), "dashes": (1, 2), "markerfacecolor": "none", "linewidth": 1.2}
            del style["markeredgecolor"], style["markeredgewidth"]
            axes.plot(*zip(*known, strict=True), **style)
        if not share and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
            axes.set_yscale("log")
            plain_log(axes.yaxis, values)
        else:
            axes.yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{100 * value:.4g}%" if share else f"{value:,.6g}")
            )
        label_steps(axes, f"{name}{suffix or f', {direction}'}")

    ends = [f"{system.name} ends at {write(points[-1].mean)}" for system, _, points in curves]
    ends += [f"{name} as published ends at {write(known[-1][1])}" for name, (_, known) in beside.items()]
    return draw(paint, f"{name} against training step{suffix}, {direction}. {listed(ends)}.")


def _published(metric: str, system: System) -> Points:
    extractors = {evaluation.protocol["extractor"]["name"] for run in system.runs for evaluation in run.evaluations}
    return published(metric, system.name, next(iter(extractors)) if len(extractors) == 1 else None)


def _line_with_band(axes: Axes, system: System, steps: Sequence[int], points: Sequence[Spread]) -> None:
    style = curve_style(system)
    axes.plot(steps, [point.mean for point in points], **style)
    if any(point.count > 1 for point in points):
        low, high = [point.low for point in points], [point.high for point in points]
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _loss_panel(systems: Sequence[System], suffix: str) -> Panel | None:
    curves = []
    for system in systems:
        by_step: dict[int, list[float]] = {}
        for run in system.runs:
            smooth = moving_average([logged.loss for logged in run.log.steps])
            for logged, loss in zip(run.log.steps, smooth, strict=True):
                by_step.setdefault(logged.step, []).append(loss)
        steps = sorted(by_step)
        points = [value for step in steps if (value := spread(by_step[step]))]
        if points:
            curves.append((system, steps, points))
    if not curves:
        return None
    space = SYMBOL[systems[0].loss_space]
    values = [point.mean for _, _, points in curves for point in points]

    def paint(axes: Axes) -> None:
        for system, steps, points in curves:
            _line_with_band(axes, system, steps, points)
            axes.lines[-1].set_marker("")
        if min(values) > 0 and max(values) / min(values) > LOG_RATIO:
            axes.set_yscale("log")
            plain_log(axes.yaxis, values)
        label_steps(axes, f"Training loss{suffix or f' in {space}-space'}")

    ends = [f"{system.name} ends at {number(points[-1].mean)}" for system, _, points in curves]
    return draw(paint, f"Training loss in {space}-space against step{suffix}. {listed(ends)}.")


def label_steps(axes: Axes, title: str) -> None:
    """Give an axes its title, and training steps along its foot."""
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.margins(x=0.03)


def moving_average(values: Sequence[float]) -> list[float]:
    """Return the trailing mean over a twentieth of the values, shorter at the start."""
    window = max(1, len(values) // 20)
    return [sum(values[max(0, end - window) : end]) / min(window, end) for end in range(1, len(values) + 1)]


def cells_figure(found: Mapping[str, Cells]) -> Figure | None:
    """Draw the final distance in every cell of prediction x loss space, a panel per setting; None without any."""
    if not found:
        return None
    caption = (
        "Final Fréchet distance of every prediction, by the space in which its loss is measured. Points are means over "
        "seeds, bars run from the smallest to the largest. A loss in x- or ε-space is the same squared error with "
        "other weights over time: those of the velocity's, times the square of 1 less t or of t."
    )
    panels = tuple(_cells_panel(told, cells) for told, cells in found.items())
    return Figure("Prediction and loss space", panels, caption, prediction_legend())


def _cells_panel(told: str, cells: Cells) -> Panel:
    spaces = [space for space in PREDICTION if any(space == there for _, there in cells)]

    def paint(axes: Axes) -> None:
        for place, prediction in enumerate(PREDICTION):
            found = [(at, cells[prediction, space]) for at, space in enumerate(spaces) if (prediction, space) in cells]
            bars = [[cell.mean - cell.low for _, cell in found], [cell.high - cell.mean for _, cell in found]]
            axes.errorbar(
                [at + 0.12 * (place - 1) for at, _ in found], [cell.mean for _, cell in found], yerr=bars, capsize=2,
                color=PREDICTION[prediction].light, marker=palette.MARKER[prediction], markersize=5, linewidth=1.2,
            )  # fmt: skip
        axes.set_yscale("log")
        plain_log(axes.yaxis, [bound for cell in cells.values() for bound in (cell.low, cell.high)])
        axes.set_xticks(range(len(spaces)), [f"{SYMBOL[space]}-space" for space in spaces])
        axes.set_xlim(-0.4, len(spaces) - 0.6)
        axes.grid(visible=False, axis="x")
        axes.set_title(f"Fréchet distance, {told}")
        axes.set_xlabel("space of the loss")

    values = [
        f"{SHORT_WORDS[prediction]} with a loss in {SYMBOL[space]}-space {number(cell.mean)}"
        for (prediction, space), cell in cells.items()
    ]
    return draw(paint, f"Fréchet distance by prediction and loss space, {told}: {listed(values)}.")
