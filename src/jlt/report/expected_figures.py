"""The figure of the forecasts against the measurements."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from jlt.report.expected import Check, widths_differ
from jlt.report.figures import Figure, Panel, draw, plain_log
from jlt.report.palette import INK, MUTED, PAPER, SYMBOL
from jlt.report.wording import listed, number, percent

MARKERS = "osD^vPX<>"
POWER, WIDTH = "power of the eigenvalues (0 whitened, 1 untouched)", "width of the network"
Place = Callable[[Check], float | None]
"""The position of a setting along an axis."""
AXES: Mapping[str, tuple[str, Place]] = {
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


def _along(found: Sequence[Check], label: str) -> Panel:
    name, place = AXES[label]

    def finish(axes: Axes) -> None:
        values = sorted({place(check) or 0.0 for check in found})
        if values[0] > 0:
            axes.set_xscale("log")
            axes.set_xticks(values)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title("Distance of velocity over clean")
        axes.set_xlabel(label)

    ratios = [f"{number(check.ratio.mean)} at {check.setting}" for check in found]
    return _panel(found, label, place, "-", finish, f"Ratio of distances against {name}: {listed(ratios)}.")


def _against_expected(found: Sequence[Check], by_width: bool) -> Panel:
    def place(check: Check) -> float:
        return check.load if by_width else check.forecast.clean_over_velocity

    def finish(axes: Axes) -> None:
        axes.axvline(0.0, color=MUTED.light, linewidth=1)
        axes.set_title("Measured against expected")
        axes.set_xlabel(f"needed beyond clean, of {'the width' if by_width else 'all directions'}")
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0))

    pairs = [f"expected {percent(place(check))}, measured {number(check.ratio.mean)}" for check in found]
    return _panel(found, POWER, place, "none", finish, f"Ratio of distances against the expectation: {listed(pairs)}.")


def _panel(
    found: Sequence[Check], along: str, place: Place, line: str, finish: Callable[[Axes], None], alt: str
) -> Panel:
    """Draw the ratios of distances by their place, for each group of settings that differ in more than `along`."""
    groups = _groups(found, along)

    def paint(axes: Axes) -> None:
        for (label, group), marker in zip(groups.items(), itertools.cycle(MARKERS), strict=False):
            points = [(at, check.ratio) for check in group if (at := place(check)) is not None]
            if line == "-":
                points.sort(key=itemgetter(0))
            below, above = ([r.mean - r.low for _, r in points], [r.high - r.mean for _, r in points])
            axes.errorbar(
                [at for at, _ in points], [r.mean for _, r in points], yerr=[below, above], marker=marker, markersize=5,
                linestyle=line, capsize=2, linewidth=1.2, color=INK.light, label=label,
                markerfacecolor=PAPER.light if marker in MARKERS[1::2] else INK.light,
            )  # fmt: skip
        finish(axes)
        axes.axhline(1.0, color=MUTED.light, linewidth=1)
        axes.set_yscale("log")
        plain_log(axes.yaxis, [bound for check in found for bound in (check.ratio.low, check.ratio.high, 1.0)])
        if len(groups) > 1:
            axes.legend(fontsize=8, frameon=False)

    return draw(paint, alt)


def _groups(found: Sequence[Check], along: str) -> dict[str, list[Check]]:
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
