"""The figures of training itself, from the log: the loss along the path, gradients and averages, speed and memory.

Imports matplotlib, so import this module only where figures are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from jlt.report import palette
from jlt.report.figures import (
    HALF,
    LOG_RATIO,
    THIRD,
    Figure,
    LegendEntry,
    Panel,
    curve_style,
    draw,
    label_steps,
    moving_average,
    plain_log,
    system_legend,
    systems_that_compare,
)
from jlt.report.palette import INK, MUTED, PREDICTION, SYMBOL, TIME, swatch, time_swatch
from jlt.report.results import Run, Study, System
from jlt.report.run_log import Log, LoggedStep
from jlt.report.wording import listed, number, percent

MOMENTS = (0.05, 0.25, 1.0)
"""Shares of the training so far at which the loss is drawn against t."""

MOST_POINTS = 400
"""Points of a curve that a page shows; longer ones are averaged in equal stretches."""


@dataclass(frozen=True)
class Curve:
    """One line over the training steps."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    style: dict[str, Any] = field(default_factory=dict)


def run_figures(study: Study) -> list[Figure]:
    """Draw what the logs tell: everything of a single run, of several the loss against t alone."""
    runs = study.runs
    drawn = [path_figure(study)]
    if len(runs) == 1:
        drawn += [optimisation_figure(runs[0]), speed_figure(runs[0])]
    return [figure for figure in drawn if figure]


def path_figure(study: Study) -> Figure | None:
    """Draw the loss by time; None where no log has it."""
    if len(study.runs) == 1:
        return _path_figure_of_one(next(system for system in study.systems if system.runs), study.runs[0].log)
    panels = [_profiles_of_systems(alike, suffix) for suffix, alike in systems_that_compare(study.systems).items()]
    shown = tuple(panel for panel in panels if panel)
    if not shown:
        return None
    caption = (
        "The mean training loss of samples noised to time t, over the last twentieth of the training. "
        "Systems with one loss space and weighting share a scale, so the gap between two curves says at which noise "
        "level one target is harder than the other."
    )
    return Figure("The loss along the path", shown, caption, system_legend(study.systems))


def _path_figure_of_one(system: System, log: Log) -> Figure | None:
    steps = [logged for logged in log.steps if logged.loss_by_time]
    if not steps:
        return None
    begin = max(1, len(steps) // 20) - 1
    curves = _time_curves(steps, begin)

    def paint_level(axes: Axes) -> None:
        axes.axhline(1.0, color=MUTED.light, linewidth=1)

    first = f"step {steps[begin].step:,}"
    panels = (
        _panel(
            f"Loss by t, relative to {first}", list(curves.values()), log, write=percent, paint=paint_level, size=HALF
        ),
        _profiles_of_moments(system, steps),
    )
    caption = (
        "The first panel shows the loss of samples at each noise level, as a moving average over a twentieth of the "
        f"training, relative to what it was at {first}: where a line still falls the network still learns, and one "
        f"that rises is trouble. The second is the loss itself against t at {_moments_text(steps)}; paler is earlier."
    )
    legend = tuple(LegendEntry(time_swatch(place), curve.name) for place, curve in curves.items())
    return Figure("The loss along the path", tuple(panel for panel in panels if panel), caption, legend)


def _time_curves(steps: Sequence[LoggedStep], begin: int) -> dict[int, Curve]:
    """Return the loss in a few ranges of t, by place in TIME, from the entry `begin` on and relative to it."""
    bins = len(steps[-1].loss_by_time)
    width = -(-bins // len(TIME))
    smooth = [_smoothed([logged.loss_by_time[index] for logged in steps]) for index in range(bins)]
    curves = {}
    for place, start in enumerate(range(0, bins, width)):
        # Each bin is relative to itself, so that one that is empty now and then does not move the mean of its range.
        shares = [_relative(values, begin) for values in smooth[start : start + width]]
        means = [_mean(values) for values in zip(*shares, strict=True)]
        found = [(logged.step, mean) for logged, mean in zip(steps, means, strict=True) if mean is not None]
        where, values = thinned([step for step, _ in found[begin:]], [mean for _, mean in found[begin:]])
        name = f"t from {start / bins:.2g} to {min(start + width, bins) / bins:.2g}"
        if values:
            curves[place] = Curve(name, where, values, {"color": TIME[place].light})
    return curves


def _smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Return the trailing mean over a twentieth of the values, None where it holds none."""
    window = max(1, len(values) // 20)
    return [_mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _relative(values: Sequence[float | None], begin: int) -> list[float | None]:
    base = next((value for value in values[begin:] if value), None)
    return [value / base if value is not None and base else None for value in values]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _moments(steps: Sequence[LoggedStep]) -> list[Sequence[LoggedStep]]:
    """Return a twentieth of the logged steps up to each moment."""
    width = max(1, len(steps) // 20)
    ends = dict.fromkeys(max(width, int(share * len(steps))) for share in MOMENTS)
    return [steps[end - width : end] for end in ends]


def _moments_text(steps: Sequence[LoggedStep]) -> str:
    return f"step {listed([f'{moment[-1].step:,}' for moment in _moments(steps)])}"


def _profile(steps: Sequence[LoggedStep]) -> tuple[list[float], list[float]]:
    """Return the middles of the bins of t that were drawn, and their mean losses."""
    bins = len(steps[-1].loss_by_time)
    means = [_mean(logged.loss_by_time[index] for logged in steps) for index in range(bins)]
    found = [((index + 0.5) / bins, mean) for index, mean in enumerate(means) if mean is not None]
    return [middle for middle, _ in found], [mean for _, mean in found]


def _profiles_of_moments(system: System, steps: Sequence[LoggedStep]) -> Panel:
    profiles = [_profile(moment) for moment in _moments(steps)]
    style = curve_style(system)
    values = [value for _, losses in profiles for value in losses]

    def paint(axes: Axes) -> None:
        for place, (times, losses) in enumerate(profiles, 1):
            axes.plot(times, losses, **style, alpha=place / len(profiles))
        _label_times(axes, f"Loss against t, {SYMBOL[system.loss_space]}-space", values)

    return draw(paint, f"Loss against time t at {_moments_text(steps)}. {_ends_of(*profiles[-1])}")


def _profiles_of_systems(systems: Sequence[System], suffix: str) -> Panel | None:
    profiles = [(system, profile) for system in systems if (profile := _final_profile(system.runs))]
    if not profiles:
        return None
    values = [value for _, (_, losses) in profiles for value in losses]
    space = SYMBOL[systems[0].loss_space]

    def paint(axes: Axes) -> None:
        for system, (times, losses) in profiles:
            axes.plot(times, losses, **curve_style(system))
        _label_times(axes, f"Loss against t{suffix or f', {space}-space'}", values)

    said = " ".join(f"{system.name}: {_ends_of(*profile)}" for system, profile in profiles)
    return draw(paint, f"{space}-space loss against time t at the end of the training{suffix}. {said}")


def _final_profile(runs: Iterable[Run]) -> tuple[list[float], list[float]] | None:
    """Return loss against t over the last twentieth of each run, all seeds together."""
    logged = [[step for step in run.log.steps if step.loss_by_time] for run in runs]
    last = [step for steps in logged for step in steps[-max(1, len(steps) // 20) :]]
    return _profile(last) if last else None


def _ends_of(times: Sequence[float], losses: Sequence[float]) -> str:
    if not losses:
        return "No sample was drawn."
    return f"It is {number(losses[0])} at t {times[0]:.2g} and {number(losses[-1])} at t {times[-1]:.2g}."


def _label_times(axes: Axes, title: str, values: Sequence[float]) -> None:
    axes.set_title(title)
    axes.set_xlabel("t, from noise to data")
    axes.set_xlim(0, 1)
    _scale(axes, values)


def optimisation_figure(run: Run) -> Figure | None:
    """Draw gradient norm, learning rate and the distance of the averages; None where the log has none of them."""
    log = run.log
    colour = PREDICTION[run.config["prediction"]].light
    panels = [
        _gradient_panel(run, colour),
        _panel("Learning rate", _curves(log, {"learning rate": "learning_rate"}, colour), log, zero=True),
        _panel("Weights to their average, relative", _average_curves(log), log, write=percent),
    ]
    shown = tuple(panel for panel in panels if panel)
    if not shown:
        return None
    skipped = log.skipped
    crosses = f" Crosses mark {_updates(len(skipped))} that were skipped, for a loss or gradient that was not finite."
    caption = (
        "The gradient norm is that before clipping, pale, with its moving average. The relative distance between the "
        "weights and an average is how far the average lags: a shorter average lies closer."
        f"{crosses if skipped else ''}{_about_restarts(log)}"
    )
    return Figure("Gradients and averages", shown, caption, _average_legend(log))


def _gradient_panel(run: Run, colour: str) -> Panel | None:
    log, clip = run.log, run.config.get("optimizer", {}).get("grad_clip")
    curves = _curves(log, {"gradient norm": "grad_norm"}, colour, smooth=True)
    if not curves:
        return None
    values = curves[0].values
    shows_clip = clip and max(values) > 0.4 * clip

    def paint(axes: Axes) -> None:
        if shows_clip:
            axes.axhline(clip, color=MUTED.light, linewidth=1)
            axes.annotate("clipped to", (0.99, clip), xycoords=("axes fraction", "data"), xytext=(0, 3),
                          textcoords="offset points", ha="right", fontsize=8.5, color=MUTED.light)  # fmt: skip
        top = axes.get_xaxis_transform()
        axes.plot(log.skipped, [0.95] * len(log.skipped), "x", color=INK.light, markersize=6, transform=top)

    return _panel("Gradient norm", curves, log, paint=paint)


def _average_curves(log: Log) -> list[Curve]:
    curves = []
    names = _averages(log)
    for name, style in names.items():
        found = [(logged.step, logged.ema_distance[name]) for logged in log.steps if name in logged.ema_distance]
        steps, values = thinned([step for step, _ in found], [value for _, value in found])
        curves.append(Curve(name, steps, values, style))
    return curves


def _averages(log: Log) -> dict[str, dict[str, Any]]:
    """Return the names of the averages with the style of their lines."""
    names = list(dict.fromkeys(name for logged in log.steps for name in logged.ema_distance))
    return {
        name: {"color": INK.light, "dashes": palette.dashes(2**place) or (None, None)}
        for place, name in enumerate(names)
    }


def _average_legend(log: Log) -> tuple[LegendEntry, ...]:
    return tuple(
        LegendEntry(swatch(None, 2**place), f"EMA {name}".replace("EMA sigma_rel=", "power EMA "))
        for place, name in enumerate(_averages(log))
    )


def speed_figure(run: Run) -> Figure | None:
    """Draw images per second, utilisation and memory; None where the log has none of them."""
    log, colour = run.log, PREDICTION[run.config["prediction"]].light
    shares = [
        *_curves(log, {"MFU": "mfu"}, colour),
        *_curves(log, {"waiting for data": "waiting"}, MUTED.light),
    ]
    panels = [
        _panel("Images per second", _curves(log, {"images per second": "img_per_second"}, colour), log, zero=True),
        _panel("MFU, and time spent waiting", shares, log, zero=True, write=percent),
        _panel("Memory, GiB", _curves(log, {"memory": "memory_gib"}, colour), log, zero=True),
    ]
    shown = tuple(panel for panel in panels if panel)
    if not shown:
        return None
    caption = (
        "MFU is the arithmetic of the network over what the device does in a matrix product; grey is the share of the "
        f"time spent waiting for data.{_about_restarts(log)}"
    )
    return Figure("Speed and memory", shown, caption)


def _curves(log: Log, fields: dict[str, str], colour: str, smooth: bool = False) -> list[Curve]:
    curves = []
    for name, key in fields.items():
        found = [(logged.step, value) for logged in log.steps if (value := getattr(logged, key)) is not None]
        if not found:
            continue
        steps, values = [step for step, _ in found], [value for _, value in found]
        if smooth:
            curves.append(Curve("", steps, values, {"color": colour, "linewidth": 0.8, "alpha": 0.35}))
            values = moving_average(values)
        curves.append(Curve(name, *thinned(steps, values), {"color": colour}))
    return curves


def _panel(
    title: str,
    curves: Sequence[Curve],
    log: Log,
    *,
    zero: bool = False,
    write: Callable[[float], str] = number,
    paint: Callable[[Axes], None] | None = None,
    size: tuple[float, float] = THIRD,
) -> Panel | None:
    """Draw curves over the training steps, the starts of later sessions as thin lines; None of none."""
    if not curves:
        return None
    values = [value for curve in curves for value in curve.values]

    def paint_all(axes: Axes) -> None:
        for restart in log.restarts:
            axes.axvline(restart, color=MUTED.light, linewidth=0.8, dashes=(1.2, 2.4))
        for curve in curves:
            axes.plot(curve.steps, curve.values, **curve.style)
        axes.set_ylim(0, 1.12 * max(values) or 1) if zero else _scale(axes, values)
        if write is percent or zero:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, write)))
        label_steps(axes, title)
        if paint:
            paint(axes)

    ends = [f"{curve.name} is {write(curve.values[-1])} at step {curve.steps[-1]:,}" for curve in curves if curve.name]
    return draw(paint_all, f"{title} against training step. {listed(ends)}.", size)


def _tick(value: float, write: Callable[[float], str]) -> str:
    """Write an axis value without the zeros that do not matter."""
    if write is percent:
        return f"{100 * value:.3g}%"
    return f"{value:,.9f}".rstrip("0").rstrip(".")


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        axes.set_yscale("log")
        plain_log(axes.yaxis, values)


def _updates(count: int) -> str:
    return "one update" if count == 1 else f"{count:,} updates"


def _about_restarts(log: Log) -> str:
    return " Dotted lines mark where training was continued from a checkpoint." if log.restarts else ""


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return a curve of at most MOST_POINTS points: the last step and the mean value of each stretch."""
    width = -(-len(steps) // MOST_POINTS)
    if width <= 1:
        return list(steps), list(values)
    starts = range(0, len(steps), width)
    means = [sum(values[start : start + width]) / len(values[start : start + width]) for start in starts]
    return [steps[min(start + width, len(steps)) - 1] for start in starts], means
