"""The figures of geometry.json: the spectrum of the tokens, and what eq. 9-11 make of it for each target."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

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

Entry = Mapping[str, Any]
MINUS = "\N{MINUS SIGN}"


def geometry_figures(geometry: Mapping[str, Any]) -> list[Figure]:
    """Draw the spectra, the target variances, and coefficients and conditional variances of the smallest patch."""
    entries = list(geometry["tokens"].values())
    times = geometry["times"]
    smallest = min(entries, key=lambda entry: entry["patch_size"])
    return [
        _spectrum_figure(entries),
        _target_figure(entries),
        _capacity_figure(entries),
        _coefficient_figure(smallest, times),
        _conditional_figure(smallest, times),
        _estimates_figure(smallest, geometry),
    ]


def _spectrum_figure(entries: list[Entry]) -> Figure:
    def ranks(entry: Entry) -> list[float]:
        return [(index + 1) / entry["dimension"] for index in range(entry["dimension"])]

    def style(entry: Entry) -> dict[str, Any]:
        return {"color": INK.light, "dashes": palette.dashes(entry["patch_size"]) or (None, None)}

    largest = max(lam for entry in entries for lam in entry["eigenvalues"])
    positive = drawn_only((lam for entry in entries for lam in entry["eigenvalues"]), largest)

    def paint_spectrum(axes: Axes) -> None:
        for entry in entries:
            axes.plot(ranks(entry), without_rounding(entry["eigenvalues"], largest), **style(entry))
        axes.axhline(1.0, color=MUTED.light, linewidth=1)
        axes.annotate("variance of the noise", (0.99, 1.0), xytext=(0, 3), textcoords="offset points", ha="right",
                      fontsize=8.5, color=MUTED.light)  # fmt: skip
        axes.set_yscale("log")
        plain_log(axes.yaxis, [*positive, 1.0])
        axes.set_title("Variance of each direction of a token")
        _label_ranks(axes)

    def paint_share(axes: Axes) -> None:
        for entry in entries:
            total = sum(entry["eigenvalues"])
            axes.plot(ranks(entry), [part / total for part in accumulate(entry["eigenvalues"])], **style(entry))
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_title("Share of the variance held so far")
        _label_ranks(axes)

    ends = [
        f"patch {entry['patch_size']} falls from {number(max(lam))} to {number(min(lam))}"
        for entry in entries
        for lam in [entry["eigenvalues"]]
    ]
    halves = [
        f"{percent(_directions_for(entry, 0.9) / entry['dimension'])} at patch {entry['patch_size']}"
        for entry in entries
    ]
    error = max(entry["relative_sampling_error"] for entry in entries)
    caption = (
        "Eigenvalues of the token covariance, sorted, for each patch size. Where the curve runs below the grey line, a "
        "direction of the clean latent varies less than the noise that is added to it. Each eigenvalue is known to "
        f"about {percent(error)} (the median over directions, with what sorting adds). Below a billionth of the "
        "largest nothing is drawn."
    )
    panels = (
        draw(paint_spectrum, f"Eigenvalue against rank on a logarithmic axis: {listed(ends)}."),
        draw(paint_share, f"Cumulative share of variance against rank; nine tenths are reached by {listed(halves)}."),
    )
    legend = tuple(LegendEntry(swatch(None, e["patch_size"]), f"patch {e['patch_size']}") for e in entries)
    return Figure("The spectrum of the tokens", panels, caption, legend)


def _directions_for(entry: Entry, share: float) -> int:
    """Return how many leading directions hold a share of the variance."""
    total = sum(entry["eigenvalues"])
    return 1 + sum(part / total < share for part in accumulate(entry["eigenvalues"]))


def _label_ranks(axes: Axes) -> None:
    axes.set_xlabel("directions, largest first")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlim(-0.02, 1.02)


def _target_figure(entries: list[Entry]) -> Figure:
    high = max(value for entry in entries for value in entry["target_variance"]["v"])
    low = min(drawn_only((value for entry in entries for value in [*entry["target_variance"]["x"], 1.0]), high))

    def panel(entry: Entry) -> Panel:
        def paint(axes: Axes) -> None:
            for prediction, variances in entry["target_variance"].items():
                shown = without_rounding(variances, high)
                axes.plot(range(1, len(shown) + 1), shown, **_target_style(prediction, len(shown)))
            axes.set_yscale("log")
            axes.set_ylim(low / 1.6, high * 1.6)
            plain_log(axes.yaxis, [low, high])
            axes.set_title(f"Target variance, patch {entry['patch_size']}")
            axes.set_xlabel("direction, largest first")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

        last = {prediction: number(values[-1]) for prediction, values in entry["target_variance"].items()}
        alt = (
            f"Variance of each target by direction, patch {entry['patch_size']}. In the smallest direction: "
            + listed([f"{SHORT_WORDS[prediction]} {value}" for prediction, value in last.items()])
        )
        return draw(paint, f"{alt}.")

    caption = (
        "How much of each target there is to predict in every direction (eq. 9). Noise has variance 1 everywhere. "
        "Velocity is the clean latent minus noise, so it never falls below that floor; the clean target follows the "
        "data down."
    )
    return Figure("What each target asks for", tuple(map(panel, entries)), caption, prediction_legend())


def _target_style(prediction: str, points: int) -> dict[str, Any]:
    return {
        "color": PREDICTION[prediction].light,
        "marker": palette.MARKER[prediction],
        "markersize": 4,
        "markevery": max(1, points // 8),
    }


def _shown_directions(entry: Entry) -> list[int]:
    """Return the columns of the tables to draw: the largest, the middle and the smallest direction."""
    count = len(entry["directions"])
    return sorted({0, count // 2, count - 1})


def _name_direction(entry: Entry, column: int) -> str:
    index = entry["directions"][column]
    lam = entry["eigenvalues"][index]
    variance = f"variance {number(lam, 2)}" if drawn_only([lam], entry["eigenvalues"][0]) else "no variance"
    return f"Direction {index + 1} of {entry['dimension']}: {variance}"


def _over_time(entry: Entry, quantity: str, column: int) -> dict[str, list[float]]:
    return {prediction: [row[column] for row in rows] for prediction, rows in entry[quantity].items()}


def _coefficient_figure(entry: Entry, times: list[float]) -> Figure:
    columns = _shown_directions(entry)
    curves = {column: _over_time(entry, "coefficient", column) for column in columns}
    reach = 1.15 * max(abs(value) for by_target in curves.values() for line in by_target.values() for value in line)

    def panel(column: int) -> Panel:
        def paint(axes: Axes) -> None:
            for prediction, line in curves[column].items():
                axes.plot(times, line, **_target_style(prediction, len(times)))
            axes.set_yscale("symlog", linthresh=1.0)
            axes.set_ylim(-reach, reach)
            ticks = [value for value in (-100, -10, -1, 0, 1, 10, 100) if abs(value) <= reach]
            axes.set_yticks(ticks, [f"{value:g}".replace("-", MINUS) for value in ticks])
            axes.yaxis.set_minor_locator(MaxNLocator(1))
            axes.axhline(0, color=MUTED.light, linewidth=0.8, zorder=1)
            axes.set_title(_name_direction(entry, column), fontsize=9.5)
            axes.set_xlabel("time t, from noise to data")

        last = [f"{SHORT_WORDS[name]} {number(line[-1], 2)}" for name, line in curves[column].items()]
        alt = f"{_name_direction(entry, column)}. Best coefficients at t = {times[-1]:g}: {listed(last)}."
        return draw(paint, alt, THIRD)

    caption = (
        "The factor that the best linear predictor applies to the noisy latent (eq. 10), for three directions at patch "
        f"{entry['patch_size']}. In directions with little variance the best clean prediction is to put out almost "
        f"nothing, while noise and velocity ask for a factor that grows like 1/(1 {MINUS} t). The vertical axis is "
        f"linear between {MINUS}1 and 1 and logarithmic beyond."
    )
    return Figure("The best linear coefficient over time", tuple(map(panel, columns)), caption, prediction_legend())


def _conditional_figure(entry: Entry, times: list[float]) -> Figure:
    columns = _shown_directions(entry)
    curves = {column: _over_time(entry, "conditional_variance", column) for column in columns}
    # Exact zeros (noise prediction at t = 0, directions without variance) have no place on a logarithmic axis.
    floor = 1e-4

    def panel(column: int) -> Panel:
        def paint(axes: Axes) -> None:
            for prediction, line in curves[column].items():
                shown = [value if value >= floor else float("nan") for value in line]
                axes.plot(times, shown, **_target_style(prediction, len(times)))
            axes.set_yscale("log")
            high = max(value for by_target in curves.values() for line in by_target.values() for value in line)
            axes.set_ylim(floor, max(2 * high, 10 * floor))
            plain_log(axes.yaxis, [floor, max(2 * high, 10 * floor)])
            axes.set_xlim(-0.03, 1.03)
            if all(value < floor for line in curves[column].values() for value in line):
                axes.annotate("nothing remains", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED.light)
            axes.set_title(_name_direction(entry, column), fontsize=9.5)
            axes.set_xlabel("time t, from noise to data")

        middle = len(times) // 2
        values = [f"{SHORT_WORDS[name]} {number(line[middle], 2)}" for name, line in curves[column].items()]
        alt = f"{_name_direction(entry, column)}. Conditional variance at t = {times[middle]:g}: {listed(values)}."
        return draw(paint, alt, THIRD)

    caption = (
        "The squared error that no predictor can avoid (eq. 11), each in the units of its own target. Read out as a "
        "velocity, all three are the same error: the targets differ in what a network must put out to reach it, not in "
        "what can be known. Values below 0.0001 are not drawn."
    )
    return Figure("The error that remains", tuple(map(panel, columns)), caption, prediction_legend())


def _capacity_figure(entries: list[Entry]) -> Figure:
    """Draw eq. 13: what each prediction loses with too few directions, and where it has enough."""
    stated = entries[0]["forecast"]["stated_share"]
    floor = stated / 50

    def panel(entry: Entry) -> Panel:
        forecast = entry["forecast"]
        needed = forecast["needed"][f"{stated:g}"]
        shares = [rank / entry["dimension"] for rank in forecast["ranks"]]

        def paint(axes: Axes) -> None:
            for prediction, curve in forecast["curves"].items():
                excess = [value / forecast["unavoidable_risk"] for value in curve]
                shown = [value if value >= floor else float("nan") for value in excess]
                axes.plot(shares, shown, **_target_style(prediction, len(shown)))
            axes.axhline(stated, color=MUTED.light, linewidth=1)
            axes.annotate(percent(stated), (0.0, stated), xytext=(3, 3), textcoords="offset points", fontsize=8.5,
                          color=MUTED.light)  # fmt: skip
            axes.set_yscale("log")
            highest = max(max(curve) for curve in forecast["curves"].values()) / forecast["unavoidable_risk"]
            axes.set_ylim(floor, 2 * max(highest, stated))
            axes.yaxis.set_major_formatter(FuncFormatter(_share_or_multiple))
            axes.set_title(f"Error beyond the unavoidable, patch {entry['patch_size']}")
            axes.set_xlabel("directions that the predictor has")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))

        told = [f"{SHORT_WORDS[name]} {number(value)}" for name, value in needed.items()]
        alt = (
            f"Excess velocity error against the rank of the predictor, patch {entry['patch_size']}. Directions needed, "
            f"of {entry['dimension']}, to come within {percent(stated)}: {listed(told)}."
        )
        return draw(paint, alt)

    caption = (
        "The capacity curves (eq. 13), averaged over the training times: how much larger the velocity error of the "
        "best predictor with so few directions is, in units of the error that nobody can avoid. Where a curve meets "
        f"the grey line, at {percent(stated)}, its prediction has what it needs."
    )
    return Figure("What each prediction needs", tuple(map(panel, entries)), caption, prediction_legend())


def _share_or_multiple(value: float, _: int | None) -> str:
    return f"{value:.0%}" if value < 1 else f"{value:g}x"


def _estimates_figure(entry: Entry, geometry: Mapping[str, Any]) -> Figure:
    """Draw the same space by other estimates: local ones, and the spectrum of whole latents."""
    tokens = {"tokens": entry["eigenvalues"], **{name: local["eigenvalues"] for name, local in entry["local"].items()}}
    stationary = geometry["stationary"]
    whole = {
        f"by frequency, {name}": (spectrum["ranks"], spectrum["eigenvalues"])
        for name, spectrum in stationary["spectra"].items()
    }
    leading = geometry["whole"]
    whole[f"leading directions ({leading['method']})"] = (range(len(leading["eigenvalues"])), leading["eigenvalues"])
    lines = [(None, None), (4, 2), (1, 1.5), (6, 2, 1, 2)]

    def curves(axes: Axes, spectra: Mapping[str, tuple[Any, list[float]]], dimension: int) -> None:
        largest = max(max(spectrum) for _, spectrum in spectra.values())
        for (name, (ranks, spectrum)), dashes in zip(spectra.items(), lines, strict=False):
            places, shown = [(rank + 1) / dimension for rank in ranks], without_rounding(spectrum, largest)
            axes.plot(places, shown, color=INK.light, dashes=dashes, label=name)
        axes.set_yscale("log")
        drawn = drawn_only((value for _, spectrum in spectra.values() for value in spectrum), largest)
        plain_log(axes.yaxis, [*drawn, 1.0])
        axes.legend(fontsize=8, frameon=False)
        _label_ranks(axes)

    def paint_tokens(axes: Axes) -> None:
        curves(axes, {name: (range(len(lam)), lam) for name, lam in tokens.items()}, entry["dimension"])
        axes.set_title(f"Tokens, patch {entry['patch_size']}")

    def paint_whole(axes: Axes) -> None:
        curves(axes, whole, stationary["dimension"])
        axes.set_title("Whole latents")

    shares = [f"{name} {percent(local['variance_share'])}" for name, local in entry["local"].items()]
    local = f" Of the variance of tokens, {listed(shares)} lie there." if shares else ""
    caption = (
        "The analysis is local: what counts is how latents vary among those that a network must tell apart. On the "
        "left the spectrum of tokens beside those within classes and among nearest neighbours. On the right whole "
        "latents, as if their positions were a torus, and their leading directions as they are."
    )
    panels = (
        draw(paint_tokens, f"Eigenvalue against rank by {listed(list(tokens))}.{local}"),
        draw(paint_whole, f"Eigenvalue against rank of whole latents, {stationary['dimension']:,} directions."),
    )
    return Figure("The same space by other estimates", panels, caption + local)
