"""The numbers of geometry.json as a page and a terminal show them: rows of tables, the slider's spectra, sentences."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from statistics import median
from typing import Any

from jlt.report.palette import SYMBOL
from jlt.report.study import Study
from jlt.report.wording import number, percent

SLIDER_POINTS = 96
"""Directions of the spectrum that the slider moves, at equal distances in rank."""


def slider_spectra(geometry: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return, for every patch size, eigenvalues at equal distances in rank, and each rank as a share of all."""
    found = []
    for entry in (geometry or {}).get("tokens", {}).values():
        last = len(entry["eigenvalues"]) - 1
        ranks = sorted({round(place * last / SLIDER_POINTS) for place in range(SLIDER_POINTS + 1)})
        eigenvalues = [float(f"{entry['eigenvalues'][rank]:.6g}") for rank in ranks]
        shares = [round(rank / max(1, last), 5) for rank in ranks]
        found.append({"patch_size": entry["patch_size"], "eigenvalues": eigenvalues, "shares": shares})
    return found


def spectrum_rows(study: Study) -> dict[str, list[str]]:
    """Return the summaries of the spectra: one row per quantity, one text per patch size."""
    rows: dict[str, list[str]] = {}
    for entry in (study.geometry or {}).get("tokens", {}).values():
        below, channels = entry["share_below"]["0.1"], entry["channel_variance"]
        span = dict.fromkeys([number(min(channels)), number(max(channels))])
        summary = {
            "Directions of a token": f"{entry['dimension']:,}",
            "Tokens measured": f"{entry['count']:,}",
            "Largest variance": number(entry["eigenvalues"][0]),
            "Smallest variance": number(entry["eigenvalues"][-1]),
            "Largest over smallest": "infinite, to rounding"
            if entry["anisotropy"] is None
            else number(entry["anisotropy"]),
            "Effective rank": number(entry["effective_rank"]),
            "Participation ratio": number(entry["participation_ratio"]),
            "Sphericity": number(entry["sphericity"], 2),
            "Directions below 0.1": f"{below['directions']:,}",
            "their share of the variance": percent(below["variance_share"]),
            "Variances of single channels": " to ".join(span),
            **{f"Variance {name}": percent(local["variance_share"]) for name, local in entry["local"].items()},
            "Excess kurtosis, median direction": number(_median_kurtosis(entry), 2),
        }
        for name, text in summary.items():
            rows.setdefault(name, []).append(text)
    return rows


def _median_kurtosis(entry: Mapping[str, Any]) -> float | None:
    """Return the median over the directions that have a shape at all."""
    known = zip(entry["excess_kurtosis"], entry["excess_kurtosis_error"], strict=True)
    return median([value for value, error in known if error > 0] or [0.0])


def whole_rows(geometry: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the summaries of whole latents: estimate, directions, effective rank, participation, share below 0.1."""
    stationary, whole = geometry["stationary"], geometry["whole"]
    summaries = {f"by spatial frequency, {name}": entry for name, entry in stationary["spectra"].items()}
    if "effective_rank" in whole:
        summaries["their covariance"] = whole
    return [
        (
            name,
            f"{stationary['dimension']:,}",
            number(entry["effective_rank"]),
            number(entry["participation_ratio"]),
            f"{entry['share_below']['0.1']['directions']:,}",
            percent(entry["share_below"]["0.1"]["variance_share"]),
            percent(entry["relative_sampling_error"]),
        )
        for name, entry in summaries.items()
        if "effective_rank" in entry
    ]


def advised_training(study: Study) -> str:
    """Say for which training the advice is; empty where there is no geometry."""
    if study.geometry is None:
        return ""
    training = study.geometry["training"]
    times = training["timesteps"]
    drawn = (
        "uniform" if times["distribution"] == "uniform" else f"logit-normal ({times['P_mean']:g}, {times['P_std']:g})"
    )
    shift = f", shifted by {times['shift']:g}" if times["shift"] != 1 else ""
    loss = f"a matched loss in {SYMBOL[training['loss_space']]}-space, clamped at {training['t_eps']:g}"
    return f"What is needed and advised is for a training with {drawn} times{shift} and {loss}."


def analyze_command(geometry: Mapping[str, Any], inside: Mapping[str, Any] | None) -> str:
    """Return the words that measure a geometry again and look into its networks; the reader names the folders."""
    training = geometry["training"]
    options: dict[str, Any] = {
        "patch-size": list(geometry["tokens"]),
        "width": geometry["widths"],
        **{name: training["timesteps"][name] for name in ("distribution", "P_mean", "P_std", "shift")},
        **{name: training[name] for name in ("t_eps", "loss_space", "noise_scale")},
    }
    if inside:
        networks = inside["networks"]
        options |= {"checkpoint": [network["run"] for network in networks], "num": inside["count"]}
        options |= {"ema": networks[0]["ema"]} if len({network["ema"] for network in networks}) == 1 else {}
    told = [
        f"--{name.replace('_', '-')} {shlex.join(map(str, value if isinstance(value, list) else [value]))}"
        for name, value in options.items()
    ]
    return f"jlt analyze --latents LATENTS --out OUT {' '.join(told)}"
