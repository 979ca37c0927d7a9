"""The spectra of the tokens of one patch size by several estimates, each with its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from jlt.geometry.accumulate import Latents, Moments
from jlt.geometry.covariance import TokenCovariance
from jlt.geometry.forecast import Estimate
from jlt.geometry.spectrum import Spectrum, descending, eigenvalues_descending, error_by_rank, sampling_error
from jlt.patches import patch_tokens
from jlt.runtime.progress import track
from jlt.runtime.random_numbers import random_subset

TOKEN_BATCH = 256
MIN_LATENTS = 50
"""Latents below which there is no forecast, since their own scatter is not known."""
NEIGHBOURS = 16
ANCHORS = 128
"""Neighbourhoods, each of a latent and its NEIGHBOURS nearest ones."""
PARTS = 10
"""Groups of latents for the jackknife."""


@dataclass(frozen=True)
class DirectionMoments:
    """Per direction, estimated from a sample.

    `relative_spread` is the standard deviation over latents of a latent's own mean square, over the mean of all. An
    eigenvalue of n latents has the relative error `relative_spread / sqrt(n)` for any distribution and any dependence
    between the tokens of a latent. `excess_kurtosis` is 0 for a Gaussian; its error is by the jackknife.
    """

    relative_spread: Float64[np.ndarray, " d"]
    excess_kurtosis: Float64[np.ndarray, " d"]
    excess_kurtosis_error: Float64[np.ndarray, " d"]


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


# ---- estimates from single latents, of which a sample is kept in memory ----


def direction_moments(
    latents: Float[Tensor, "m c h w"], patch_size: int, mean: Float64[Tensor, " d"], basis: Float64[Tensor, "d d"]
) -> DirectionMoments:
    """Measure the tokens of latents along the columns of a basis, about a mean; 0 where a direction has no variance."""
    mean, basis = mean.cpu(), basis.cpu()
    squares = torch.empty(len(latents), len(mean), dtype=torch.float64)
    fourths = torch.empty_like(squares)
    for start in range(0, len(latents), 64):
        part = latents[start : start + 64]
        along = ((patch_tokens(part, patch_size).double() - mean) @ basis).square().view(len(part), -1, len(mean))
        squares[start : start + len(part)] = along.mean(1)
        fourths[start : start + len(part)] = along.square().mean(1)
    second = squares.mean(0)
    # A direction without variance holds rounding only.
    flat = second <= second.max() * len(second) * torch.finfo(torch.float32).eps ** 2
    spread = torch.where(flat, 0.0, squares.std(0) / second)
    kurtosis, error = _kurtosis(squares, fourths)
    found = [torch.where(flat, 0.0, value).numpy() for value in (spread, kurtosis, error)]
    return DirectionMoments(*found)


def _kurtosis(
    squares: Float64[Tensor, "m d"], fourths: Float64[Tensor, "m d"]
) -> tuple[Float64[Tensor, " d"], Float64[Tensor, " d"]]:
    """Return the excess kurtosis and its standard error, leaving out one group of latents at a time."""
    second, fourth = squares.sum(0), fourths.sum(0)
    groups = [torch.as_tensor(group) for group in np.array_split(np.arange(len(squares)), PARTS) if len(group)]
    without = [
        (len(squares) - len(group)) * (fourth - fourths[group].sum(0)) / (second - squares[group].sum(0)).square() - 3
        for group in groups
    ]
    scatter = torch.stack(without).var(0, correction=0)
    return len(squares) * fourth / second.square() - 3, (scatter * (len(without) - 1)).sqrt()


def neighbourhood_covariance(latents: Float[Tensor, "m c h w"], patch_size: int) -> TokenCovariance:
    """Return the covariance of tokens about the mean of their neighbourhood: a latent and the 16 nearest to it.

    Distances are those of whole latents. ValueError for fewer latents than a neighbourhood has.
    """
    if len(latents) <= NEIGHBOURS:
        raise ValueError(f"a neighbourhood needs {NEIGHBOURS + 1} latents")
    rows = latents.flatten(1)
    rows = rows - rows.mean(0)
    squares = rows.square().sum(1)
    found = TokenCovariance(latents.shape[1], patch_size)
    for anchor in random_subset(len(latents), ANCHORS).tolist():
        distances = squares - 2 * (rows @ rows[anchor])
        distances[anchor] = -torch.inf
        members = latents[distances.topk(NEIGHBOURS + 1, largest=False).indices].double()
        # Unbiased: the mean is that of the neighbourhood itself.
        found.update((members - members.mean(0)) * ((NEIGHBOURS + 1) / NEIGHBOURS) ** 0.5)
    return found
