"""The numbers of geometry.json and inside.json as text: tables, the spectra of the slider, and sentences."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from statistics import median
from typing import Any

from jlt.report.palette import NAMES, SYMBOL, Names
from jlt.report.study import grouped
from jlt.report.wording import listed, number, percent
from jlt.results.geometry import (
    Advice,
    Band,
    CautionKind,
    ErrorByDirection,
    Geometry,
    NetworkError,
    StationarySpectrum,
    TokenForecast,
    TokenGeometry,
    WholeGeometry,
)

SLIDER_POINTS = 96
"""Directions of the spectrum that the slider moves, at equal distances in rank."""
TINY = 1e-12
"""Errors below this, of latents of about unit variance, are rounding."""
SMALL_LOAD = 0.02
"""Share of a network's width below which the needs of a prediction should make no difference."""
CLEARLY_FEWER = 0.8
"""Share of the directions of x below which a skip is recommended."""
SMALLEST_LOSS = 1e-4
"""Loss floors below this are not worth a sentence."""
TARGET = Names("the target {}", x="the clean latent", eps="noise", v="velocity")
CAUTIONS: dict[CautionKind, str] = {
    "constant_channels": "Channels without variance: {channels}. Velocity prediction has to output noise there.",
    "one_class": "All latents are of one class, so the spectrum within classes is that of all.",
    "few_for_classes": "{latents:.0f} latents of {classes:.0f} classes are too few for a covariance within classes: it "
    "needs twice as many latents as classes.",
    "few_latents": "there are too few for a forecast. It needs {fewest:.0f}, and a good one thousands.",
    "few_tokens": "{tokens:.0f} tokens cannot span {directions:.0f} directions, so the smallest eigenvalues are 0 only "
    "for lack of data, and there is no forecast. About {enough_latents:,.0f} latents give errors of {goal:.0%}.",
    "large_errors": "an eigenvalue is known to about {error:.0%}, and the smallest are about {smallest_bias:.0%} too "
    "small. About {enough_latents:,.0f} latents give {goal:.0%}.",
    "constant_directions": "{constant:.0f} of {directions:.0f} directions have no variance at all, as grey images have "
    "none in colour. Velocity prediction has to output noise there.",
    "few_for_frequencies": "{latents:.0f} latents cannot span {channels:.0f} channels at each spatial frequency, so "
    "the smallest eigenvalues of the stationary spectrum are 0 only for lack of data. It needs more latents.",
}
BANDS = {
    0.0: "with less than a hundredth of the noise's variance",
    0.01: "with a hundredth to a tenth of it",
    0.1: "with a tenth to all of it",
    1.0: "with more than the noise",
}
"""Bands of directions by their lower bound."""


def slider_spectra(geometry: Geometry) -> dict[int, tuple[list[float], list[float]]]:
    """Return, by patch size, eigenvalues at equal distances in rank, and each rank as a share of all."""
    found = {}
    for entry in geometry.tokens.values():
        last = len(entry.eigenvalues) - 1
        ranks = sorted({round(place * last / SLIDER_POINTS) for place in range(SLIDER_POINTS + 1)})
        eigenvalues = [float(f"{entry.eigenvalues[rank]:.6g}") for rank in ranks]
        found[entry.patch_size] = eigenvalues, [round(rank / max(1, last), 5) for rank in ranks]
    return found


def spectrum_rows(geometry: Geometry) -> list[list[str]]:
    """Return the summaries of the spectra: a row per quantity, its name before one text per patch size."""
    summaries = grouped(item for entry in geometry.tokens.values() for item in _summary(entry).items())
    return [[name, *texts] for name, texts in summaries.items()]


def _summary(entry: TokenGeometry) -> dict[str, str]:
    below = entry.share_below["0.1"]
    # Directions without variance have no kurtosis, and no error of it.
    kurtosis = zip(entry.excess_kurtosis, entry.excess_kurtosis_error, strict=True)
    span = dict.fromkeys([number(min(entry.channel_variance)), number(max(entry.channel_variance))])
    return {
        "Directions of a token": f"{entry.dimension:,}",
        "Tokens measured": f"{entry.count:,}",
        "Largest variance": number(entry.eigenvalues[0]),
        "Smallest variance": number(entry.eigenvalues[-1]),
        "Largest over smallest": "infinite, to rounding" if entry.anisotropy is None else number(entry.anisotropy),
        "Effective rank": number(entry.effective_rank),
        "Participation ratio": number(entry.participation_ratio),
        "Sphericity": number(entry.sphericity, 2),
        "Directions below 0.1": f"{below.directions:,}",
        "their share of the variance": percent(below.variance_share),
        "Variances of single channels": " to ".join(span),
        **{f"Variance {name}": percent(local.variance_share) for name, local in entry.local.items()},
        "Excess kurtosis, median direction": number(median([k for k, error in kurtosis if error > 0] or [0.0]), 2),
    }


def whole_rows(geometry: Geometry) -> list[tuple[str, ...]]:
    """Return the summaries of whole latents: estimate, directions, effective rank, participation, share below 0.1."""
    whole = geometry.whole
    summaries: dict[str, StationarySpectrum | WholeGeometry] = {
        f"by spatial frequency, {name}": spectrum for name, spectrum in geometry.stationary.spectra.items()
    }
    return [
        (
            name,
            f"{whole.dimension:,}",
            number(summary.effective_rank),
            number(summary.participation_ratio),
            f"{summary.share_below['0.1'].directions:,}",
            percent(summary.share_below["0.1"].variance_share),
            percent(summary.relative_sampling_error),
        )
        for name, summary in {**summaries, "their covariance": whole}.items()
        if summary.effective_rank is not None
    ]


def analyze_command(geometry: Geometry, inside: ErrorByDirection | None) -> str:
    """Return the command that measures a geometry and its networks again; the reader fills in the folders."""
    training, times = geometry.training, geometry.training.timesteps
    options: dict[str, Sequence[object]] = {
        "patch-size": [*geometry.tokens],
        "width": geometry.widths,
        "distribution": [times.distribution],
        "P-mean": [times.P_mean],
        "P-std": [times.P_std],
        "shift": [times.shift],
        "t-eps": [training.t_eps],
        "loss-space": [training.loss_space],
        "noise-scale": [training.noise_scale],
    }
    if inside:
        options |= {"checkpoint": [network.run for network in inside.networks], "num": [inside.count]}
        emas = {network.ema for network in inside.networks}
        options |= {"ema": [*emas]} if len(emas) == 1 else {}
        if samples := inside.networks[0].samples:
            options |= {"samples": [samples.count], "steps": [samples.steps]}
    arguments = [f"--{name} {shlex.join(map(str, values))}" for name, values in options.items()]
    return f"jlt analyze --latents LATENTS --out OUT {' '.join(arguments)}"


def caution_sentences(geometry: Geometry) -> list[str]:
    """Return the reasons to trust a geometry less."""
    texts = [*geometry.warnings]
    for caution in geometry.cautions:
        where = "Patch size {patch_size:.0f}, {latents:.0f} latents: " if "patch_size" in caution.numbers else ""
        values: dict[str, Any] = {"channels": listed([*map(str, caution.channels)]), **caution.numbers}
        texts.append((where + CAUTIONS[caution.kind]).format(**values))
    return texts


def geometry_verdict(geometry: Geometry) -> str:
    """Return in one sentence which prediction is expected to win at the smallest patch size."""
    smallest = geometry.tokens[min(geometry.tokens)]
    forecast, where = smallest.forecast, f"At patch {smallest.patch_size}"
    if forecast.call == "undecided":
        return f"{where} these latents do not decide which prediction wins."
    if forecast.call == "even":
        return f"{where} clean and velocity prediction need about as much: the choice should hardly matter."
    needed, (first, second) = forecast.needed_directions, forecast.order[:2]
    needs = (
        f"it needs {number(needed[first])} of {smallest.dimension} directions where {NAMES[second]} needs "
        f"{number(needed[second])}"
    )
    wide = [advice.width for advice in forecast.advice if advice.width_share[second] < SMALL_LOAD]
    if len(wide) == len(forecast.advice):
        widths = f"a network of width {wide[0]} is" if len(wide) == 1 else f"networks of width {min(wide)} and more are"
        return f"{where} {NAMES[first]} comes first, but {widths} wide enough for either: {needs}."
    narrow = f" in networks of width {listed([str(a.width) for a in forecast.advice if a.width not in wide])}"
    return f"{where} {NAMES[first]} is expected to win{narrow if wide else ''}: {needs}."


def spectrum_sentence(entry: TokenGeometry) -> str:
    """Say what a token spectrum means for the targets."""
    eigenvalues = entry.eigenvalues
    opening = (
        f"A token at patch {entry.patch_size} has {entry.dimension} directions, with variances from "
        f"{number(eigenvalues[0], 2)} down to {number(eigenvalues[-1], 2)} (effective rank "
        f"{number(entry.effective_rank)})."
    )
    small = [lam for lam in eigenvalues if lam < 0.1]
    if not small:
        return f"{opening} None of them varies less than a tenth as much as the noise."
    of_velocity = (sum(small) + len(small)) / (sum(eigenvalues) + len(eigenvalues))
    return (
        f"{opening} {len(small)} {'directions vary' if len(small) > 1 else 'direction varies'} less than a tenth as "
        f"much as the noise. They hold {percent(sum(small) / sum(eigenvalues))} of the variance of x but "
        f"{percent(of_velocity)} of that of v, which carries the noise there."
    )


def advice_sentences(geometry: Geometry) -> list[str]:
    """Return the advice for each patch size and width."""
    return [
        f"Patch {entry.patch_size}, width {advice.width}: {_advice(entry, advice)}"
        for entry in geometry.tokens.values()
        for advice in entry.forecast.advice
    ]


def _advice(entry: TokenGeometry, advice: Advice) -> str:
    """Return what a forecast means for networks of a width."""
    forecast, width = entry.forecast, advice.width
    ranks = {name: forecast.needed_directions[name] for name in forecast.order}
    needed = [f"{f'{rank:,.0f}' if rank >= 100 else f'{rank:.3g}'} for {TARGET[name]}" for name, rank in ranks.items()]
    shares = [f"{advice.width_share[name]:.0%}" for name in forecast.order]
    texts = [
        _outcome(forecast, advice),
        f"Of {entry.dimension} directions, an error within {forecast.stated_share:.0%} of the unavoidable one needs "
        f"{listed(needed)}. That is {listed(shares)} of a width of {width}.",
    ]
    if forecast.skip and forecast.skip_directions is not None:
        fewer = forecast.skip_directions < CLEARLY_FEWER * forecast.needed_directions["x"]
        texts.append(
            f"Of the targets skip=S up to 1.5, {forecast.skip:g} needs the fewest: {number(forecast.skip_directions)}."
            if fewer
            else "No target skip=S up to 1.5 needs clearly fewer than the clean latent."
        )
    if width < entry.dimension:
        floors = [
            f"{floor:.2g} for {TARGET[name]}"
            for name in forecast.order
            if (floor := advice.loss_floor[name]) >= SMALLEST_LOSS
        ]
        above = f": its loss stays above {listed(floors)}" if floors else ""
        texts.append(f"No network of width {width} can output {entry.dimension} directions{above}.")
    return " ".join(texts)


def _outcome(forecast: TokenForecast, advice: Advice) -> str:
    """Return the expected winner and the confidence."""
    first, second = forecast.order[:2]
    agree = f"{forecast.confidence:.0%} of {forecast.variations} variations of the model"
    if forecast.call == "even" and forecast.outcome == "even":
        return f"Clean and velocity prediction need about as much (in {agree}): the choice should hardly matter."
    if forecast.call == "even":
        return "The space is nearly isotropic: the choice between clean and velocity should hardly matter."
    if not forecast.enough:
        return "There are too few latents to decide which prediction wins."
    if forecast.call == "undecided":
        return f"The model does not decide which prediction wins: {first} comes first, but only in {agree}."
    wide = " The network is wide for this space, so the difference may be small."
    return (
        f"Predict {first} ({TARGET[first]}): it needs the fewest directions in {agree}. "
        "That is the confidence of the model, not evidence that the model is right."
        f"{wide if advice.width_share[second] < SMALL_LOAD else ''}"
    )


def channels_sentence(geometry: Geometry) -> str:
    """Say that channel variances hide the anisotropy, empty where they do not span ten times less than the spectrum."""
    for entry in geometry.tokens.values():
        channels, anisotropy = entry.channel_variance, entry.anisotropy
        if min(channels) > 0 and (anisotropy is None or 10 * max(channels) / min(channels) < anisotropy):
            return "Single channels span far less than directions do: the anisotropy is across channels and positions."
    return ""


def inside_sentences(inside: ErrorByDirection) -> list[str]:
    """Compare the error of every further network with that of the first, by the variance of directions."""
    first, texts = inside.networks[0], []
    for network in inside.networks[1:]:
        parts = []
        for mine, theirs in zip(network.bands, first.bands, strict=True):
            # An untrained network outputs 0, which has no error at all where there is no variance.
            ratios = [a / max(b, TINY) for a, b in zip(mine.error, theirs.error, strict=True)]
            ratio, t = max(zip(ratios, inside.times, strict=True), key=lambda pair: abs(math.log(max(pair[0], TINY))))
            typical = number(median(ratios), 2)
            parts.append(f"{typical} times as large in {_directions(mine)} ({number(ratio, 2)} times at t = {t:g})")
        texts.append(
            f"Of tokens at patch {inside.patch_size} the velocity error of {_network(network)} is, against that of "
            f"{_network(first)} and as the median over times, {listed(parts)}."
        )
    return [*texts, *_against_optimum(inside.networks), *_sample_sentences(inside)]


def _against_optimum(networks: Sequence[NetworkError]) -> list[str]:
    """Compare networks, where data vary least, with the error that a token by itself leaves unknown (eq. 11)."""
    parts = []
    for network in networks:
        band = network.bands[0]
        optimum = [error - beyond for error, beyond in zip(band.error, band.beyond_optimum, strict=True)]
        if min(optimum) <= TINY:
            # Without any variance nothing is unknown, and any output is infinitely too much.
            return []
        ratio = median(error / best for error, best in zip(band.error, optimum, strict=True))
        parts.append(f"{number(ratio, 2)} times as large for {_network(network)}")
    return [
        f"Against what a token by itself leaves unknown (eq. 11), the error in {_directions(networks[0].bands[0])} is, "
        f"as the median over times, {listed(parts)}."
    ]


def _sample_sentences(inside: ErrorByDirection) -> list[str]:
    """State how much the samples of each network vary against the data, in all and in the bands of directions."""
    texts = []
    for network in inside.networks:
        if network.samples is None:
            continue
        ratios = network.samples.spread[-1]
        parts = [
            f"{number(_weighted(ratios, inside.eigenvalues, part), 3)} times in directions of {band_title(band)}"
            for band, part in zip(network.bands, band_slices(network.bands), strict=True)
        ]
        whole = number(_weighted(ratios, inside.eigenvalues, slice(None)), 3)
        texts.append(
            f"Samples of {network.run} have {whole} times the variance of the data: {listed(parts)}. At the highest "
            f"spatial frequency they have {number(network.samples.by_frequency[-1], 3)} times its variance."
        )
    return texts


def _weighted(ratios: Sequence[float], eigenvalues: Sequence[float], part: slice) -> float:
    """Return the variance of samples over that of data, in some directions together."""
    lam = eigenvalues[part]
    total = sum(lam)
    return sum(ratio * one for ratio, one in zip(ratios[part], lam, strict=True)) / total if total else 0.0


def band_slices(bands: Sequence[Band]) -> list[slice]:
    """Return the directions of each band; eigenvalues fall, and bands are listed from the smallest variance up."""
    ends = [sum(band.directions for band in bands[place:]) for place in range(len(bands) + 1)]
    return [slice(ends[place + 1], ends[place]) for place in range(len(bands))]


def band_title(band: Band) -> str:
    """Return the variances of a band in units of the noise's: variance 0.1 to 1, or variance above 1."""
    return f"variance above {band.low:g}" if band.high is None else f"variance {band.low:g} to {band.high:g}"


def _directions(band: Band) -> str:
    count = f"the {band.directions} directions" if band.directions > 1 else "the one direction"
    return f"{count} {band.name or BANDS[band.low]}"


def _network(network: NetworkError) -> str:
    return f"{network.run} ({SYMBOL[network.prediction]}, step {network.step:,})"
