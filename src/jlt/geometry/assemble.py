"""geometry.json from the moments of a latent store: spectra by several estimates, eq. 9-13 on them, and cautions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64

from jlt.config import PREDICTIONS, Prediction
from jlt.errors import JLTError
from jlt.geometry.accumulate import Moments
from jlt.geometry.covariance import TokenCovariance, gram_eigenvalues
from jlt.geometry.forecast import Estimate, forecast
from jlt.geometry.gaussian import Array, best_coefficient, conditional_variance, explained_power, target_variance
from jlt.geometry.spectrum import Spectrum, eigenvalues_descending, sampling_error, summarise, tabulated_ranks
from jlt.geometry.tokens import MIN_LATENTS, MeasuredTokens, measure_tokens
from jlt.results.geometry import (
    Caution,
    Geometry,
    LocalSpectrum,
    StationaryGeometry,
    StationarySpectrum,
    Table,
    TokenGeometry,
    TrainingModel,
    WholeGeometry,
)

TABULATED_TIMES = np.round(np.linspace(0.0, 0.98, 50), 2)
"""Times of the tables; 1 is left out because a direction without variance has no regression there."""
TABULATED_DIRECTIONS = 32
"""Directions in the tables over time, so that they stay small in a space of thousands; eigenvalues are kept whole."""
TABULATED_EIGENVALUES = 513
"""Eigenvalues that are kept of spectra of whole latents, at equal distances in rank."""
LARGE_ERROR = 0.1
"""Relative error of eigenvalues above which there is a caution."""


def assemble_geometry(
    moments: Moments, identity: dict[str, Any], patch_sizes: Sequence[int], widths: Sequence[int], model: TrainingModel
) -> Geometry:
    """Return the geometry of a store with this identity, for networks of some widths trained as `model` says.

    JLTError for latents without any variance.
    """
    if not _has_variance(moments):
        raise JLTError("All latents of the store are equal: there is no variance to analyse.")
    unit = model.noise_scale**2
    measured = {p: measure_tokens(moments, p, unit) for p in dict.fromkeys(patch_sizes)}
    return Geometry(
        latents=identity,
        patch_sizes=tuple(patch_sizes),
        widths=tuple(widths),
        training=model,
        times=tuple(TABULATED_TIMES.tolist()),
        tokens={p: _token_geometry(tokens, moments, widths, model) for p, tokens in measured.items()},
        stationary=_stationary(moments, unit),
        whole=_whole(moments, unit),
        cautions=tuple(_cautions(moments, measured.values())),
    )


def _has_variance(moments: Moments) -> bool:
    """Return whether latents differ from each other by more than rounding."""
    stationary = moments.stationary
    varying = float(stationary.scatter.diagonal(dim1=1, dim2=2).real.sum())
    means = float(stationary.mean.abs().square().sum())
    return varying > (varying + stationary.images * means) * torch.finfo(torch.float64).eps * stationary.images


def _token_geometry(
    measured: MeasuredTokens, moments: Moments, widths: Sequence[int], model: TrainingModel
) -> TokenGeometry:
    tokens, along, (estimate, *local) = measured.tokens, measured.along, measured.estimates
    eigenvalues, error = estimate.eigenvalues, estimate.relative_error
    directions = tabulated_ranks(len(eigenvalues), TABULATED_DIRECTIONS)
    tabulated = eigenvalues[directions]
    return TokenGeometry(
        patch_size=tokens.patch_size,
        dimension=tokens.dimension,
        count=tokens.count,
        images=tokens.images,
        independent_samples=estimate.independent,
        relative_sampling_error=float(np.median(error[error > 0])) if error.any() else 0.0,
        relative_sampling_errors=tuple(error.tolist()),
        mean=tuple(tokens.mean.tolist()),
        eigenvalues=tuple(eigenvalues.tolist()),
        **vars(summarise(eigenvalues)),
        excess_kurtosis=tuple(along.excess_kurtosis.tolist()),
        excess_kurtosis_error=tuple(along.excess_kurtosis_error.tolist()),
        sample=len(moments.sample.latents),
        channel_variance=tuple((tokens.channel_variance.numpy(force=True) / model.noise_scale**2).tolist()),
        local={found.name: _local_spectrum(found, eigenvalues) for found in local},
        target_variance={name: tuple(target_variance(name, eigenvalues).tolist()) for name in PREDICTIONS},
        directions=tuple(directions.tolist()),
        coefficient=_over_time(best_coefficient, tabulated, model),
        conditional_variance=_over_time(conditional_variance, tabulated, model),
        explained_power=_over_time(explained_power, tabulated, model),
        forecast=forecast(measured.estimates, model, widths),
    )


def _local_spectrum(estimate: Estimate, whole: Spectrum) -> LocalSpectrum:
    return LocalSpectrum(
        eigenvalues=tuple(estimate.eigenvalues.tolist()),
        variance_share=float(estimate.eigenvalues.sum() / whole.sum()),
        relative_sampling_errors=tuple(estimate.relative_error.tolist()),
        **vars(summarise(estimate.eigenvalues)),
    )


def _over_time(
    closed_form: Callable[[Prediction, Array, Array], Array], lam: Float64[np.ndarray, " k"], model: TrainingModel
) -> dict[Prediction, Table]:
    """Return a closed form of eq. 10-12 as a row of k directions for each time."""
    return {name: rows(closed_form(name, lam, TABULATED_TIMES[:, None])) for name in model.predictions}


def rows(table: Float64[np.ndarray, "t d"]) -> Table:
    """Return an array as rows."""
    return tuple(map(tuple, table.tolist()))


# ---- whole latents ----


def _stationary(moments: Moments, unit: float) -> StationaryGeometry:
    """Return the spectrum by spatial frequency, of all latents and within classes.

    The error is that of frequencies with real coefficients; most have complex ones, of two numbers each.
    """
    stationary, classes = moments.stationary, moments.classes
    found = {"all": (stationary.eigenvalues(), stationary.images)}
    if classes.enough:
        within = stationary.scatter - classes.between_frequencies(stationary.mean)
        found["within classes"] = (stationary.eigenvalues(within, classes.freedom), classes.freedom)
    return StationaryGeometry(
        dimension=len(found["all"][0]),
        spectra={name: _stationary_spectrum(spectrum / unit, freedom) for name, (spectrum, freedom) in found.items()},
    )


def _stationary_spectrum(spectrum: Spectrum, independent: float) -> StationarySpectrum:
    ranks = tabulated_ranks(len(spectrum), TABULATED_EIGENVALUES)
    return StationarySpectrum(
        ranks=tuple(ranks.tolist()),
        eigenvalues=tuple(spectrum[ranks].tolist()),
        relative_sampling_error=sampling_error(independent),
        **vars(summarise(spectrum)),
    )


def _whole(moments: Moments, unit: float) -> WholeGeometry:
    """Return the leading directions of whole latents, by the covariance where it is small enough to be formed."""
    whole, sample, dimension = moments.whole, moments.sample.latents, math.prod(moments.stationary.shape)
    method: Literal["exact", "gram", "sketch"]
    known = np.zeros(1)
    if isinstance(whole, TokenCovariance):
        method, total = "exact", float(whole.covariance.trace())
        known = eigenvalues_descending(whole.covariance.numpy(force=True)) / unit
        leading = known[: min(dimension, whole.images - 1)]
    elif len(sample) == whole.images:
        method, total, leading = "gram", whole.trace, gram_eigenvalues(sample) / unit
    else:
        method, total, leading = "sketch", whole.trace, whole.eigenvalues() / unit
    leading = leading[:TABULATED_EIGENVALUES]
    return WholeGeometry(
        method=method,
        dimension=dimension,
        eigenvalues=tuple(leading.tolist()),
        variance=total / unit,
        tail_variance=max(0.0, total / unit - float(leading.sum())),
        relative_sampling_error=sampling_error(whole.images),
        **vars(summarise(known)),
    )


# ---- cautions ----


def _cautions(moments: Moments, measured: Iterable[MeasuredTokens]) -> Iterator[Caution]:
    """Return the cautions about a store, and about each patch size."""
    variance = next(iter(moments.tokens.values())).channel_variance
    constant = (variance <= variance.max() * torch.finfo(torch.float32).eps ** 2).nonzero().flatten().tolist()
    if 0 < len(constant) < len(variance):
        yield Caution("constant_channels", channels=tuple(constant))
    images, channels, classes = moments.stationary.images, moments.stationary.shape[0], len(moments.classes.counts)
    if classes == 1:
        yield Caution("one_class")
    elif not moments.classes.enough:
        yield Caution("few_for_classes", {"latents": images, "classes": classes})
    for tokens in measured:
        yield from _token_cautions(tokens)
    if images <= channels:
        yield Caution("few_for_frequencies", {"latents": images, "channels": channels})


def _token_cautions(measured: MeasuredTokens) -> Iterator[Caution]:
    tokens, estimate, spread = measured.tokens, measured.estimates[0], measured.along.relative_spread
    d, n = tokens.dimension, estimate.independent
    numbers = {"patch_size": tokens.patch_size, "latents": tokens.images}
    enough = math.ceil(tokens.images / n * max(2 / LARGE_ERROR**2, d / LARGE_ERROR))
    goal = {"enough_latents": enough, "goal": LARGE_ERROR}
    if tokens.images < MIN_LATENTS:
        yield Caution("few_latents", {**numbers, "fewest": MIN_LATENTS})
    elif not estimate.enough:
        yield Caution("few_tokens", {**numbers, "tokens": tokens.count, "directions": d, **goal})
    elif max(sampling_error(n), d / n) > LARGE_ERROR:
        yield Caution("large_errors", {**numbers, "error": sampling_error(n), "smallest_bias": d / n, **goal})
    constant = int((spread == 0).sum())
    if 0 < constant < d and tokens.count > d:
        yield Caution("constant_directions", {**numbers, "constant": constant, "directions": d})
