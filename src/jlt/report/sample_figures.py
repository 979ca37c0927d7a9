"""The figures of inside.json on samples: their spectrum, the states on the way, and what a decoder shows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from matplotlib.axes import Axes

from jlt.report import palette
from jlt.report.figures import HALF, THIRD, Figure, Panel, draw
from jlt.report.geometry_figures import LINES, network_legend, repeats_of
from jlt.report.geometry_text import band_slices, band_title
from jlt.report.palette import INK, MUTED, PREDICTION
from jlt.report.wording import listed, number
from jlt.results.geometry import ErrorByDirection, NetworkError, SampleSpectrum, Values


def sample_spectrum_figures(inside: ErrorByDirection) -> list[Figure]:
    """Draw the spectra of samples, the spread of states by time, the calibration and the decoder's sensitivity."""
    networks = [network for network in inside.networks if network.samples]
    if not networks:
        return []
    legend = network_legend(networks)
    samples = [samples_of(network) for network in networks]
    bands = list(zip(networks[0].bands, band_slices(networks[0].bands), strict=True))
    size = HALF if len(bands) < 3 else THIRD
    panel, first = partial(_panel, networks, size=size), samples[0]
    by_direction, by_frequency = [one.spread[-1] for one in samples], [one.by_frequency for one in samples]
    spectra = (
        panel("By direction", range(1, len(by_direction[0]) + 1), by_direction, "direction, largest first", size=HALF),
        panel("By spatial frequency", range(len(by_frequency[0])), by_frequency, "whole cycles per latent", size=HALF),
    )
    spread = tuple(
        panel(band_title(band), first.times, [_means(one.spread, part) for one in samples]) for band, part in bands
    )
    calibration = tuple(
        panel(band_title(band), inside.times, [_means(one.calibration, part) for one in networks])
        for band, part in bands
    )
    drawn = f"{first.count:,} samples of each network ({first.steps}-step Heun, no guidance)"
    return [
        Figure(
            "Samples against the data", spectra, f"Variance of {drawn} over that of the data. 1 is the data.", legend
        ),
        Figure(
            "The states on the way",
            spread,
            f"Variance of the states of {drawn} over that of the path at the same time, the mean over directions.",
            legend,
        ),
        Figure(
            "The calibration of the velocity",
            calibration,
            "Slope of the true velocity on the network's, on the data's own path, the mean over directions. A "
            "conditional mean has 1. Above 1 the outputs are too small; below 1 they contain errors that the data do "
            "not explain.",
            legend,
        ),
        *_decoder_figure(inside),
    ]


def samples_of(network: NetworkError) -> SampleSpectrum:
    """Return the samples of a network that has some; ValueError otherwise."""
    if network.samples is None:
        raise ValueError("no samples were drawn of this network")
    return network.samples


def _means(table: Sequence[Values], part: slice) -> list[float]:
    return [fmean(row[part]) for row in table]


def _panel(
    networks: Sequence[NetworkError],
    title: str,
    x: Sequence[float],
    curves: Sequence[Sequence[float]],
    against: str = "time t, from noise to data",
    *,
    size: tuple[float, float],
) -> Panel:
    """Draw a ratio of every network, and a line at 1."""

    def paint(axes: Axes) -> None:
        axes.axhline(1, color=MUTED.light, linewidth=1)
        for network, curve, before in zip(networks, curves, repeats_of(networks), strict=True):
            colour, marker = PREDICTION[network.prediction].light, palette.MARKER[network.prediction]
            axes.plot(
                x, curve, color=colour, dashes=LINES[before % 3], marker=marker, markersize=4,
                markevery=max(1, len(x) // 8),
            )  # fmt: skip
        axes.set(title=title, xlabel=against)

    ends = [f"{network.run} {number(curve[-1], 3)}" for network, curve in zip(networks, curves, strict=True)]
    return draw(paint, f"{title}, at the right end: {listed(ends)}.", size)


def _decoder_figure(inside: ErrorByDirection) -> list[Figure]:
    """Draw how much images change with each direction."""
    decoder = inside.decoder
    if decoder is None:
        return []
    ranks = [direction + 1 for direction in decoder.directions]
    shares = [inside.eigenvalues[place] * one for place, one in zip(decoder.directions, decoder.change, strict=True)]

    def paint(values: Sequence[float], title: str, axes: Axes) -> None:
        axes.plot(ranks, values, color=INK.light, marker="o", markersize=3)
        axes.set(title=title, xlabel="direction, largest first")
        axes.set_ylim(bottom=0)

    panels = tuple(
        draw(partial(paint, values, title), f"{title}: {number(values[0], 2)} in the first direction, "
             f"{number(values[-1], 2)} in the last.", HALF)
        for values, title in ((decoder.change, "Per unit of variance"), (shares, "Per variance of the data"))
    )  # fmt: skip
    caption = (
        "Mean squared change of a pixel (from -1 to 1) when small noise is added along a direction in every token, "
        "extrapolated linearly to variance 1 and to the variance of the data."
    )
    return [Figure("What the decoder shows of a direction", panels, caption)]
