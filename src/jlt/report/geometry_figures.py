"""The figures of geometry.json: the spectrum of the tokens, and what eq. 9-11 make of it for each target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jlt.config import Prediction
from jlt.report import palette
from jlt.report.figures import (
    THIRD,
    Figure,
    LegendEntry,
    Panel,
    draw,
    drawn_only,
    plain_log,
    prediction_legend,
    without_rounding,
)
from jlt.report.palette import INK, MUTED, PREDICTION, SHORT_WORDS, swatch
from jlt.report.wording import listed, number, percent
from jlt.results.geometry import Geometry, Table, TokenGeometry, Values

MINUS = "\N{MINUS SIGN}"
LINES = ((None, None), (4, 2), (1, 1.5), (6, 2, 1, 2))
"""Dashes of the estimates of one space."""

Spectra = dict[str, tuple[Sequence[int], Values]]
"""Ranks and eigenvalues by estimate."""


def geometry_figures(geometry: Geometry) -> list[Figure]:
    """Draw the spectra, the target variances, and coefficients and conditional variances of the smallest patch."""
    entries = list(geometry.tokens.values())
    smallest = geometry.tokens[min(geometry.tokens)]
    return [
        _spectrum_figure(entries),
        _target_figure(entries),
        _capacity_figure(entries),
        _coefficient_figure(smallest, geometry.times),
        _conditional_figure(smallest, geometry.times),
        _estimates_figure(smallest, geometry),
    ]


def _spectrum_figure(entries: list[TokenGeometry]) -> Figure:
    def ranks(entry: TokenGeometry) -> list[float]:
        return [(index + 1) / entry.dimension for index in range(entry.dimension)]

    def style(entry: TokenGeometry) -> dict[str, Any]:
        return {"color": INK.light, "dashes": palette.dashes(entry.patch_size) or (None, None)}

    largest = max(lam for entry in entries for lam in entry.eigenvalues)
    positive = drawn_only((lam for entry in entries for lam in entry.eigenvalues), largest)

    def paint_spectrum(axes: Axes) -> None:
        for entry in entries:
            axes.plot(ranks(entry), without_rounding(entry.eigenvalues, largest), **style(entry))
        axes.axhline(1.0, color=MUTED.light, linewidth=1)
        axes.annotate("variance of the noise", (0.99, 1.0), xytext=(0, 3), textcoords="offset points", ha="right",
                      fontsize=8.5, color=MUTED.light)  # fmt: skip
        axes.set_yscale("log")
        plain_log(axes.yaxis, [*positive, 1.0])
        axes.set_title("Variance of each direction of a token")
        _label_ranks(axes)

    def paint_share(axes: Axes) -> None:
        for entry in entries:
            total = sum(entry.eigenvalues)
            axes.plot(ranks(entry), [part / total for part in accumulate(entry.eigenvalues)], **style(entry))
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_title("Share of the variance held so far")
        _label_ranks(axes)

    ends = [
        f"patch {entry.patch_size} falls from {number(max(lam))} to {number(min(lam))}"
        for entry in entries
        for lam in [entry.eigenvalues]
    ]
    halves = [
        f"{percent(_directions_for(entry, 0.9) / entry.dimension)} at patch {entry.patch_size}" for entry in entries
    ]
    error = max(entry.relative_sampling_error for entry in entries)
    caption = (
        "Eigenvalues of the token covariance, sorted, for each patch size. Where the curve runs below the grey line, a "
        "direction of the clean latent varies less than the noise that is added to it. Each eigenvalue is known to "
        f"about {percent(error)} (the median over directions, with the bias of sorting). Values below a billionth of "
        "the largest are not drawn."
    )
    panels = (
        draw(paint_spectrum, f"Eigenvalue against rank on a logarithmic axis: {listed(ends)}."),
        draw(paint_share, f"Cumulative share of variance against rank; nine tenths are reached by {listed(halves)}."),
    )
    legend = tuple(LegendEntry(swatch(None, e.patch_size), f"patch {e.patch_size}") for e in entries)
    return Figure("The spectrum of the tokens", panels, caption, legend)


def _directions_for(entry: TokenGeometry, share: float) -> int:
    """Return how many leading directions hold a share of the variance."""
    total = sum(entry.eigenvalues)
    return 1 + sum(part / total < share for part in accumulate(entry.eigenvalues))


def _label_ranks(axes: Axes) -> None:
    axes.set_xlabel("directions, largest first")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlim(-0.02, 1.02)


def _target_figure(entries: list[TokenGeometry]) -> Figure:
    high = max(value for entry in entries for value in entry.target_variance["v"])
    low = min(drawn_only((value for entry in entries for value in [*entry.target_variance["x"], 1.0]), high))

    def panel(entry: TokenGeometry) -> Panel:
        def paint(axes: Axes) -> None:
            for prediction, variances in entry.target_variance.items():
                shown = without_rounding(variances, high)
                axes.plot(range(1, len(shown) + 1), shown, **_target_style(prediction, len(shown)))
            axes.set_yscale("log")
            axes.set_ylim(low / 1.6, high * 1.6)
            plain_log(axes.yaxis, [low, high])
            axes.set_title(f"Target variance, patch {entry.patch_size}")
            axes.set_xlabel("direction, largest first")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

        last = {prediction: number(values[-1]) for prediction, values in entry.target_variance.items()}
        alt = f"Variance of each target by direction, patch {entry.patch_size}. In the smallest direction: " + listed(
            [f"{SHORT_WORDS[prediction]} {value}" for prediction, value in last.items()]
        )
        return draw(paint, f"{alt}.")

    caption = (
        "The variance of each target in every direction (eq. 9). Noise has variance 1 everywhere. Velocity is the "
        "clean latent minus noise, so it never falls below that floor; the clean target falls with the data."
    )
    return Figure("The variance of each target", tuple(map(panel, entries)), caption, prediction_legend())


def _target_style(prediction: str, points: int) -> dict[str, Any]:
    return {
        "color": PREDICTION[prediction].light,
        "marker": palette.MARKER[prediction],
        "markersize": 4,
        "markevery": max(1, points // 8),
    }


def _shown_columns(entry: TokenGeometry) -> list[int]:
    """Return the columns of the tables to draw: the largest, the middle and the smallest direction."""
    count = len(entry.directions)
    return sorted({0, count // 2, count - 1})


def _time_panels(
    entry: TokenGeometry,
    times: Values,
    table: Mapping[Prediction, Table],
    quantity: str,
    place: int,
    finish: Callable[[Axes], None],
    floor: float = -math.inf,
) -> tuple[Panel, ...]:
    """Draw a table over time, a panel for each shown direction; the text has the values at the time in `place`."""

    def panel(column: int) -> Panel:
        curves = {prediction: [row[column] for row in rows] for prediction, rows in table.items()}
        index = entry.directions[column]
        lam = entry.eigenvalues[index]
        variance = f"variance {number(lam, 2)}" if drawn_only([lam], entry.eigenvalues[0]) else "no variance"
        direction = f"Direction {index + 1} of {entry.dimension}: {variance}"

        def paint(axes: Axes) -> None:
            for prediction, line in curves.items():
                shown = [value if value >= floor else math.nan for value in line]
                axes.plot(times, shown, **_target_style(prediction, len(times)))
            finish(axes)
            if all(value < floor for line in curves.values() for value in line):
                axes.annotate("nothing remains", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED.light)
            axes.set_title(direction, fontsize=9.5)
            axes.set_xlabel("time t, from noise to data")

        values = [f"{SHORT_WORDS[name]} {number(line[place], 2)}" for name, line in curves.items()]
        return draw(paint, f"{direction}. {quantity} at t = {times[place]:g}: {listed(values)}.", THIRD)

    return tuple(map(panel, _shown_columns(entry)))


def _coefficient_figure(entry: TokenGeometry, times: Values) -> Figure:
    columns = _shown_columns(entry)
    reach = 1.15 * max(abs(row[column]) for rows in entry.coefficient.values() for row in rows for column in columns)

    def finish(axes: Axes) -> None:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(-reach, reach)
        ticks = [value for value in (-100, -10, -1, 0, 1, 10, 100) if abs(value) <= reach]
        axes.set_yticks(ticks, [f"{value:g}".replace("-", MINUS) for value in ticks])
        axes.yaxis.set_minor_locator(MaxNLocator(1))
        axes.axhline(0, color=MUTED.light, linewidth=0.8, zorder=1)

    caption = (
        "The factor that the best linear predictor applies to the noisy latent (eq. 10), for three directions at patch "
        f"{entry.patch_size}. In directions with little variance the best clean prediction outputs almost nothing, "
        f"while noise and velocity need a factor that grows like 1/(1 {MINUS} t). The vertical axis is linear between "
        f"{MINUS}1 and 1 and logarithmic beyond."
    )
    panels = _time_panels(entry, times, entry.coefficient, "Best coefficients", len(times) - 1, finish)
    return Figure("The best linear coefficient over time", panels, caption, prediction_legend())


def _conditional_figure(entry: TokenGeometry, times: Values) -> Figure:
    columns, table = _shown_columns(entry), entry.conditional_variance
    # Exact zeros (noise prediction at t = 0, directions without variance) have no place on a logarithmic axis.
    floor = 1e-4
    high = max(2 * max(row[column] for rows in table.values() for row in rows for column in columns), 10 * floor)

    def finish(axes: Axes) -> None:
        axes.set_yscale("log")
        axes.set_ylim(floor, high)
        plain_log(axes.yaxis, [floor, high])
        axes.set_xlim(-0.03, 1.03)

    caption = (
        "The squared error that no predictor can avoid (eq. 11), each in the units of its own target. Converted to a "
        "velocity, all three are the same error: the targets differ in what a network must output to reach it, not in "
        "what can be known. Values below 0.0001 are not drawn."
    )
    panels = _time_panels(entry, times, table, "Conditional variance", len(times) // 2, finish, floor)
    return Figure("The error that remains", panels, caption, prediction_legend())


def _capacity_figure(entries: list[TokenGeometry]) -> Figure:
    """Draw eq. 13: the excess error of each prediction by the rank of the predictor, and the stated share."""
    stated = entries[0].forecast.stated_share
    floor = stated / 50

    def panel(entry: TokenGeometry) -> Panel:
        forecast = entry.forecast
        needed = forecast.needed_directions
        shares = [rank / entry.dimension for rank in forecast.ranks]
        excess = {name: [risk / forecast.unavoidable_risk for risk in curve] for name, curve in forecast.curves.items()}

        def paint(axes: Axes) -> None:
            for prediction, curve in excess.items():
                shown = [value if value >= floor else math.nan for value in curve]
                axes.plot(shares, shown, **_target_style(prediction, len(shown)))
            axes.axhline(stated, color=MUTED.light, linewidth=1)
            axes.annotate(percent(stated), (0.0, stated), xytext=(3, 3), textcoords="offset points", fontsize=8.5,
                          color=MUTED.light)  # fmt: skip
            axes.set_yscale("log")
            axes.set_ylim(floor, 2 * max(stated, *map(max, excess.values())))
            axes.yaxis.set_major_formatter(FuncFormatter(_share_or_multiple))
            axes.set_title(f"Error beyond the unavoidable, patch {entry.patch_size}")
            axes.set_xlabel("directions that the predictor has")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))

        ranks = [f"{SHORT_WORDS[name]} {number(value)}" for name, value in needed.items()]
        alt = (
            f"Excess velocity error against the rank of the predictor, patch {entry.patch_size}. Directions needed, "
            f"of {entry.dimension}, to come within {percent(stated)}: {listed(ranks)}."
        )
        return draw(paint, alt)

    caption = (
        "The capacity curves (eq. 13), averaged over the training times: the excess velocity error of the best "
        "predictor of each rank, in units of the unavoidable error. Where a curve meets the grey line, at "
        f"{percent(stated)}, its prediction has as many directions as it needs."
    )
    return Figure("What each prediction needs", tuple(map(panel, entries)), caption, prediction_legend())


def _share_or_multiple(value: float, _: int | None) -> str:
    return f"{value:.0%}" if value < 1 else f"{value:g}x"


def _estimates_figure(entry: TokenGeometry, geometry: Geometry) -> Figure:
    """Draw the same space by other estimates: local ones, and the spectrum of whole latents."""
    stationary, leading = geometry.stationary, geometry.whole.eigenvalues
    tokens: Spectra = {
        "tokens": (range(entry.dimension), entry.eigenvalues),
        **{name: (range(entry.dimension), local.eigenvalues) for name, local in entry.local.items()},
    }
    whole: Spectra = {
        f"by frequency, {name}": (spectrum.ranks, spectrum.eigenvalues) for name, spectrum in stationary.spectra.items()
    }
    whole[f"leading directions ({geometry.whole.method})"] = (range(len(leading)), leading)
    shares = [f"{name} {percent(local.variance_share)}" for name, local in entry.local.items()]
    shares_text = f" Shares of the variance of tokens: {listed(shares)}." if shares else ""
    caption = (
        "The analysis is local: what counts is the variance among the latents that a network must tell apart. On the "
        "left the spectrum of tokens, of all and within classes and neighbourhoods. On the right whole latents, as if "
        "their positions were a torus, and their leading directions without that assumption."
    )
    panels = (
        _spectra_panel(
            tokens,
            entry.dimension,
            f"Tokens, patch {entry.patch_size}",
            f"Eigenvalue against rank by {listed(list(tokens))}.{shares_text}",
        ),
        _spectra_panel(
            whole,
            stationary.dimension,
            "Whole latents",
            f"Eigenvalue against rank of whole latents, {stationary.dimension:,} directions.",
        ),
    )
    return Figure("The same space by other estimates", panels, caption + shares_text)


def _spectra_panel(spectra: Spectra, dimension: int, title: str, alt: str) -> Panel:
    values = [value for _, spectrum in spectra.values() for value in spectrum]
    largest = max(values)

    def paint(axes: Axes) -> None:
        for (name, (ranks, spectrum)), dashes in zip(spectra.items(), LINES, strict=False):
            shares = [(rank + 1) / dimension for rank in ranks]
            axes.plot(shares, without_rounding(spectrum, largest), color=INK.light, dashes=dashes, label=name)
        axes.set_yscale("log")
        plain_log(axes.yaxis, [*drawn_only(values, largest), 1.0])
        axes.legend(fontsize=8, frameon=False)
        _label_ranks(axes)
        axes.set_title(title)

    return draw(paint, alt)
