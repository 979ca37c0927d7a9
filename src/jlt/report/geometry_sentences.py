"""What the geometry of latents means for the predictions, as sentences computed from its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from jlt.report.palette import SYMBOL, WORDS
from jlt.report.results import Study
from jlt.report.wording import listed, number, percent

TINY = 1e-12
"""Errors below this, of latents of about unit variance, are rounding."""


def geometry_verdict(tokens: Mapping[str, Any]) -> str:
    """Return in one sentence which prediction is expected to win at the smallest patch size."""
    smallest = min(tokens.values(), key=lambda entry: entry["patch_size"])
    where = f"At patch {smallest['patch_size']}"
    forecast = smallest["forecast"]
    if forecast["call"] == "undecided":
        return f"{where} it cannot be said from these latents which prediction wins."
    if forecast["call"] == "even":
        return f"{where} clean and velocity prediction need about as much: the choice should hardly matter."
    needed = forecast["needed"][f"{forecast['stated_share']:g}"]
    first, second = forecast["order"][:2]
    return (
        f"{where} {WORDS[first]} is expected to win: it needs {number(needed[first])} of {smallest['dimension']} "
        f"directions where {WORDS[second]} needs {number(needed[second])}."
    )


def geometry_sentence(entry: Mapping[str, Any]) -> str:
    """Say what a token spectrum means for the targets."""
    eigenvalues = entry["eigenvalues"]
    opening = (
        f"A token at patch {entry['patch_size']} has {entry['dimension']} directions, with variances from "
        f"{number(eigenvalues[0], 2)} down to {number(eigenvalues[-1], 2)} (effective rank "
        f"{number(entry['effective_rank'])})."
    )
    small = [lam for lam in eigenvalues if lam < 0.1]
    if not small:
        return f"{opening} None of them varies less than a tenth as much as the noise."
    of_velocity = (sum(small) + len(small)) / (sum(eigenvalues) + len(eigenvalues))
    plural = "directions vary" if len(small) > 1 else "direction varies"
    return (
        f"{opening} {len(small)} {plural} less than a tenth as much as the noise. They hold "
        f"{percent(sum(small) / sum(eigenvalues))} of the variance of x but {percent(of_velocity)} of that of v, "
        "which carries the noise there."
    )


def advice_sentences(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was advised before any training, for each patch size and width."""
    return [
        f"Advice at patch {entry['patch_size']}, for a width of {advice['width']}: {advice['words']}"
        for entry in entries
        for advice in entry["forecast"]["advice"]
    ]


def inside_sentences(inside: Mapping[str, Any]) -> list[str]:
    """Say, for every further network, how its error compares with that of the first, by the variance of directions."""
    texts = []
    times, first = inside["times"], inside["networks"][0]
    for network in inside["networks"][1:]:
        parts = []
        for mine, theirs in zip(network["bands"], first["bands"], strict=True):
            # An untrained network is silent, which has no error at all where there is no variance.
            ratios = [a / max(b, TINY) for a, b in zip(mine["error"], theirs["error"], strict=True)]
            place = max(range(len(times)), key=lambda index: abs(math.log(max(ratios[index], TINY))))
            parts.append(
                f"{number(median(ratios), 2)} times as large in {_directions(mine)} {mine['name']} "
                f"({number(ratios[place], 2)} times at t = {times[place]:g})"
            )
        texts.append(
            f"Of tokens at patch {inside['patch_size']} the velocity error of {_network_name(network)} is, against "
            f"that of {_network_name(first)} and as the median over times, {listed(parts)}."
        )
    return [*texts, *_against_optimum(inside["networks"])]


def _against_optimum(networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say how near networks come, where data vary least, to what a token by itself leaves unknown (eq. 11)."""
    told, lowest = [], networks[0]["bands"][0]
    for network in networks:
        band = network["bands"][0]
        optimum = [error - beyond for error, beyond in zip(band["error"], band["beyond_optimum"], strict=True)]
        if min(optimum) <= TINY:
            # Without any variance nothing is unknown, and whatever is put out is infinitely too much.
            return []
        ratio = median(error / best for error, best in zip(band["error"], optimum, strict=True))
        told.append(f"{_network_name(network)} errs {number(ratio, 2)} times as much")
    return [
        f"Against what a token by itself leaves unknown (eq. 11), in {_directions(lowest)} {lowest['name']} and as the "
        f"median over times, {listed(told)}."
    ]


def _directions(band: Mapping[str, Any]) -> str:
    return f"the {band['directions']} directions" if band["directions"] > 1 else "the one direction"


def _network_name(network: Mapping[str, Any]) -> str:
    return f"{network['run']} ({SYMBOL[network['prediction']]}, step {network['step']:,})"


def channels_sentence(study: Study) -> str:
    """Say that channel variances hide the anisotropy, empty where they do not span ten times less than the spectrum."""
    for entry in (study.geometry or {}).get("tokens", {}).values():
        channels, anisotropy = entry["channel_variance"], entry["anisotropy"]
        if min(channels) > 0 and (anisotropy is None or 10 * max(channels) / min(channels) < anisotropy):
            return (
                "Single channels span far less than directions do: the anisotropy lies across channels and positions."
            )
    return ""
