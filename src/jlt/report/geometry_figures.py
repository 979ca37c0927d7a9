"""The figures of geometry.json and inside.json: spectra, what eq. 9-13 make of them, and the errors of networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from jlt.config import Prediction
from jlt.report import figures, palette
from jlt.report.figures import Figure, LegendEntry, Panel
from jlt.report.palette import INK, MUTED, PREDICTION, SHORT_NAMES, swatch
from jlt.report.wording import listed, number, percent
from jlt.results.geometry import ErrorByDirection, Geometry, NetworkError, Table, TokenGeometry, Values

MINUS = "\N{MINUS SIGN}"
LINES = ((None, None), (4, 2), (1, 1.5), (6, 2, 1, 2))
"""Dashes of the estimates of one space, or of the networks of one prediction."""
SHOWN_TIMES = (0.05, 0.4, 0.8)
"""Times of the figure of networks."""
NOT_DRAWN = 1e-9
"""Share of the largest value of a spectrum below which a value is the rounding of latents."""
NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "color": MUTED.light}
WHOLE = {
    "exact": "whole latents as one Gaussian",
    "stationary": "whole latents as one Gaussian in which no position is special (an approximation)",
}


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


def without_rounding(values: Sequence[float], largest: float) -> list[float]:
    """Return the values of a spectrum for a logarithmic axis, NaN where they are rounding."""
    return [value if value > NOT_DRAWN * largest else float("nan") for value in values]


def drawn_only(values: Iterable[float], largest: float) -> list[float]:
    """Return the values that `without_rounding` keeps."""
    return [value for value in values if value > NOT_DRAWN * largest]


def _plot_targets(
    axes: Axes, x: Sequence[float], curves: Mapping[Prediction, Sequence[float]], floor: float = -math.inf
) -> None:
    """Draw a curve for each prediction, without the values below the floor."""
    for name, curve in curves.items():
        shown = [value if value >= floor else math.nan for value in curve]
        axes.plot(x, shown, **_prediction_style(name, len(x)))


def _prediction_style(prediction: Prediction, points: int) -> dict[str, Any]:
    return {
        "color": PREDICTION[prediction].light,
        "marker": palette.MARKER[prediction],
        "markersize": 4,
        "markevery": max(1, points // 8),
    }


def _by_target(values: Mapping[Prediction, float], digits: int = 3) -> str:
    return listed([f"{SHORT_NAMES[name]} {number(value, digits)}" for name, value in values.items()])


def _label_ranks(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="directions, largest first", xlim=(-0.02, 1.02))
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))


def _label_directions(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="direction, largest first")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _spectrum_figure(entries: Sequence[TokenGeometry]) -> Figure:
    largest = max(entry.eigenvalues[0] for entry in entries)
    drawn = drawn_only((lam for entry in entries for lam in entry.eigenvalues), largest)
    held = [[part / sum(entry.eigenvalues) for part in accumulate(entry.eigenvalues)] for entry in entries]

    def plot(axes: Axes, curves: Sequence[Sequence[float]]) -> None:
        for entry, curve in zip(entries, curves, strict=True):
            ranks = [(index + 1) / entry.dimension for index in range(entry.dimension)]
            axes.plot(ranks, curve, color=INK.light, dashes=palette.dashes(entry.patch_size) or (None, None))

    def paint_spectrum(axes: Axes) -> None:
        plot(axes, [without_rounding(entry.eigenvalues, largest) for entry in entries])
        axes.axhline(1.0, color=MUTED.light, linewidth=1)
        axes.annotate("variance of the noise", (0.99, 1.0), (0, 3), ha="right", **NOTE)
        figures.make_log(axes, [*drawn, 1.0])
        _label_ranks(axes, "Variance of each direction of a token")

    def paint_share(axes: Axes) -> None:
        plot(axes, held)
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        _label_ranks(axes, "Share of the variance held so far")

    ends = [
        f"patch {entry.patch_size} falls from {number(entry.eigenvalues[0])} to {number(entry.eigenvalues[-1])}"
        for entry in entries
    ]
    tenths = [
        f"{percent((1 + sum(share < 0.9 for share in shares)) / entry.dimension)} at patch {entry.patch_size}"
        for entry, shares in zip(entries, held, strict=True)
    ]
    error = max(entry.relative_sampling_error for entry in entries)
    caption = (
        "Eigenvalues of the token covariance, sorted, for each patch size. Where the curve runs below the grey line, a "
        "direction of the clean latent varies less than the noise that is added to it. Each eigenvalue is known to "
        f"about {percent(error)} (the median over directions, with the bias of sorting). Values below a billionth of "
        "the largest are not drawn."
    )
    panels = (
        figures.draw(paint_spectrum, f"Eigenvalue against rank on a logarithmic axis: {listed(ends)}."),
        figures.draw(
            paint_share, f"Cumulative share of variance against rank; nine tenths are reached by {listed(tenths)}."
        ),
    )
    legend = tuple(LegendEntry(swatch(None, e.patch_size), f"patch {e.patch_size}") for e in entries)
    return Figure("The spectrum of the tokens", panels, caption, legend)


def _target_figure(entries: Sequence[TokenGeometry]) -> Figure:
    high = max(value for entry in entries for value in entry.target_variance["v"])
    low = min(drawn_only((value for entry in entries for value in [*entry.target_variance["x"], 1.0]), high))

    def panel(entry: TokenGeometry) -> Panel:
        shown = {name: without_rounding(variances, high) for name, variances in entry.target_variance.items()}

        def paint(axes: Axes) -> None:
            _plot_targets(axes, range(1, entry.dimension + 1), shown)
            axes.set_ylim(low / 1.6, high * 1.6)
            figures.make_log(axes, [low, high])
            _label_directions(axes, f"Target variance, patch {entry.patch_size}")

        last = _by_target({name: variances[-1] for name, variances in entry.target_variance.items()})
        alt = f"Variance of each target by direction, patch {entry.patch_size}. In the smallest direction: {last}."
        return figures.draw(paint, alt)

    caption = (
        "The variance of each target in every direction (eq. 9). Noise has variance 1 everywhere. Velocity is the "
        "clean latent minus noise, so it never falls below that floor; the clean target falls with the data."
    )
    return Figure("The variance of each target", tuple(map(panel, entries)), caption, figures.prediction_legend())


def _capacity_figure(entries: Sequence[TokenGeometry]) -> Figure:
    """Draw eq. 13: the excess error of each prediction by the rank of the predictor, and the stated share."""
    stated = entries[0].forecast.stated_share
    floor = stated / 50

    def panel(entry: TokenGeometry) -> Panel:
        forecast = entry.forecast
        excess = {name: [risk / forecast.unavoidable_risk for risk in curve] for name, curve in forecast.curves.items()}

        def paint(axes: Axes) -> None:
            _plot_targets(axes, [rank / entry.dimension for rank in forecast.ranks], excess, floor)
            axes.axhline(stated, color=MUTED.light, linewidth=1)
            axes.annotate(percent(stated), (0.0, stated), (3, 3), **NOTE)
            top = 2 * max(stated, *map(max, excess.values()))
            title = f"Error beyond the unavoidable, patch {entry.patch_size}"
            axes.set(yscale="log", ylim=(floor, top), title=title, xlabel="directions that the predictor has")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}" if v < 1 else f"{v:g}x"))
            axes.xaxis.set_major_formatter(PercentFormatter(1, 0))

        alt = (
            f"Excess velocity error against the rank of the predictor, patch {entry.patch_size}. Directions needed, "
            f"of {entry.dimension}, to come within {percent(stated)}: {_by_target(forecast.needed_directions)}."
        )
        return figures.draw(paint, alt)

    caption = (
        "The capacity curves (eq. 13), averaged over the training times: the excess velocity error of the best "
        "predictor of each rank, in units of the unavoidable error. Where a curve meets the grey line, at "
        f"{percent(stated)}, its prediction has as many directions as it needs."
    )
    return Figure(
        "What each prediction needs",
        tuple(map(panel, entries)),
        caption,
        figures.prediction_legend(entries[0].forecast.curves),
    )


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
            _plot_targets(axes, times, curves, floor)
            finish(axes)
            if max(map(max, curves.values())) < floor:
                axes.annotate("nothing remains", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED.light)
            axes.set_title(direction, fontsize=9.5)
            axes.set_xlabel("time t, from noise to data")

        values = _by_target({name: curve[place] for name, curve in curves.items()}, 2)
        return figures.draw(paint, f"{direction}. {quantity} at t = {times[place]:g}: {values}.", figures.THIRD)

    return tuple(map(panel, _shown_columns(entry)))


def _largest(table: Mapping[Prediction, Table], columns: Sequence[int]) -> float:
    return max(abs(row[column]) for rows in table.values() for row in rows for column in columns)


def _coefficient_figure(entry: TokenGeometry, times: Values) -> Figure:
    reach = 1.15 * _largest(entry.coefficient, _shown_columns(entry))

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
    return Figure(
        "The best linear coefficient over time", panels, caption, figures.prediction_legend(entry.coefficient)
    )


def _conditional_figure(entry: TokenGeometry, times: Values) -> Figure:
    table = entry.conditional_variance
    # Exact zeros (noise prediction at t = 0, directions without variance) have no place on a logarithmic axis.
    floor = 1e-4
    high = max(2 * _largest(table, _shown_columns(entry)), 10 * floor)

    def finish(axes: Axes) -> None:
        axes.set(xlim=(-0.03, 1.03), ylim=(floor, high))
        figures.make_log(axes, [floor, high])

    caption = (
        "The squared error that no predictor can avoid (eq. 11), each in the units of its own target. Converted to a "
        "velocity, all three are the same error: the targets differ in what a network must output to reach it, not in "
        "what can be known. Values below 0.0001 are not drawn."
    )
    panels = _time_panels(entry, times, table, "Conditional variance", len(times) // 2, finish, floor)
    return Figure("The error that remains", panels, caption, figures.prediction_legend(entry.conditional_variance))


def _estimates_figure(entry: TokenGeometry, geometry: Geometry) -> Figure:
    """Draw the same space by other estimates: local ones, and the spectrum of whole latents."""
    stationary, whole, every = geometry.stationary, geometry.whole, range(entry.dimension)
    tokens = {"tokens": (every, entry.eigenvalues)}
    tokens |= {name: (every, local.eigenvalues) for name, local in entry.local.items()}
    latents: dict[str, tuple[Sequence[int], Values]] = {
        f"by frequency, {name}": (found.ranks, found.eigenvalues) for name, found in stationary.spectra.items()
    }
    latents[f"leading directions ({whole.method})"] = (range(len(whole.eigenvalues)), whole.eigenvalues)
    shares = [f"{name} {percent(local.variance_share)}" for name, local in entry.local.items()]
    shares_text = f" Shares of the variance of tokens: {listed(shares)}." if shares else ""
    caption = (
        "The analysis is local: what counts is the variance among the latents that a network must tell apart. On the "
        "left the spectrum of tokens, of all and within classes and neighbourhoods. On the right whole latents, as if "
        "their positions were a torus, and their leading directions without that assumption."
    )
    of_tokens = f"Eigenvalue against rank by {listed([*tokens])}.{shares_text}"
    of_latents = f"Eigenvalue against rank of whole latents, {stationary.dimension:,} directions."
    panels = (
        _spectra_panel(tokens, entry.dimension, f"Tokens, patch {entry.patch_size}", of_tokens),
        _spectra_panel(latents, stationary.dimension, "Whole latents", of_latents),
    )
    return Figure("The same space by other estimates", panels, caption + shares_text)


def _spectra_panel(spectra: Mapping[str, tuple[Sequence[int], Values]], dimension: int, title: str, alt: str) -> Panel:
    """Draw the eigenvalues of several estimates at their ranks."""
    values = [value for _, spectrum in spectra.values() for value in spectrum]
    largest = max(values)

    def paint(axes: Axes) -> None:
        for (name, (ranks, spectrum)), dashes in zip(spectra.items(), LINES, strict=False):
            shares = [(rank + 1) / dimension for rank in ranks]
            axes.plot(shares, without_rounding(spectrum, largest), color=INK.light, dashes=dashes, label=name)
        figures.make_log(axes, [*drawn_only(values, largest), 1.0])
        axes.legend(fontsize=8, frameon=False)
        _label_ranks(axes, title)

    return figures.draw(paint, alt)


def repeats_of(networks: Sequence[NetworkError]) -> list[int]:
    """Return for each network how many of those before it have the same prediction."""
    kinds = [network.prediction for network in networks]
    return [kinds[:place].count(kind) for place, kind in enumerate(kinds)]


def network_legend(networks: Sequence[NetworkError]) -> tuple[LegendEntry, ...]:
    """Return one entry per network."""
    return tuple(
        LegendEntry(swatch(network.prediction, 1 + before), f"{network.run}, step {network.step:,}")
        for network, before in zip(networks, repeats_of(networks), strict=True)
    )


def inside_figures(inside: ErrorByDirection) -> list[Figure]:
    """Draw the error of every network and the optima, a panel for each of some times."""
    networks = inside.networks
    kinds, repeats = [network.prediction for network in networks], repeats_of(networks)
    optima = ((inside.optimum, MUTED, (1, 1.5)), (inside.whole_optimum, INK, (4, 2)))

    def panel(place: int) -> Panel:
        lines = [network.error[place] for network in networks]
        time = f"t = {inside.times[place]:g}"

        def paint(axes: Axes) -> None:
            ranks = range(1, len(lines[0]) + 1)
            largest = max(map(max, lines))
            for rows, colour, dashes in optima:
                shown = without_rounding(rows[place], largest)
                axes.plot(ranks, shown, color=colour.light, dashes=dashes, linewidth=1.2)
            for line, kind, before in zip(lines, kinds, repeats, strict=True):
                style = _prediction_style(kind, len(line))
                axes.plot(ranks, without_rounding(line, largest), **style, dashes=LINES[before % 3])
            axes.set_xlim(1 - 0.03 * len(ranks), 1.03 * len(ranks))
            figures.make_log(axes, drawn_only((value for line in lines for value in line), largest))
            _label_directions(axes, time)

        last = [f"{network.run} {number(line[-1], 2)}" for network, line in zip(networks, lines, strict=True)]
        return figures.draw(
            paint, f"Squared velocity error by direction at {time}; in the smallest: {listed(last)}.", figures.THIRD
        )

    legend = network_legend(networks)
    caption = (
        f"Squared velocity error of {len(networks)} networks along the eigen-directions of the tokens, for the same "
        f"{inside.count:,} latents and noise. Thin lines are the unavoidable error of a linear predictor (eq. 11): "
        f"dotted of a token as a Gaussian, dashed of {WHOLE[inside.whole_estimate]}. A network may undercut both, "
        "since it uses all tokens and the class and is not linear. Values below a billionth of the largest are not "
        "drawn."
    )
    panels = tuple(panel(place) for place, t in enumerate(inside.times) if t in SHOWN_TIMES)
    return [Figure("Where the networks err", panels, caption, legend)]
