"""The figure of a price: Frechet distance against evaluations, a curve for each solver, shift and interval."""

from __future__ import annotations

from matplotlib.axes import Axes

from jlt.report.figures import Figure, LegendEntry, draw, log_if_wide
from jlt.report.palette import DASHES, INK, MUTED, PAPER, TIME, line_swatch
from jlt.report.price_text import SOLVERS, curve_key, curves, measured, sampler_text
from jlt.report.wording import interval_text
from jlt.results.price import Price, Priced
from jlt.results.sweep import WHOLE_INTERVAL

MARKERS = ("o", "s", "^", "D", "v")
COLOURS = (0, 4, 2, 3, 1)
"""Places in the palette of times: neighbours in it look alike."""


def price_figure(result: Price) -> Figure:
    """Draw all curves; a band shows the published sampler's distance with its error."""
    published, *points = result.points
    lines = curves(points)
    solvers = list(dict.fromkeys(line[0].solver for line in lines))
    styles = [curve_key(line[0])[1:] for line in lines]
    dashes = {style: DASHES[place % len(DASHES)] for place, style in enumerate(dict.fromkeys(styles))}

    def paint(axes: Axes) -> None:
        error = published.error or 0.0
        axes.axhspan(published.value - error, published.value + error, color=MUTED.light, alpha=0.22, linewidth=0)
        axes.axhline(published.value, color=MUTED.light, linewidth=1.2)
        for line in lines:
            place = solvers.index(line[0].solver)
            axes.errorbar(
                [point.evaluations for point in line], [point.value for point in line],
                yerr=[point.error or 0.0 for point in line], color=TIME[COLOURS[place]].light, marker=MARKERS[place],
                dashes=dashes[curve_key(line[0])[1:]], markersize=5, markeredgecolor=PAPER.light, markeredgewidth=0.6,
                elinewidth=1.0, capsize=2,
            )  # fmt: skip
        for point in points:
            if point.setting == result.choice:
                axes.plot(
                    [point.evaluations], [point.value], "o", markersize=14, fillstyle="none", color=INK.light,
                    markeredgewidth=1.8,
                )  # fmt: skip
        log_if_wide(axes, [point.value for point in result.points])
        axes.margins(x=0.05)
        axes.set(xlabel="evaluations of the network per image", title="Fréchet distance")

    legend = []
    for line in lines:
        role, dash = f"t{COLOURS[solvers.index(line[0].solver)]}", dashes[curve_key(line[0])[1:]]
        legend.append(LegendEntry(line_swatch(role, "", dash), _label(line[0])))
    legend.append(LegendEntry(line_swatch("muted"), f"published, {published.evaluations} evaluations"))
    caption = (
        f"{result.num:,} images of seed {result.seed} for each setting. The band is the published sampler with its "
        "standard error; bars are standard errors. "
        + ("The ring marks the choice." if result.choice else "No setting reaches the band.")
    )
    best = min(points, key=lambda point: point.value)
    alt = f"Fréchet distance against evaluations. The lowest is {measured(best)}, of {sampler_text(best)}."
    return Figure("Distance against price", (draw(paint, alt, (6.4, 3.8)),), caption, tuple(legend))


def _label(point: Priced) -> str:
    shift = "" if point.shift == 1 else f", shift {point.shift:g}"
    interval = "" if point.cfg_interval == WHOLE_INTERVAL else f", {interval_text(point.cfg_interval)}"
    return f"{SOLVERS[point.solver]}{shift}{interval}"
