"""The spectra of the tokens of one patch size by several estimates, each with its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from jlt.geometry.accumulate import Latents, Moments
from jlt.geometry.covariance import TokenCovariance
from jlt.geometry.forecast import Estimate
from jlt.geometry.spectrum import Spectrum, descending, eigenvalues_descending, error_by_rank, sampling_error
from jlt.geometry.subsample import ANCHORS, NEIGHBOURS, DirectionMoments, direction_moments, neighbourhood_covariance
from jlt.runtime.progress import track

TOKEN_BATCH = 256
MIN_LATENTS = 50
"""Latents below which there is no forecast, since their own scatter is not known."""


@dataclass(frozen=True)
class MeasuredTokens:
    """The spectra of the tokens of one patch size, in units of the noise: of all, and the local ones."""

    tokens: TokenCovariance
    estimates: list[Estimate]
    along: DirectionMoments


def measure_tokens(moments: Moments, patch_size: int, unit: float) -> MeasuredTokens:
    """Return the spectra for one patch size, with variances divided by `unit`."""
    tokens = moments.tokens[patch_size]
    eigenvalues, basis = eigenbasis(tokens)
    along = direction_moments(moments.sample.latents, patch_size, tokens.mean, basis)
    independent = _independent(along.relative_spread, tokens)
    error = np.where(along.relative_spread > 0, error_by_rank(independent, tokens.dimension), 0.0)
    error = np.hypot(error, along.relative_spread / np.sqrt(tokens.images))
    estimate = Estimate("tokens", eigenvalues, error, independent, _enough(tokens))
    estimates = [estimate, *_local_estimates(moments, patch_size, independent / tokens.images)]
    return MeasuredTokens(tokens, [found.in_units_of(unit) for found in estimates], along)


def _enough(tokens: TokenCovariance) -> bool:
    return tokens.count > tokens.dimension and tokens.images >= MIN_LATENTS


def _independent(relative_spread: Float64[np.ndarray, " d"], tokens: TokenCovariance) -> float:
    """Return the number of independent samples with errors as large, between the numbers of latents and of tokens."""
    spread = relative_spread[relative_spread > 0]
    if not len(spread):
        return float(tokens.images)
    return float(np.clip(2 * tokens.images / np.median(spread) ** 2, tokens.images, tokens.count))


def token_estimates(store: Latents, patch_sizes: Sequence[int], device: str) -> dict[int, Estimate]:
    """Return the spectra of the tokens of a store, with the errors of as many Gaussian latents."""
    sums = {p: TokenCovariance(store.shape.channels, p, device) for p in patch_sizes}
    for start in track(range(0, len(store), TOKEN_BATCH), "spectra of the latents"):
        latents, _ = store.gather(np.arange(start, min(start + TOKEN_BATCH, len(store))))
        for tokens in sums.values():
            tokens.update(latents)
    return {p: _estimate("tokens", eigenbasis(found)[0], found.images, _enough(found)) for p, found in sums.items()}


def _estimate(name: str, eigenvalues: Spectrum, independent: float, enough: bool = True) -> Estimate:
    """Return an estimate with the errors of as many independent Gaussian samples."""
    error = np.hypot(sampling_error(independent), error_by_rank(independent, len(eigenvalues)))
    return Estimate(name, eigenvalues, error, independent, enough)


def eigenbasis(tokens: TokenCovariance) -> tuple[Spectrum, Tensor]:
    """Return eigenvalues, largest first, and their directions as columns."""
    values, vectors = torch.linalg.eigh(tokens.covariance)
    return descending(values.cpu().numpy()), vectors.flip(1)


def _local_estimates(moments: Moments, patch_size: int, per_latent: float) -> list[Estimate]:
    """Return the spectra within classes and within neighbourhoods, where there are enough latents for them.

    `per_latent` is the number of independent samples that the tokens of a latent are worth.
    """
    tokens, classes = moments.tokens[patch_size], moments.classes
    per_image, found = tokens.count // tokens.images, []
    if classes.enough:
        within = tokens.scatter - classes.between_tokens(patch_size, tokens.mean)
        eigenvalues = eigenvalues_descending((within / (classes.freedom * per_image)).numpy(force=True))
        found.append(_estimate("within classes", eigenvalues, classes.freedom * per_latent))
    latents = moments.sample.latents
    if len(latents) >= 2 * (NEIGHBOURS + 1):
        eigenvalues = eigenvalues_descending(neighbourhood_covariance(latents, patch_size).covariance.numpy())
        # Neighbourhoods overlap, so there are at most as many independent differences as latents.
        found.append(_estimate("within neighbourhoods", eigenvalues, min(len(latents), ANCHORS * NEIGHBOURS)))
    return found
