"""The figures of a sweep: the grid as a map of numbers or as curves, and the guidance scale around the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle

from jlt.report.figures import HALF, Figure, LegendEntry, Panel, draw, log_if_wide, spans_much
from jlt.report.palette import DEEP, INK, MUTED, PAPER, SCALE, line_swatch
from jlt.report.wording import ema_text, interval_text, measured_text, metric_name, metric_text, sentence, setting_text
from jlt.results.sweep import WHOLE_INTERVAL, Setting, Sweep, SweepPoint

Interval = tuple[float, float]


def sweep_figures(result: Sweep) -> list[Figure]:
    """Draw the grid of the first stage, and what every stage found around the choice."""
    return [figure for figure in (_grid_figure(result), _around_figure(result)) if figure]


# ---- the grid ----


def _grid_figure(result: Sweep) -> Figure | None:
    stage, chosen = result.stages[0], result.choice
    if len(stage.points) < 2:
        return None
    scales = sorted(result.axes.cfg_scale)
    mapped = len(scales) > 1 and len(result.axes.ema) > 1
    panel = _map_panel if mapped else _curve_panel
    panels = tuple(panel(result, stage.points, scales, interval) for interval in result.axes.cfg_interval)
    direction = "lower is better" if result.lower_is_better else "higher is better"
    caption = (
        f"{sentence(metric_name(result.metric))} of {stage.num:,} images for each setting, {direction}: enough to find "
        f"the region, not to report. All settings start from the same noise (seed {result.search.seed}), so "
        "differences are known better than single numbers. "
    )
    if mapped:
        caption += "The stronger the colour, the better. "
    elif any(point.error for point in stage.points):
        caption += "Bars are standard errors. "
    if any(point.setting == chosen.setting for point in stage.points):
        caption += f"The {'frame' if mapped else 'ring'} marks the choice."
    else:
        caption += f"The choice, guidance {chosen.cfg_scale:g}, was found later between two of these."
        caption += " The ring marks where." if mapped else ""
    return Figure("The whole grid", panels, caption)


def _map_panel(result: Sweep, points: Sequence[SweepPoint], scales: Sequence[float], interval: Interval) -> Panel:
    emas = result.axes.ema
    values = [point.value for point in points]
    norm = (LogNorm if spans_much(values) else Normalize)(min(values), max(values))

    def paint(axes: Axes) -> None:
        for point in points:
            if point.on_line(interval, point.ema):
                column, row = scales.index(point.cfg_scale), emas.index(point.ema)
                share = float(norm(point.value)) if result.lower_is_better else 1 - float(norm(point.value))
                level = min(len(SCALE) - 1, int(share * len(SCALE)))
                _cell(axes, column, row, facecolor=SCALE[level].light, edgecolor=PAPER.light, linewidth=2)
                ink = PAPER.light if level < DEEP else INK.light
                text = metric_text(result.metric, point.value)
                axes.text(column, row, text, ha="center", va="center", fontsize=9.5, color=ink)
        _mark(axes, scales, emas, result.choice.setting, interval)
        axes.set(xlim=(-0.5, len(scales) - 0.5), ylim=(len(emas) - 0.5, -0.5))
        axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
        axes.set_yticks(range(len(emas)), list(map(_ema_label, emas)))
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set(xlabel="guidance scale", title=sentence(interval_text(interval)))

    width = 1.35 + 0.62 * max(len(scales), 5)
    alt = f"Map of {metric_name(result.metric)} over guidance scale and average, {interval_text(interval)}."
    return draw(paint, f"{alt} {_best_of(result, points)}", (width, 0.95 + 0.46 * max(len(emas), 2)))


def _ema_label(ema: str) -> str:
    return "raw weights" if ema == "none" else f"EMA {ema}" if ema[0].isdigit() else ema


def _cell(axes: Axes, column: int, row: int, **style: Any) -> None:
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **style))


def _mark(axes: Axes, scales: Sequence[float], emas: Sequence[str], chosen: Setting, interval: Interval) -> None:
    """Frame the chosen cell; a choice between two columns gets a ring on their border."""
    if chosen.ema not in emas or not chosen.on_line(interval, chosen.ema):
        return
    row = emas.index(chosen.ema)
    if chosen.cfg_scale in scales:
        column = scales.index(chosen.cfg_scale)
        _cell(axes, column, row, fill=False, edgecolor=INK.light, linewidth=2.6, zorder=5, clip_on=False)
        return
    below = max(place for place, other in enumerate(scales) if other < chosen.cfg_scale)
    axes.plot(
        [below + 0.5], [row], marker="o", zorder=5, markersize=10, markerfacecolor=PAPER.light,
        markeredgecolor=INK.light, markeredgewidth=2.4,
    )  # fmt: skip


def _best_of(result: Sweep, points: Sequence[SweepPoint]) -> str:
    # Points are sorted, the best first.
    return f"The best is {measured_text(result, points[0])}, at {setting_text(points[0])}."


def _curve_panel(result: Sweep, points: Sequence[SweepPoint], scales: Sequence[float], interval: Interval) -> Panel:
    emas, by_scale = result.axes.ema, len(scales) > 1
    ticks = [f"{scale:g}" for scale in scales] if by_scale else list(map(_ema_label, emas))
    positions = list(scales) if by_scale else list(range(len(emas)))
    places = {
        (point.cfg_scale if by_scale else emas.index(point.ema)): point
        for point in points
        if point.on_line(interval, point.ema)
    }

    def paint(axes: Axes) -> None:
        _errorbar(axes, sorted(places), [places[place] for place in sorted(places)], INK.light, "o", joined=by_scale)
        for place, point in places.items():
            if point.setting == result.choice.setting:
                axes.plot(
                    [place], [point.value], "o", markersize=13, fillstyle="none", color=INK.light, markeredgewidth=1.8
                )
        if not log_if_wide(axes, [point.value for point in points]):
            # The same for all intervals, so that panels can be compared.
            ends = [point.value + sign * (point.error or 0) for point in points for sign in (-1, 1)]
            margin = 0.06 * (max(ends) - min(ends)) or 0.5
            axes.set_ylim(min(ends) - margin, max(ends) + margin)
        axes.set_xticks(positions, ticks)
        axes.margins(x=0.08)
        title = sentence(interval_text(interval)) if by_scale else f"Guidance {scales[0]:g}"
        axes.set(title=title, xlabel="guidance scale" if by_scale else "average of the weights")

    alt = f"{sentence(metric_name(result.metric))} against {'guidance scale' if by_scale else 'average'}."
    return draw(paint, f"{alt} {_best_of(result, points)}", HALF)


# ---- around the choice ----


def _around_figure(result: Sweep) -> Figure | None:
    """Draw what the first and the last stage found with the chosen average and interval, and what was confirmed."""
    chosen, stages = result.choice, result.stages

    def on_line(points: Sequence[SweepPoint]) -> list[SweepPoint]:
        found = {point.cfg_scale: point for point in points if point.on_line(chosen.cfg_interval, chosen.ema)}
        return [found[scale] for scale in sorted(found)]

    first, confirmed = on_line(stages[0].points), on_line(result.confirmed)
    last = on_line([point for stage in stages for point in stage.points if point.num == stages[-1].num])
    if len(stages) < 2 or len({point.cfg_scale for point in (*first, *last)}) < 2:
        return None
    curves = [(last, SCALE[2].light, "s", line_swatch("s2", "v"))]
    if stages[0].num != stages[-1].num:
        curves.insert(0, (first, MUTED.light, "o", line_swatch("muted", "x")))
    name = sentence(metric_name(result.metric))

    def paint(axes: Axes) -> None:
        for points, colour, marker, _ in curves:
            _errorbar(axes, [point.cfg_scale for point in points], points, colour, marker, joined=True)
        where = [point.cfg_scale for point in confirmed]
        axes.plot(where, [point.value for point in confirmed], "*", color=INK.light, markersize=12, zorder=5)
        log_if_wide(axes, [point.value for point in (*first, *last, *confirmed)])
        axes.margins(x=0.06)
        axes.set(xlabel="guidance scale", title=name)

    legend = [
        LegendEntry(swatch, f"{points[0].num:,} images of seed {result.search.seed}") for points, _, _, swatch in curves
    ]
    text = f"confirmed, {result.confirmation.num:,} images of seed {result.confirmation.seed}"
    legend.append(LegendEntry(line_swatch("ink", "star", None), text))
    interval = "" if chosen.cfg_interval == WHOLE_INTERVAL else f" and {interval_text(chosen.cfg_interval)}"
    caption = (
        f"With {ema_text(chosen.ema)}{interval}; bars are standard errors. Compare only numbers of equally many "
        "images: look at each curve by itself. Stars are the reported numbers, from images that took no part in the "
        "choice."
    )
    alt = f"{name} against guidance scale at the chosen average, a curve per number of images."
    return Figure("Around the choice", (draw(paint, alt, (5.0, 3.2)),), caption, tuple(legend))


def _errorbar(
    axes: Axes, where: Sequence[float], points: Sequence[SweepPoint], colour: str, marker: str, joined: bool
) -> None:
    errors = [point.error or 0 for point in points]
    axes.errorbar(
        where, [point.value for point in points], yerr=errors if any(errors) else None, color=colour, marker=marker,
        markersize=5, markeredgecolor=PAPER.light, markeredgewidth=0.6, linestyle="-" if joined else "",
        elinewidth=1.1, capsize=2.5,
    )  # fmt: skip
