"""The figures of geometry.json: the spectrum of the tokens, and what eq. 9-11 make of it for each target."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jlt.report import palette
from jlt.report.figures import THIRD, Figure, LegendEntry, Panel, draw, plain_log, prediction_legend
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
        _coefficient_figure(smallest, times),
        _conditional_figure(smallest, times),
    ]


def _spectrum_figure(entries: list[Entry]) -> Figure:
    def ranks(entry: Entry) -> list[float]:
        return [(index + 1) / entry["dimension"] for index in range(entry["dimension"])]

    def style(entry: Entry) -> dict[str, Any]:
        return {"color": INK.light, "dashes": palette.dashes(entry["patch_size"]) or (None, None)}

    positive = [lam for entry in entries for lam in entry["eigenvalues"] if lam > 0]

    def paint_spectrum(axes: Axes) -> None:
        for entry in entries:
            axes.plot(ranks(entry), [lam if lam > 0 else float("nan") for lam in entry["eigenvalues"]], **style(entry))
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
        f"about {percent(error)}, counting images as the independent samples."
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
    axes.margins(x=0.02)


def _target_figure(entries: list[Entry]) -> Figure:
    low = min(value for entry in entries for value in [*entry["target_variance"]["x"], 1.0] if value > 0)
    high = max(value for entry in entries for value in entry["target_variance"]["v"])

    def panel(entry: Entry) -> Panel:
        def paint(axes: Axes) -> None:
            for prediction, variances in entry["target_variance"].items():
                shown = [value if value > 0 else float("nan") for value in variances]
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
    return f"Direction {index + 1} of {entry['dimension']}: variance {number(entry['eigenvalues'][index], 2)}"


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
