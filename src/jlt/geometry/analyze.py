"""The target geometry of a latent store: spectra by several estimates, what eq. 9-13 say of them, and the advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from jlt.config import PREDICTIONS
from jlt.errors import JLTError
from jlt.geometry.accumulate import Moments
from jlt.geometry.covariance import TokenCovariance
from jlt.geometry.forecast import Estimate, TrainingModel, forecast
from jlt.geometry.gaussian import (
    best_coefficient,
    conditional_variance,
    explained_power,
    target_variance,
)
from jlt.geometry.spectrum import Spectrum, eigenvalues_descending, sampling_error, summarise
from jlt.geometry.stationary import between_classes
from jlt.geometry.tokens import FEWEST, MeasuredTokens, measure_tokens
from jlt.geometry.whole import LeadingSketch, gram_eigenvalues
from jlt.runtime.progress import inform

TIMES = np.round(np.linspace(0.0, 0.98, 50), 2)
"""Times of the tables; 1 is left out because a direction without variance has no regression there."""
TABULATED_DIRECTIONS = 32
"""Directions in the tables over time, so that they stay small in a space of thousands; eigenvalues are kept whole."""
TABULATED_EIGENVALUES = 513
"""Eigenvalues that are kept of spectra of whole latents, at equal distances in rank."""
LARGE_ERROR = 0.1
"""Relative error of eigenvalues above which `jlt analyze` warns."""


def describe(
    moments: Moments,
    identity: dict[str, Any],
    patch_sizes: Sequence[int],
    widths: Sequence[int],
    model: TrainingModel,
) -> dict[str, Any]:
    """Return geometry.json (plain numbers, lists and dicts) of what was seen of a store, in units of the noise.

    `widths` are those of networks that the advice is for, `model` the training it is for. What there is to be warned
    of is said on stderr too. JLTError for latents without any variance.
    """
    if not _has_variance(moments):
        raise JLTError("All latents of the store are equal: there is no variance to analyse.")
    unit = model.noise_scale**2
    tokens = {p: measure_tokens(moments, p, unit) for p in dict.fromkeys(patch_sizes)}
    warnings = [*_constant_channels(moments), *_few_classes(moments)]
    for measured in tokens.values():
        warnings += [*_few_tokens(measured), *_dead_directions(measured)]
    warnings += _few_for_frequencies(moments)
    for warning in warnings:
        inform(warning)
    return {
        "latents": identity,
        "warnings": warnings,
        "times": TIMES.tolist(),
        "tokens": {str(p): describe_tokens(measured, widths, model) for p, measured in tokens.items()},
        "stationary": _describe_stationary(moments, unit),
        "whole": _describe_whole(moments, unit),
    }


def _has_variance(moments: Moments) -> bool:
    """Say whether latents differ from each other, by more than rounding."""
    stationary = moments.stationary
    varying = float(stationary.scatter.diagonal(dim1=1, dim2=2).real.sum())
    means = float(stationary.mean.abs().square().sum())
    return varying > (varying + stationary.images * means) * torch.finfo(torch.float64).eps * stationary.images


# ---- what there is to be warned of ----


def _constant_channels(moments: Moments) -> list[str]:
    variance = next(iter(moments.tokens.values())).channel_variance
    constant = (variance <= variance.max() * torch.finfo(torch.float32).eps ** 2).nonzero().flatten().tolist()
    if not 0 < len(constant) < len(variance):
        return []
    return [f"Channels without variance: {', '.join(map(str, constant))}. They are directions that velocity pays for."]


def _few_classes(moments: Moments) -> list[str]:
    classes, images = moments.classes, moments.stationary.images
    if len(classes.counts) == 1:
        return ["All latents are of one class, so that the spectrum within classes is that of all."]
    if classes.freedom < len(classes.counts):
        return [
            f"{images} latents of {len(classes.counts)} classes are too few for a covariance within classes: it needs "
            f"{2 * len(classes.counts)}."
        ]
    return []


def _few_tokens(measured: MeasuredTokens) -> list[str]:
    tokens, estimate = measured.tokens, measured.estimates[0]
    d, n = tokens.dimension, estimate.independent
    where, per_sample = f"Patch size {tokens.patch_size}, {tokens.images} latents", tokens.images / n
    enough = math.ceil(per_sample * max(2 / LARGE_ERROR**2, d / LARGE_ERROR))
    if tokens.images < FEWEST:
        return [f"{where}: there is no advice from so few; it needs {FEWEST}, and thousands are good."]
    if not estimate.enough:
        return [
            f"{where}: {tokens.count} tokens cannot span {d} directions, so that the smallest eigenvalues are 0 only "
            f"for want of data, and there is no advice. About {enough:,} latents give errors of {LARGE_ERROR:.0%}."
        ]
    if max(sampling_error(n), d / n) <= LARGE_ERROR:
        return []
    return [
        f"{where}: an eigenvalue is known to about {sampling_error(n):.0%}, and the smallest come out about "
        f"{d / n:.0%} too small. About {enough:,} latents give {LARGE_ERROR:.0%}."
    ]


def _dead_directions(measured: MeasuredTokens) -> list[str]:
    tokens, error = measured.tokens, measured.along.relative_spread
    dead = int((error == 0).sum())
    if not 0 < dead < len(error) or tokens.count <= tokens.dimension:
        return []
    return [
        f"Patch size {tokens.patch_size}: {dead} of {len(error)} directions have no variance at all, as grey images "
        "have in colour. Velocity has to put out noise there."
    ]


def _few_for_frequencies(moments: Moments) -> list[str]:
    images, channels = moments.stationary.images, moments.stationary.shape[0]
    if images > channels:
        return []
    return [
        f"{images} latents cannot span {channels} channels at each spatial frequency, so that the smallest eigenvalues "
        f"of the stationary spectrum are 0 only for want of data: it needs more than {channels}."
    ]


# ---- tokens ----


def describe_tokens(measured: MeasuredTokens, widths: Sequence[int], model: TrainingModel) -> dict[str, Any]:
    """Return the entry of geometry.json for one patch size."""
    tokens, along, (estimate, *local) = measured.tokens, measured.along, measured.estimates
    eigenvalues, error = estimate.eigenvalues, estimate.relative_error
    return {
        "patch_size": tokens.patch_size,
        "dimension": tokens.dimension,
        "count": tokens.count,
        "images": tokens.images,
        "independent_samples": estimate.independent,
        "relative_sampling_error": float(np.median(error[error > 0])) if error.any() else 0.0,
        "relative_sampling_errors": error.tolist(),
        "mean": tokens.mean.tolist(),
        "eigenvalues": eigenvalues.tolist(),
        **asdict(summarise(eigenvalues)),
        "excess_kurtosis": along.excess_kurtosis.tolist(),
        "excess_kurtosis_error": along.excess_kurtosis_error.tolist(),
        "sample": measured.sample,
        "channel_variance": measured.channel_variance.tolist(),
        "local": {found.name: _describe_local(found, eigenvalues) for found in local},
        "target_variance": {name: target_variance(name, eigenvalues).tolist() for name in PREDICTIONS},
        **_tables_over_time(eigenvalues),
        "forecast": forecast(measured.estimates, model, widths),
    }


def _describe_local(estimate: Estimate, whole: Spectrum) -> dict[str, Any]:
    summary = asdict(summarise(estimate.eigenvalues)) if estimate.eigenvalues.any() else {}
    return {
        "eigenvalues": estimate.eigenvalues.tolist(),
        "variance_share": float(estimate.eigenvalues.sum() / whole.sum()),
        "relative_sampling_errors": estimate.relative_error.tolist(),
        **summary,
    }


def _tables_over_time(eigenvalues: Float64[np.ndarray, " d"]) -> dict[str, Any]:
    """Return eq. 10-12 as T rows of k tabulated directions, and the indices of these among the eigenvalues."""
    directions = np.unique(np.linspace(0, len(eigenvalues) - 1, TABULATED_DIRECTIONS).round().astype(np.int64))
    lam, t = eigenvalues[directions], TIMES[:, None]
    quantities = {
        "coefficient": best_coefficient,
        "conditional_variance": conditional_variance,
        "explained_power": explained_power,
    }
    tables: dict[str, Any] = {
        name: {prediction: function(prediction, lam, t).tolist() for prediction in PREDICTIONS}
        for name, function in quantities.items()
    }
    return {"directions": directions.tolist(), **tables}


# ---- whole latents ----


def _describe_stationary(moments: Moments, unit: float) -> dict[str, Any]:
    """Return the spectrum by spatial frequency, of all latents and within classes.

    The error is that of frequencies with real coefficients; most have complex ones, of two numbers each.
    """
    stationary, classes = moments.stationary, moments.classes
    found = {"all": (stationary.eigenvalues(), stationary.images)}
    if len(classes.counts) > 1 and classes.freedom >= len(classes.counts):
        within = stationary.scatter - between_classes(classes.means, classes.counts, stationary.mean)
        found["within classes"] = (stationary.eigenvalues(within, classes.freedom), classes.freedom)
    return {
        "dimension": len(found["all"][0]),
        "spectra": {
            name: {**_thinned(spectrum / unit), "relative_sampling_error": sampling_error(independent)}
            for name, (spectrum, independent) in found.items()
        },
    }


def _thinned(spectrum: Spectrum) -> dict[str, Any]:
    ranks = np.unique(np.linspace(0, len(spectrum) - 1, TABULATED_EIGENVALUES).round().astype(np.int64))
    summary = asdict(summarise(spectrum)) if spectrum.any() else {}
    return {"ranks": ranks.tolist(), "eigenvalues": spectrum[ranks].tolist(), **summary}


def _describe_whole(moments: Moments, unit: float) -> dict[str, Any]:
    """Return the leading directions of whole latents, and how much variance the others have together."""
    whole, sample = moments.whole, moments.sample.latents
    dimension, summary = math.prod(moments.stationary.shape), {}
    if isinstance(whole, TokenCovariance):
        method, total = "exact", float(whole.covariance.trace())
        spectrum = eigenvalues_descending(whole.covariance.numpy(force=True)) / unit
        leading, summary = spectrum[: min(dimension, whole.images - 1)], asdict(summarise(spectrum))
    else:
        assert isinstance(whole, LeadingSketch)
        method, total = ("gram", whole.trace) if len(sample) == whole.images else ("sketch", whole.trace)
        leading = (gram_eigenvalues(sample) if method == "gram" else whole.eigenvalues()) / unit
    leading = leading[:TABULATED_EIGENVALUES]
    return {
        "method": method,
        "dimension": dimension,
        "eigenvalues": leading.tolist(),
        "variance": total / unit,
        "tail_variance": max(0.0, total / unit - float(leading.sum())),
        "relative_sampling_error": sampling_error(whole.images),
        **summary,
    }
