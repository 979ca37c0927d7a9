"""The figures of a sweep: the grid as a map of numbers or as curves, and the guidance scale around the choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from jlt.report.figures import LOG_RATIO, Figure, LegendEntry, Panel, draw, plain_log
from jlt.report.palette import DEEP, INK, MUTED, PAPER, SCALE
from jlt.report.sweep_wording import Point, ema_text, measured_text, metric_name, same, setting_text
from jlt.report.wording import number, percent, sentence

COLUMN_INCHES = 0.62
ROW_INCHES = 0.46


def sweep_figures(result: Mapping[str, Any]) -> list[Figure]:
    """Draw the grid of the first stage, and what every stage found around the choice."""
    return [figure for figure in (_grid_figure(result), _around_figure(result)) if figure]


def _interval_text(interval: Sequence[float]) -> str:
    low, high = interval
    return "guidance at all times" if (low, high) == (0, 1) else f"guidance for t from {low:g} to {high:g}"


def _at(points: Sequence[Point], scale: float, interval: Sequence[float], ema: str) -> Point | None:
    for point in points:
        anywhere = scale == 1 or list(point["cfg_interval"]) == list(interval)
        if point["cfg_scale"] == scale and point["ema"] == ema and anywhere:
            return point
    return None


# ---- the grid ----


def _grid_figure(result: Mapping[str, Any]) -> Figure | None:
    stage, axes = result["stages"][0], result["axes"]
    points = stage["points"]
    if len(points) < 2:
        return None
    scales, emas = sorted(axes["cfg_scale"]), axes["ema"]
    mapped = len(scales) > 1 and len(emas) > 1
    panel = _map_panel if mapped else _curve_panel
    panels = tuple(panel(result, points, scales, interval) for interval in axes["cfg_interval"])
    name, seed = sentence(metric_name(result)), result["search"]["seed"]
    direction = "lower is better" if result["lower_is_better"] else "higher is better"
    text = (
        f"{name} of {stage['num']:,} images for each setting, {direction}: enough to find the region, not to report. "
        f"All settings start from the same noise (seed {seed}), so that their differences are known better than each "
        "number. "
    )
    if mapped:
        text += "The stronger the colour, the better. "
    elif any(point["error"] for point in points):
        text += "Bars are standard errors. "
    chosen = result["choice"]
    if any(same(point, chosen) for point in points):
        text += f"The {'frame' if mapped else 'ring'} marks the choice."
    else:
        text += f"The choice, guidance {chosen['cfg_scale']:g}, was found later between two of these."
        text += " The ring marks where." if mapped else ""
    return Figure("The whole grid", panels, text)


def _map_panel(
    result: Mapping[str, Any], points: Sequence[Point], scales: Sequence[float], interval: Sequence[float]
) -> Panel:
    emas, chosen = result["axes"]["ema"], result["choice"]
    shade = _shades(result, points)

    def paint(axes: Axes) -> None:
        for row, ema in enumerate(emas):
            for column, scale in enumerate(scales):
                point = _at(points, scale, interval, ema)
                if point is None:
                    continue
                level = shade(point["value"])
                cell = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=SCALE[level].light)
                cell.set(edgecolor=PAPER.light, linewidth=2)
                axes.add_patch(cell)
                ink = PAPER.light if level < DEEP else INK.light
                axes.text(column, row, _cell(result, point), ha="center", va="center", fontsize=9.5, color=ink)
        _mark(axes, scales, emas, chosen, interval)
        axes.set_xlim(-0.5, len(scales) - 0.5)
        axes.set_ylim(len(emas) - 0.5, -0.5)
        axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
        axes.set_yticks(range(len(emas)), [_ema_label(ema) for ema in emas])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlabel("guidance scale")
        axes.set_title(sentence(_interval_text(interval)))

    width = 1.35 + COLUMN_INCHES * max(len(scales), 5)
    alt = f"Map of {metric_name(result)} over guidance scale and average, {_interval_text(interval)}."
    return draw(paint, f"{alt} {_best_of(result, points)}", (width, 0.95 + ROW_INCHES * max(len(emas), 2)))


def _ema_label(ema: str) -> str:
    return "raw weights" if ema == "none" else f"EMA {ema}" if ema[0].isdigit() else ema


def _mark(axes: Axes, scales: Sequence[float], emas: Sequence[str], chosen: Point, interval: Sequence[float]) -> None:
    """Frame the chosen cell; a choice between two columns gets a ring on their border."""
    scale = chosen["cfg_scale"]
    if chosen["ema"] not in emas or (scale != 1 and list(chosen["cfg_interval"]) != list(interval)):
        return
    row = emas.index(chosen["ema"])
    if scale in scales:
        column = scales.index(scale)
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK.light, linewidth=2.6)
        frame.set(zorder=5, clip_on=False)
        axes.add_patch(frame)
        return
    below = max(place for place, other in enumerate(scales) if other < scale)
    style: Any = {
        "markersize": 10,
        "markerfacecolor": PAPER.light,
        "markeredgecolor": INK.light,
        "markeredgewidth": 2.4,
    }
    axes.plot([below + 0.5], [row], marker="o", zorder=5, **style)


def _shades(result: Mapping[str, Any], points: Sequence[Point]) -> Any:
    """Return a function from a value to its place in the scale of colours, 0 the best."""
    values = [point["value"] for point in points]
    logarithmic = min(values) > 0 and max(values) / min(values) > LOG_RATIO
    scaled = [math.log(value) if logarithmic else value for value in values]
    low, high = min(scaled), max(scaled)

    def shade(value: float) -> int:
        part = ((math.log(value) if logarithmic else value) - low) / (high - low or 1)
        part = part if result["lower_is_better"] else 1 - part
        return min(len(SCALE) - 1, int(part * len(SCALE)))

    return shade


def _cell(result: Mapping[str, Any], point: Point) -> str:
    return percent(point["value"]) if measured_text(result, point).endswith("%") else number(point["value"], 3)


def _best_of(result: Mapping[str, Any], points: Sequence[Point]) -> str:
    # Stages are sorted, the best first.
    return f"The best is {measured_text(result, points[0])}, at {setting_text(points[0])}."


def _curve_panel(
    result: Mapping[str, Any], points: Sequence[Point], scales: Sequence[float], interval: Sequence[float]
) -> Panel:
    emas, chosen = result["axes"]["ema"], result["choice"]
    by_scale = len(scales) > 1
    ticks = [f"{scale:g}" for scale in scales] if by_scale else [_ema_label(ema) for ema in emas]
    pairs = [(scale, emas[0]) for scale in scales] if by_scale else [(scales[0], ema) for ema in emas]
    found = [_at(points, scale, interval, ema) for scale, ema in pairs]
    shown = [(place, point) for place, point in enumerate(found) if point]
    positions = list(scales) if by_scale else list(range(len(emas)))

    def paint(axes: Axes) -> None:
        where = [positions[place] for place, _ in shown]
        _errorbar(axes, where, [point for _, point in shown], INK.light, "o", joined=by_scale)
        for place, point in shown:
            if same(point, chosen):
                _ring(axes, positions[place], point["value"])
        _scale_values(axes, [point["value"] for point in points])
        if axes.get_yscale() != "log":
            # The same for all intervals, so that panels can be compared.
            ends = [point["value"] + sign * (point["error"] or 0) for point in points for sign in (-1, 1)]
            margin = 0.06 * (max(ends) - min(ends)) or 0.5
            axes.set_ylim(min(ends) - margin, max(ends) + margin)
        axes.set_xticks(positions, ticks)
        axes.margins(x=0.08)
        axes.set_xlabel("guidance scale" if by_scale else "average of the weights")
        axes.set_title(sentence(_interval_text(interval)) if by_scale else f"Guidance {scales[0]:g}")

    alt = f"{sentence(metric_name(result))} against {'guidance scale' if by_scale else 'average'}."
    return draw(paint, f"{alt} {_best_of(result, points)}")


# ---- around the choice ----


def _around_figure(result: Mapping[str, Any]) -> Figure | None:
    """Draw what the first and the last stage found with the chosen average and interval, and what was confirmed."""
    chosen = result["choice"]

    def on_line(points: Sequence[Point]) -> list[Point]:
        found = {
            point["cfg_scale"]: point
            for point in points
            if _at([point], point["cfg_scale"], chosen["cfg_interval"], chosen["ema"])
        }
        return [found[scale] for scale in sorted(found)]

    stages = result["stages"]
    first, confirmed = on_line(stages[0]["points"]), on_line(result["confirmed"])
    last = on_line([point for stage in stages for point in stage["points"] if point["num"] == stages[-1]["num"]])
    if len(stages) < 2 or len({point["cfg_scale"] for point in (*first, *last)}) < 2:
        return None
    curves = [(last, SCALE[2].light, "s")]
    if stages[0]["num"] != stages[-1]["num"]:
        curves.insert(0, (first, MUTED.light, "o"))

    def paint(axes: Axes) -> None:
        for points, colour, marker in curves:
            _errorbar(axes, [point["cfg_scale"] for point in points], points, colour, marker, joined=True)
        where = [point["cfg_scale"] for point in confirmed]
        axes.plot(where, [point["value"] for point in confirmed], "*", color=INK.light, markersize=12, zorder=5)
        _scale_values(axes, [point["value"] for point in (*first, *last, *confirmed)])
        axes.margins(x=0.06)
        axes.set_xlabel("guidance scale")
        axes.set_title(sentence(metric_name(result)))

    search, confirmation = result["search"], result["confirmation"]
    marks = {"o": ("var(--muted)", DOT), "s": ("var(--s2)", SQUARE)}
    legend = [
        LegendEntry(_swatch(*marks[marker], line=True), f"{points[0]['num']:,} images of seed {search['seed']}")
        for points, _, marker in curves
    ]
    text = f"confirmed, {confirmation['num']:,} images of seed {confirmation['seed']}"
    legend.append(LegendEntry(_swatch("var(--ink)", STAR, line=False), text))
    interval = "" if tuple(chosen["cfg_interval"]) == (0, 1) else f" and {_interval_text(chosen['cfg_interval'])}"
    caption = (
        f"With {ema_text(chosen['ema'])}{interval}; bars are standard errors. Numbers of unlike counts of images are "
        "not to be compared, so each curve is to be looked at by itself. Stars are what counts: they are of other "
        "images than those the choice was made on."
    )
    alt = f"{sentence(metric_name(result))} against guidance scale at the chosen average, a curve per number of images."
    return Figure("Around the choice", (draw(paint, alt, (5.0, 3.2)),), caption, tuple(legend))


DOT = '<circle cx="17" cy="6" r="3.4"/>'
SQUARE = '<rect x="13.8" y="2.8" width="6.4" height="6.4"/>'
STAR = '<path d="M17 0 L18.6 4.2 L23 4.4 L19.6 7.1 L20.8 11.4 L17 9 L13.2 11.4 L14.4 7.1 L11 4.4 L15.4 4.2 Z"/>'


def _swatch(colour: str, mark: str, line: bool) -> str:
    stroke = '<line x1="1" x2="33" y1="6" y2="6" stroke="currentColor" stroke-width="2"/>' if line else ""
    return (
        f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true" style="color:{colour}">'
        f'{stroke}<g fill="currentColor">{mark}</g></svg>'
    )


def _errorbar(
    axes: Axes,
    where: Sequence[float],
    points: Sequence[Point],
    colour: str,
    marker: str,
    joined: bool,
    size: float = 5,
) -> None:
    values, errors = [point["value"] for point in points], [point["error"] or 0 for point in points]
    style: Any = {"color": colour, "marker": marker, "markersize": size, "markeredgecolor": PAPER.light}
    style |= {"markeredgewidth": 0.6, "linestyle": "-" if joined else "", "elinewidth": 1.1, "capsize": 2.5}
    axes.errorbar(where, values, yerr=errors if any(errors) else None, **style)


def _ring(axes: Axes, where: float, value: float) -> None:
    axes.plot([where], [value], "o", markersize=13, fillstyle="none", color=INK.light, markeredgewidth=1.8)


def _scale_values(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        axes.set_yscale("log")
        plain_log(axes.yaxis, values)
