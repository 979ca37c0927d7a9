"""The target geometry of a latent store: token spectra, and what eq. 9-12 say about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from jlt.config import PREDICTIONS
from jlt.errors import JLTError
from jlt.geometry.covariance import TokenCovariance
from jlt.geometry.gaussian import (
    best_coefficient,
    conditional_variance,
    explained_power,
    target_variance,
)
from jlt.geometry.spectrum import eigenvalues_descending, sampling_error, summarise
from jlt.progress import say

SCHEMA = 1
BATCH_SIZE = 512
TIMES = np.round(np.linspace(0.0, 0.98, 50), 2)
"""Times of the tables; 1 is left out because a direction without variance has no regression there."""

TABULATED_DIRECTIONS = 32
"""Directions in the tables over time, so that they stay small in a space of thousands; eigenvalues are kept whole."""

LARGE_ERROR = 0.1
"""Relative sampling error of an eigenvalue above which `analyze` warns."""


@runtime_checkable
class LatentBatches(Protocol):
    """What the analysis needs of a latent store."""

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (latents (n, C, H, W), labels) over the whole store."""

    def identity(self) -> dict[str, Any]:
        """Say which latents these are."""


def analyze(store: LatentBatches, patch_sizes: Sequence[int]) -> dict[str, Any]:
    """Measure the token spectra of a store in one pass and return geometry.json (plain numbers, lists and dicts).

    Raises JLTError for fewer than two latents, values that are not finite, latents without any variance, and a patch
    size that does not divide the grid; warns on stderr where there are too few images for the spectrum.
    """
    accumulators: dict[int, TokenCovariance] = {}
    for latents, _ in store.batches(BATCH_SIZE):
        for patch_size in dict.fromkeys(patch_sizes):
            if patch_size not in accumulators:
                accumulators[patch_size] = TokenCovariance(latents.shape[1], patch_size)
            accumulators[patch_size].update(latents)
    images = max((accumulator.images for accumulator in accumulators.values()), default=0)
    if images < 2:
        raise JLTError(f"The store holds {images} latents: a covariance needs at least 2, a good one thousands.")
    return {
        "schema": SCHEMA,
        "latents": store.identity(),
        "times": TIMES.tolist(),
        "tokens": {str(patch_size): describe_tokens(accumulator) for patch_size, accumulator in accumulators.items()},
    }


def describe_tokens(tokens: TokenCovariance) -> dict[str, Any]:
    """Return the entry of geometry.json for one patch size."""
    eigenvalues = eigenvalues_descending(tokens.covariance.numpy(force=True))
    if not eigenvalues.any():
        raise JLTError("All latents of the store are equal: there is no variance to analyse.")
    error = sampling_error(tokens.images)
    _warn_if_few(tokens, error)
    return {
        "patch_size": tokens.patch_size,
        "dimension": tokens.dimension,
        "count": tokens.count,
        "images": tokens.images,
        "relative_sampling_error": error,
        "mean": tokens.mean.tolist(),
        "eigenvalues": eigenvalues.tolist(),
        **asdict(summarise(eigenvalues)),
        "channel_variance": tokens.channel_variance.tolist(),
        "target_variance": {name: target_variance(name, eigenvalues).tolist() for name in PREDICTIONS},
        **_tables_over_time(eigenvalues),
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


def _warn_if_few(tokens: TokenCovariance, error: float) -> None:
    where = f"Patch size {tokens.patch_size}, {tokens.images} images"
    if tokens.count <= tokens.dimension:
        say(
            f"{where}: {tokens.count} tokens cannot span {tokens.dimension} directions, so the smallest eigenvalues "
            "are 0 only for want of data; use more images."
        )
    elif error > LARGE_ERROR:
        say(f"{where}: an eigenvalue is known to about {error:.0%}; {round(2 / LARGE_ERROR**2)} images give 10%.")
