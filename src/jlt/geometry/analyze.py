"""The target geometry of a latent store: spectra by several estimates, what eq. 9-13 say of them, and the advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from jlt.config import PREDICTIONS, TimestepConfig
from jlt.errors import JLTError
from jlt.geometry.covariance import TokenCovariance
from jlt.geometry.forecast import Estimate, TimeModel, forecast
from jlt.geometry.gaussian import (
    best_coefficient,
    conditional_variance,
    explained_power,
    target_variance,
)
from jlt.geometry.measure import Latents, Moments, measure_moments
from jlt.geometry.sample import NEIGHBOURS, direction_moments, neighbourhood_covariance
from jlt.geometry.spectrum import Spectrum, descending, eigenvalues_descending, sampling_error, summarise
from jlt.geometry.stationary import between_classes
from jlt.geometry.whole import LeadingSketch, gram_eigenvalues
from jlt.processes import Alone, of_first
from jlt.progress import say, track

SCHEMA = 2
TIMES = np.round(np.linspace(0.0, 0.98, 50), 2)
"""Times of the tables; 1 is left out because a direction without variance has no regression there."""
TABULATED_DIRECTIONS = 32
"""Directions in the tables over time, so that they stay small in a space of thousands; eigenvalues are kept whole."""
TABULATED_EIGENVALUES = 513
"""Eigenvalues that are kept of spectra of whole latents, at equal distances in rank."""
TOKEN_BATCH = 256
LARGE_ERROR = 0.1
"""Relative sampling error of an eigenvalue above which `analyze` warns."""
DEFAULT_TIMES = TimeModel(TimestepConfig(), 0.05)
DEFAULT_WIDTHS = (768,)


def analyze(
    store: Latents,
    patch_sizes: Sequence[int],
    widths: Sequence[int] = DEFAULT_WIDTHS,
    model: TimeModel = DEFAULT_TIMES,
    batch_size: int = 0,
) -> dict[str, Any]:
    """Measure a store in one pass, in this process, and return geometry.json (plain numbers, lists and dicts).

    `widths` are those of networks that the advice is for, `model` the training it is for. Raises JLTError for fewer
    than two latents, values that are not finite, latents without any variance, and a patch size that does not divide
    the grid; warns on stderr where there are too few latents for an estimate.
    """
    moments = measure_moments(store, patch_sizes, "cpu", Alone(), batch_size)
    return describe(of_first(moments), store.identity(), patch_sizes, widths, model)


def describe(
    moments: Moments,
    identity: dict[str, Any],
    patch_sizes: Sequence[int],
    widths: Sequence[int],
    model: TimeModel,
) -> dict[str, Any]:
    """Return geometry.json of what was seen of a store; see `analyze`."""
    _say_what_is_constant(moments)
    return {
        "schema": SCHEMA,
        "latents": identity,
        "times": TIMES.tolist(),
        "tokens": {str(p): describe_tokens(moments, p, widths, model) for p in dict.fromkeys(patch_sizes)},
        "stationary": _describe_stationary(moments),
        "whole": _describe_whole(moments),
    }


def _say_what_is_constant(moments: Moments) -> None:
    variance = next(iter(moments.tokens.values())).channel_variance
    constant = (variance <= variance.max() * torch.finfo(torch.float32).eps ** 2).nonzero().flatten().tolist()
    if 0 < len(constant) < len(variance):
        say(f"Channels {', '.join(map(str, constant))} are constant: they are directions without any variance.")


# ---- tokens ----


def describe_tokens(moments: Moments, patch_size: int, widths: Sequence[int], model: TimeModel) -> dict[str, Any]:
    """Return the entry of geometry.json for one patch size."""
    tokens = moments.tokens[patch_size]
    eigenvalues, basis = eigenbasis(tokens)
    if not eigenvalues.any():
        raise JLTError("All latents of the store are equal: there is no variance to analyse.")
    _warn_if_few(tokens)
    along = direction_moments(moments.sample.latents, patch_size, tokens.mean, basis)
    error = along.relative_spread / np.sqrt(tokens.images)
    estimates = [Estimate("tokens", eigenvalues, error), *_local_estimates(moments, patch_size)]
    return {
        "patch_size": patch_size,
        "dimension": tokens.dimension,
        "count": tokens.count,
        "images": tokens.images,
        "relative_sampling_error": float(np.median(error[error > 0])) if error.any() else 0.0,
        "relative_sampling_errors": error.tolist(),
        "mean": tokens.mean.tolist(),
        "eigenvalues": eigenvalues.tolist(),
        **asdict(summarise(eigenvalues)),
        "excess_kurtosis": along.excess_kurtosis.tolist(),
        "excess_kurtosis_error": along.excess_kurtosis_error.tolist(),
        "sample": len(moments.sample.latents),
        "channel_variance": tokens.channel_variance.tolist(),
        "local": {estimate.name: _describe_local(estimate, eigenvalues) for estimate in estimates[1:]},
        "target_variance": {name: target_variance(name, eigenvalues).tolist() for name in PREDICTIONS},
        **_tables_over_time(eigenvalues),
        "forecast": forecast(estimates, model, widths),
    }


def token_estimates(store: Latents, patch_sizes: Sequence[int], device: str) -> dict[int, Estimate]:
    """Return the spectra of a store's tokens alone, each eigenvalue with the error of as many Gaussian latents."""
    sums = {p: TokenCovariance(store.shape.channels, p, device) for p in patch_sizes}
    for start in track(range(0, len(store), TOKEN_BATCH), "spectra of the latents"):
        latents, _ = store.gather(np.arange(start, min(start + TOKEN_BATCH, len(store))))
        for tokens in sums.values():
            tokens.update(latents)
    return {p: _token_estimate(tokens) for p, tokens in sums.items()}


def _token_estimate(tokens: TokenCovariance) -> Estimate:
    eigenvalues, _ = eigenbasis(tokens)
    return Estimate("tokens", eigenvalues, np.full(len(eigenvalues), sampling_error(tokens.images)))


def eigenbasis(tokens: TokenCovariance) -> tuple[Spectrum, Tensor]:
    """Return eigenvalues, largest first, and their directions as columns."""
    values, vectors = torch.linalg.eigh(tokens.covariance)
    return descending(values.cpu().numpy()), vectors.flip(1)


def _local_estimates(moments: Moments, patch_size: int) -> list[Estimate]:
    """Return the spectra within classes and within neighbourhoods, where there are enough latents for them."""
    tokens, classes = moments.tokens[patch_size], moments.classes
    per_image, found = tokens.count // tokens.images, []
    if len(classes.counts) > 1 and classes.freedom >= len(classes.counts):
        within = (tokens.scatter - classes.between(patch_size, tokens.mean)) / (classes.freedom * per_image)
        found.append(_local_estimate("within classes", within, classes.freedom))
    elif len(classes.counts) > 1:
        say(
            f"{tokens.images} latents of {len(classes.counts)} classes are too few for a covariance within classes: "
            f"it needs {2 * len(classes.counts)}."
        )
    latents = moments.sample.latents
    if len(latents) >= 2 * (NEIGHBOURS + 1):
        local = neighbourhood_covariance(latents, patch_size)
        # As many independent differences as there are latents, at most: neighbourhoods overlap.
        found.append(_local_estimate("within neighbourhoods", local.covariance, len(latents)))
    return found


def _local_estimate(name: str, covariance: Tensor, independent: int) -> Estimate:
    eigenvalues = eigenvalues_descending(covariance.numpy(force=True))
    return Estimate(name, eigenvalues, np.full(len(eigenvalues), sampling_error(independent)))


def _describe_local(estimate: Estimate, whole: Spectrum) -> dict[str, Any]:
    summary = asdict(summarise(estimate.eigenvalues)) if estimate.eigenvalues.any() else {}
    return {
        "eigenvalues": estimate.eigenvalues.tolist(),
        "variance_share": float(estimate.eigenvalues.sum() / whole.sum()),
        "relative_sampling_error": float(estimate.relative_error[0]),
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


def _warn_if_few(tokens: TokenCovariance) -> None:
    where, error = f"Patch size {tokens.patch_size}, {tokens.images} images", sampling_error(tokens.images)
    if tokens.count <= tokens.dimension:
        say(
            f"{where}: {tokens.count} tokens cannot span {tokens.dimension} directions, so the smallest eigenvalues "
            "are 0 only for want of data; use more images."
        )
    elif error > LARGE_ERROR:
        say(f"{where}: an eigenvalue is known to about {error:.0%}; {round(2 / LARGE_ERROR**2)} images give 10%.")


# ---- whole latents ----


def _describe_stationary(moments: Moments) -> dict[str, Any]:
    """Return the spectrum by spatial frequency, of all latents and within classes."""
    stationary, classes = moments.stationary, moments.classes
    eigenvalues = stationary.eigenvalues()
    if stationary.images <= stationary.shape[0]:
        say(
            f"{stationary.images} latents cannot span {stationary.shape[0]} channels at each spatial frequency, so the "
            "smallest eigenvalues of the stationary spectrum are 0 only for want of data."
        )
    found = {"all": eigenvalues}
    if len(classes.counts) > 1 and classes.freedom >= len(classes.counts):
        within = stationary.scatter - between_classes(classes.means, classes.counts, stationary.mean)
        found["within classes"] = stationary.eigenvalues(within, classes.freedom)
    return {
        "relative_sampling_error": sampling_error(stationary.images),
        "dimension": len(eigenvalues),
        "spectra": {name: _thinned(spectrum) for name, spectrum in found.items()},
    }


def _thinned(spectrum: Spectrum) -> dict[str, Any]:
    ranks = np.unique(np.linspace(0, len(spectrum) - 1, TABULATED_EIGENVALUES).round().astype(np.int64))
    return {"ranks": ranks.tolist(), "eigenvalues": spectrum[ranks].tolist(), **asdict(summarise(spectrum))}


def _describe_whole(moments: Moments) -> dict[str, Any]:
    """Return the leading directions of whole latents, and how much variance the others have together."""
    whole, sample = moments.whole, moments.sample.latents
    dimension = math.prod(moments.stationary.shape)
    if isinstance(whole, TokenCovariance):
        method, total = "exact", float(whole.covariance.trace())
        leading = eigenvalues_descending(whole.covariance.numpy(force=True))[: min(dimension, whole.images - 1)]
    else:
        assert isinstance(whole, LeadingSketch)
        method, total = ("gram", whole.trace) if len(sample) == whole.images else ("sketch", whole.trace)
        leading = gram_eigenvalues(sample) if method == "gram" else whole.eigenvalues()
    leading = leading[:TABULATED_EIGENVALUES]
    return {
        "method": method,
        "dimension": dimension,
        "eigenvalues": leading.tolist(),
        "variance": total,
        "tail_variance": max(0.0, total - float(leading.sum())),
        "relative_sampling_error": sampling_error(whole.images),
    }
