"""The figures of training itself, from the log: the loss along the path, gradients and averages, speed and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from jlt.report import figures, palette
from jlt.report.figures import Figure, LegendEntry, Line, Panel
from jlt.report.palette import INK, MUTED, PREDICTION, SYMBOL, TIME, line_swatch, swatch
from jlt.report.study import Study, System
from jlt.report.training_figures import systems_that_compare
from jlt.report.wording import listed, number, percent
from jlt.results.run import Log, LoggedStep, Run

MOMENTS = (0.05, 0.25, 1.0)
"""Shares of the training so far at which the loss is drawn against t."""

MOST_POINTS = 400
"""Points of a curve on a page; longer curves are averaged over equal stretches."""


def run_figures(study: Study) -> list[Figure]:
    """Draw the logs: everything of a single run, of several runs the loss against t alone."""
    if len(study.runs) != 1:
        drawn = [_path_figure(study)]
    else:
        run, system = study.runs[0], next(system for system in study.systems if system.runs)
        drawn = [_path_figure_of_one(system, run.log), _optimisation_figure(run), _speed_figure(run)]
    return [figure for figure in drawn if figure]


def _path_figure(study: Study) -> Figure | None:
    """Draw the loss against t at the end of the training, a panel per loss space and variant."""
    caption = (
        "The mean training loss of samples at noise time t, over the last twentieth of the training. Systems with one "
        "loss space and weighting share a scale: the gap between two curves shows at which noise level one target is "
        "harder than the other."
    )
    panels = []
    for suffix, systems in systems_that_compare(study.systems).items():
        space = SYMBOL[systems[0].loss_space]
        ends = [(system, [step for run in system.runs for step in _last_twentieth(run.log)]) for system in systems]
        lines = [_profile(system.name, steps, figures.curve_style(system)) for system, steps in ends if steps]
        alt = f"{space}-space loss against time t at the end of the training{suffix}."
        alt = " ".join([alt, *(f"{line.name}: {_ends_of(line)}" for line in lines)])
        panels.append(_profile_panel(f"Loss against t{suffix or f', {space}-space'}", lines, alt) if lines else None)
    return figures.figure_of("The loss along the path", panels, caption, figures.system_legend(study.systems))


def _path_figure_of_one(system: System, log: Log) -> Figure | None:
    """Draw the loss of one run at several noise levels against the step, and against t at some moments."""
    steps = [logged for logged in log.steps if logged.loss_by_time]
    if not steps:
        return None
    begin = max(1, len(steps) // 20) - 1
    lines = _time_lines(steps, begin)
    first = f"step {steps[begin].step:,}"

    # A twentieth of the logged steps up to each moment.
    width = max(1, len(steps) // 20)
    ends = dict.fromkeys(max(width, int(share * len(steps))) for share in MOMENTS)
    moments = [steps[end - width : end] for end in ends]
    when = f"step {listed([f'{moment[-1].step:,}' for moment in moments])}"
    profiles = [
        _profile("", moment, {**figures.curve_style(system), "alpha": place / len(moments)})
        for place, moment in enumerate(moments, 1)
    ]
    title = f"Loss against t, {SYMBOL[system.loss_space]}-space"
    panels = (
        figures.step_panel(
            f"Loss by t, relative to {first}",
            list(lines.values()),
            write=percent,
            restarts=log.restarts,
            paint=lambda axes: axes.axhline(1.0, color=MUTED.light, linewidth=1),
        ),
        _profile_panel(title, profiles, f"Loss against time t at {when}. {_ends_of(profiles[-1])}"),
    )
    caption = (
        "The first panel shows the loss of samples at each noise level, as a moving average over a twentieth of the "
        f"training, relative to {first}. Where a line falls, the network still learns; a line that rises is a sign of "
        f"trouble. The second panel shows the loss against t at {when}; paler is earlier."
    )
    legend = (LegendEntry(line_swatch(f"t{place}"), line.name) for place, line in lines.items())
    return figures.figure_of("The loss along the path", panels, caption, legend)


def _time_lines(steps: Sequence[LoggedStep], begin: int) -> dict[int, Line]:
    """Return the loss in a few ranges of t, by place in TIME, from the entry `begin` on and relative to it."""
    bins = len(steps[-1].loss_by_time)
    width = -(-bins // len(TIME))
    smooth = [figures.moving_average([logged.loss_by_time[index] for logged in steps]) for index in range(bins)]
    lines = {}
    for place, start in enumerate(range(0, bins, width)):
        # Each bin is relative to itself: the mean of its range then does not jump where one bin is empty.
        shares = [_relative(values, begin) for values in smooth[start : start + width]]
        means = list(map(figures.mean, zip(*shares, strict=True)))
        name = f"t from {start / bins:.2g} to {min(start + width, bins) / bins:.2g}"
        if line := _line(name, steps[begin:], means[begin:], {"color": TIME[place].light}):
            lines[place] = line
    return lines


def _relative(values: Sequence[float | None], begin: int) -> list[float | None]:
    base = next((value for value in values[begin:] if value), None)
    return [value / base if value is not None and base else None for value in values]


def _last_twentieth(log: Log) -> list[LoggedStep]:
    steps = [logged for logged in log.steps if logged.loss_by_time]
    return steps[-max(1, len(steps) // 20) :]


def _profile(name: str, steps: Sequence[LoggedStep], style: Mapping[str, Any]) -> Line:
    """Return the mean loss against t, at the middles of the bins that have samples."""
    bins = len(steps[-1].loss_by_time)
    means = [figures.mean(logged.loss_by_time[index] for logged in steps) for index in range(bins)]
    found = {(index + 0.5) / bins: value for index, value in enumerate(means) if value is not None}
    return Line(name, list(found), list(found.values()), style)


def _profile_panel(title: str, lines: Sequence[Line], alt: str) -> Panel:
    def paint(axes: Axes) -> None:
        for line in lines:
            line.draw(axes)
        axes.set(title=title, xlabel="t, from noise to data", xlim=(0, 1))
        figures.log_if_wide(axes, [value for line in lines for value in line.y])

    return figures.draw(paint, alt)


def _ends_of(line: Line) -> str:
    if not line.y:
        return "No sample was drawn."
    return f"It is {number(line.y[0])} at t {line.x[0]:.2g} and {number(line.y[-1])} at t {line.x[-1]:.2g}."


def _optimisation_figure(run: Run) -> Figure | None:
    """Draw gradient norm, learning rate and the distance of the averages."""
    log, style = run.log, {"color": PREDICTION[run.config["prediction"]].light}
    names = list(dict.fromkeys(name for logged in log.steps for name in logged.ema_distance))
    averages = [
        _line(
            f"EMA {name}".replace("EMA sigma_rel=", "power EMA "),
            log.steps,
            [logged.ema_distance.get(name) for logged in log.steps],
            {"color": INK.light, "dashes": palette.dashes(2**place) or (None, None)},
        )
        for place, name in enumerate(names)
    ]
    caption = (
        "The gradient norm before clipping is pale, its moving average is not. The relative distance between the "
        "weights and an average shows how far the average lags: a shorter average is closer."
    )
    if log.skipped:
        updates = "one update" if len(log.skipped) == 1 else f"{len(log.skipped):,} updates"
        caption += f" Crosses mark {updates} that were skipped, because a loss or gradient was not finite."
    small = partial(figures.step_panel, restarts=log.restarts, size=figures.THIRD)
    panels = (
        _gradient_panel(run, style),
        small("Learning rate", [_logged(log, "learning rate", "learning_rate", style)], zero=True),
        small("Weights to their average, relative", averages, write=percent),
    )
    legend = (LegendEntry(swatch(None, 2**place), line.name) for place, line in enumerate(averages) if line)
    return figures.figure_of("Gradients and averages", panels, caption + _about_restarts(log), legend)


def _gradient_panel(run: Run, style: Mapping[str, Any]) -> Panel | None:
    log, clip = run.log, run.config.get("optimizer", {}).get("grad_clip")
    norms = [logged.grad_norm for logged in log.steps]
    pale = {**style, "linewidth": 0.8, "alpha": 0.35}
    lines = [
        _line("", log.steps, norms, pale, thin=False),
        _line("gradient norm", log.steps, figures.moving_average(norms), style),
    ]
    known = [norm for norm in norms if norm is not None]

    def paint(axes: Axes) -> None:
        if clip and max(known) > 0.4 * clip:
            axes.axhline(clip, color=MUTED.light, linewidth=1)
            axes.annotate("clipped to", (0.99, clip), xycoords=("axes fraction", "data"), xytext=(0, 3),
                          textcoords="offset points", ha="right", fontsize=8.5, color=MUTED.light)  # fmt: skip
        top = axes.get_xaxis_transform()
        axes.plot(log.skipped, [0.95] * len(log.skipped), "x", color=INK.light, markersize=6, transform=top)

    return figures.step_panel("Gradient norm", lines, restarts=log.restarts, paint=paint, size=figures.THIRD)


def _speed_figure(run: Run) -> Figure | None:
    """Draw images per second, utilisation and memory."""
    log, style = run.log, {"color": PREDICTION[run.config["prediction"]].light}
    shares = [_logged(log, "MFU", "mfu", style), _logged(log, "waiting for data", "waiting", {"color": MUTED.light})]
    small = partial(figures.step_panel, restarts=log.restarts, zero=True, size=figures.THIRD)
    panels = (
        small("Images per second", [_logged(log, "images per second", "img_per_second", style)]),
        small("MFU, and time spent waiting", shares, write=percent),
        small("Memory, GiB", [_logged(log, "memory", "memory_gib", style)]),
    )
    caption = (
        "MFU is the rate of the network's arithmetic over the rate of a matrix product on this device. Grey is the "
        f"share of the time spent waiting for data.{_about_restarts(log)}"
    )
    return figures.figure_of("Speed and memory", panels, caption)


def _about_restarts(log: Log) -> str:
    return " Dotted lines mark where training was resumed from a checkpoint." if log.restarts else ""


def _logged(log: Log, name: str, key: str, style: Mapping[str, Any]) -> Line | None:
    return _line(name, log.steps, [getattr(step, key) for step in log.steps], style)


def _line(
    name: str, logged: Sequence[LoggedStep], values: Sequence[float | None], style: Mapping[str, Any], thin: bool = True
) -> Line | None:
    """Return a line of the values that are known against their steps, None if there are none."""
    known = {entry.step: value for entry, value in zip(logged, values, strict=True) if value is not None}
    steps, kept = list(known), list(known.values())
    return Line(name, *(thinned(steps, kept) if thin else (steps, kept)), style) if known else None


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return a curve of at most MOST_POINTS points: the last step and the mean value of each stretch."""
    width = -(-len(steps) // MOST_POINTS)
    if width <= 1:
        return list(steps), list(values)
    starts = range(0, len(steps), width)
    means = [sum(values[start : start + width]) / len(values[start : start + width]) for start in starts]
    return [steps[min(start + width, len(steps)) - 1] for start in starts], means
