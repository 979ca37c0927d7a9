"""The numbers of geometry.json as a page and a terminal show them: rows of tables, and the slider's spectra."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from jlt.report.palette import SYMBOL
from jlt.report.wording import number, percent
from jlt.results.geometry import ErrorByDirection, Geometry, StationarySpectrum, WholeGeometry

SLIDER_POINTS = 96
"""Directions of the spectrum that the slider moves, at equal distances in rank."""


class SliderSpectrum(NamedTuple):
    """Eigenvalues of one patch size at equal distances in rank, and each rank as a share of all."""

    patch_size: int
    eigenvalues: list[float]
    shares: list[float]


def slider_spectra(geometry: Geometry) -> list[SliderSpectrum]:
    """Return the spectrum that the slider moves, for every patch size."""
    found = []
    for entry in geometry.tokens.values():
        last = len(entry.eigenvalues) - 1
        ranks = sorted({round(place * last / SLIDER_POINTS) for place in range(SLIDER_POINTS + 1)})
        eigenvalues = [float(f"{entry.eigenvalues[rank]:.6g}") for rank in ranks]
        found.append(SliderSpectrum(entry.patch_size, eigenvalues, [round(rank / max(1, last), 5) for rank in ranks]))
    return found


def spectrum_rows(geometry: Geometry) -> dict[str, list[str]]:
    """Return the summaries of the spectra: one row per quantity, one text per patch size."""
    rows: dict[str, list[str]] = {}
    for entry in geometry.tokens.values():
        below = entry.share_below["0.1"]
        # Directions without variance have no kurtosis, and no error of it.
        kurtosis = zip(entry.excess_kurtosis, entry.excess_kurtosis_error, strict=True)
        span = dict.fromkeys([number(min(entry.channel_variance)), number(max(entry.channel_variance))])
        summary = {
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
        for name, text in summary.items():
            rows.setdefault(name, []).append(text)
    return rows


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


def advised_training(geometry: Geometry) -> str:
    """Say which training the advice is for."""
    training, times = geometry.training, geometry.training.timesteps
    uniform = times.distribution == "uniform"
    drawn = "uniform" if uniform else f"logit-normal ({times.P_mean:g}, {times.P_std:g})"
    shift = f", shifted by {times.shift:g}" if times.shift != 1 else ""
    return (
        f"The forecast and the advice are for a training with {drawn} times{shift} and a matched loss in "
        f"{SYMBOL[training.loss_space]}-space, clamped at {training.t_eps:g}."
    )


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
    arguments = [f"--{name} {shlex.join(map(str, values))}" for name, values in options.items()]
    return f"jlt analyze --latents LATENTS --out OUT {' '.join(arguments)}"
