"""The figure of the forecasts against the measurements."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from jlt.report.expected import Check, widths_differ
from jlt.report.figures import Figure, Panel, draw, plain_log
from jlt.report.palette import INK, MUTED, PAPER, SYMBOL
from jlt.report.wording import listed, number, percent

MARKERS = "osD^vPX<>"
POWER, WIDTH = "power of the eigenvalues (0 whitened, 1 untouched)", "width of the network"
AXES: Mapping[str, tuple[str, Callable[[Check], float | None]]] = {
    POWER: ("the power", lambda check: check.forecast.anisotropy),
    WIDTH: ("the width", lambda check: check.forecast.width),
}
"""Quantities along a line: the label of the axis, a short name, and the value of a setting."""


def expected_figure(found: Sequence[Check]) -> Figure | None:
    """Draw the ratio of distances against what was expected, and along the geometry and the width where they vary."""
    if len(found) < 2:
        return None
    panels = [_along(found, label) for label, (_, place) in AXES.items() if len(set(map(place, found))) > 1]
    by_width = widths_differ(found)
    caption = (
        "The Fréchet distance of velocity over that of clean prediction, pair by pair of equal seeds: above 1 the "
        "clean latent wins. Points are means over seeds, bars run from the smallest to the largest. The expectation is "
        "the number of directions of a token that velocity needs more than the clean latent (eq. 13), as a share of "
        f"{'the width of the network' if by_width else 'all of them'}."
    )
    return Figure("Expected and measured", (*panels, _against_expected(found, by_width)), caption)


def _groups(found: Sequence[Check], along: str = "") -> dict[str, list[Check]]:
    """Return the settings by the quantities that differ in addition to the axis `along`, under names for these."""
    described: dict[str, Callable[[Check], str]] = {
        "patch": lambda check: f"patch {check.forecast.patch_size}",
        POWER: lambda check: "" if check.forecast.anisotropy is None else f"power {check.forecast.anisotropy:g}",
        WIDTH: lambda check: f"width {check.forecast.width}",
        "loss": lambda check: f"{SYMBOL[check.forecast.loss_space]}-space loss",
    }
    varied = [describe for name, describe in described.items() if name != along and len(set(map(describe, found))) > 1]
    groups: dict[str, list[Check]] = {}
    for check in found:
        groups.setdefault(", ".join(filter(None, (describe(check) for describe in varied))), []).append(check)
    return groups


def _plot(axes: Axes, x: Sequence[float], part: Sequence[Check], marker: str, label: str, line: bool) -> None:
    means = [check.ratio.mean for check in part]
    below = [check.ratio.mean - check.ratio.low for check in part]
    above = [check.ratio.high - check.ratio.mean for check in part]
    axes.errorbar(
        x, means, yerr=[below, above], marker=marker, markersize=5, linestyle="-" if line else "none", capsize=2,
        linewidth=1.2, color=INK.light, markerfacecolor=PAPER.light if marker in MARKERS[1::2] else INK.light,
        label=label,
    )  # fmt: skip


def _finish(axes: Axes, found: Sequence[Check], groups: Mapping[str, object]) -> None:
    axes.axhline(1.0, color=MUTED.light, linewidth=1)
    axes.set_yscale("log")
    plain_log(axes.yaxis, [bound for check in found for bound in (check.ratio.low, check.ratio.high, 1.0)])
    if len(groups) > 1:
        axes.legend(fontsize=8, frameon=False)


def _along(found: Sequence[Check], label: str) -> Panel:
    name, place = AXES[label]
    groups = _groups(found, label)

    def paint(axes: Axes) -> None:
        for (title, group), marker in zip(groups.items(), itertools.cycle(MARKERS), strict=False):
            part = sorted((check for check in group if place(check) is not None), key=lambda check: place(check) or 0.0)
            _plot(axes, [place(check) or 0.0 for check in part], part, marker, title, line=True)
        if min(place(check) or 0.0 for check in found) > 0:
            axes.set_xscale("log")
            axes.set_xticks(sorted({place(check) or 0.0 for check in found}))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        _finish(axes, found, groups)
        axes.set_title("Distance of velocity over clean")
        axes.set_xlabel(label)

    ratios = [f"{number(check.ratio.mean)} at {check.setting}" for check in found]
    return draw(paint, f"Ratio of distances against {name}: {listed(ratios)}.")


def _against_expected(found: Sequence[Check], by_width: bool) -> Panel:
    def place(check: Check) -> float:
        return check.load if by_width else check.forecast.clean_over_velocity

    groups = _groups(found, POWER)

    def paint(axes: Axes) -> None:
        for (name, part), marker in zip(groups.items(), itertools.cycle(MARKERS), strict=False):
            _plot(axes, [place(check) for check in part], part, marker, name, line=False)
        axes.axvline(0.0, color=MUTED.light, linewidth=1)
        _finish(axes, found, groups)
        axes.set_title("Measured against expected")
        axes.set_xlabel(f"needed beyond clean, of {'the width' if by_width else 'all directions'}")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))

    pairs = [f"expected {percent(place(check))}, measured {number(check.ratio.mean)}" for check in found]
    return draw(paint, f"Ratio of distances against the expectation: {listed(pairs)}.")
