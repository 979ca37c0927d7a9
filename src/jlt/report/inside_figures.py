"""The figure of inside.json: the velocity error of trained networks by direction, at some times."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jlt.report import palette
from jlt.report.figures import THIRD, Figure, LegendEntry, Panel, draw, drawn_only, plain_log, without_rounding
from jlt.report.palette import INK, MUTED, PREDICTION, swatch
from jlt.report.wording import listed, number
from jlt.results.geometry import ErrorByDirection

SHOWN_TIMES = (0.05, 0.4, 0.8)
WHOLE = {
    "exact": "whole latents as one Gaussian",
    "stationary": "whole latents as one Gaussian in which no position is special (an approximation)",
}
LINES = ((None, None), (4, 2), (1, 1.5))
"""Networks of one prediction are told apart by their dashes."""


def inside_figures(inside: ErrorByDirection) -> list[Figure]:
    """Draw the error of every network and the optima, a panel for each of some times."""
    places = [index for index, t in enumerate(inside.times) if t in SHOWN_TIMES]
    networks = inside.networks
    kinds = [network.prediction for network in networks]
    repeats = [kinds[:place].count(kind) for place, kind in enumerate(kinds)]
    styles: list[dict[str, Any]] = [
        {
            "color": PREDICTION[network.prediction].light,
            "marker": palette.MARKER[network.prediction],
            "dashes": LINES[before % len(LINES)],
        }
        for network, before in zip(networks, repeats, strict=True)
    ]
    optima = {
        "a token as a Gaussian": (inside.optimum, MUTED.light),
        WHOLE[inside.whole_estimate]: (inside.whole_optimum, INK.light),
    }

    def panel(place: int) -> Panel:
        lines = [network.error[place] for network in networks]

        def paint(axes: Axes) -> None:
            ranks = range(1, len(lines[0]) + 1)
            largest = max(map(max, lines))
            for (rows, colour), dashes in zip(optima.values(), ((1, 1.5), (4, 2)), strict=False):
                axes.plot(ranks, without_rounding(rows[place], largest), color=colour, dashes=dashes, linewidth=1.2)
            for line, style in zip(lines, styles, strict=True):
                shown = without_rounding(line, largest)
                axes.plot(ranks, shown, **style, markersize=4, markevery=max(1, len(line) // 8))
            axes.set_yscale("log")
            axes.set_xlim(1 - 0.03 * len(ranks), 1.03 * len(ranks))
            plain_log(axes.yaxis, drawn_only((value for line in lines for value in line), largest))
            axes.set_title(f"t = {inside.times[place]:g}")
            axes.set_xlabel("direction, largest first")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

        last = [f"{network.run} {number(line[-1], 2)}" for network, line in zip(networks, lines, strict=True)]
        time = f"t = {inside.times[place]:g}"
        return draw(paint, f"Squared velocity error by direction at {time}; in the smallest: {listed(last)}.", THIRD)

    legend = tuple(
        LegendEntry(swatch(network.prediction, 1 + before), f"{network.run}, step {network.step:,}")
        for network, before in zip(networks, repeats, strict=True)
    )
    dotted, dashed = optima
    caption = (
        f"Squared velocity error of {len(networks)} networks along the eigen-directions of the tokens, for the same "
        f"{inside.count:,} latents and noise. Thin lines are the unavoidable error of a linear predictor (eq. 11): "
        f"dotted of {dotted}, dashed of {dashed}. A network may undercut both, since it uses all tokens and the class "
        "and is not linear. Values below a billionth of the largest are not drawn."
    )
    return [Figure("Where the networks err", tuple(map(panel, places)), caption, legend)]
