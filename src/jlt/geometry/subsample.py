"""Estimates from single latents, of which a sample is kept in memory.

The error of each eigenvalue, the kurtosis along its direction, and the covariance among nearest neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from jlt.geometry.covariance import TokenCovariance
from jlt.patches import patch_tokens
from jlt.runtime.random_numbers import random_subset

SAMPLE = 4096
SAMPLE_BYTES = 2**28
"""The sample has at most so many latents, and no more than fit these bytes in float32."""
NEIGHBOURS = 16
ANCHORS = 128
"""Neighbourhoods, each of a latent and its NEIGHBOURS nearest ones."""
PARTS = 10
"""Groups of latents for the jackknife."""


def sample_numbers(count: int, values: int) -> Int64[np.ndarray, " m"]:
    """Return the numbers of the sampled latents of a store with `values` values each; always the same."""
    return random_subset(count, max(2, min(SAMPLE, SAMPLE_BYTES // (4 * values))))


class Sample:
    """Latents of given numbers, in float32, taken from batches."""

    def __init__(self, numbers: Int64[np.ndarray, " m"], shape: tuple[int, int, int]) -> None:
        self._wanted = numbers
        # In one piece: many small ones among large buffers would fragment the memory.
        self._kept: Float[Tensor, "m c h w"] = torch.empty(len(numbers), *shape)
        self._found = torch.zeros(len(numbers), dtype=torch.bool)

    def update(self, first: int, latents: Float[Tensor, "n c h w"]) -> None:
        """Take the sampled latents of a batch of consecutive ones, of which the first has this number."""
        low, high = np.searchsorted(self._wanted, (first, first + len(latents)))
        self._kept[low:high] = latents[self._wanted[low:high] - first].float().cpu()
        self._found[low:high] = True

    def merge(self, other: Sample) -> None:
        """Add the latents of another sample with the same numbers."""
        self._kept[other._found] = other._kept[other._found]
        self._found |= other._found

    @property
    def latents(self) -> Float[Tensor, "m c h w"]:
        """All of them, in the order of numbers; ValueError while some are missing."""
        if not self._found.all():
            raise ValueError(f"{int((~self._found).sum())} of {len(self._found)} latents are missing")
        return self._kept


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


def direction_moments(
    latents: Float[Tensor, "m c h w"],
    patch_size: int,
    mean: Float64[Tensor, " d"],
    basis: Float64[Tensor, "d d"],
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
    groups = [(squares[part], fourths[part]) for part in map(torch.as_tensor, _groups(len(squares)))]
    second, fourth = squares.sum(0), fourths.sum(0)
    whole = len(squares) * fourth / second.square() - 3
    without = [
        (len(squares) - len(part)) * (fourth - part_fourth.sum(0)) / (second - part.sum(0)).square() - 3
        for part, part_fourth in groups
    ]
    scatter = torch.stack(without).var(0, correction=0)
    return whole, (scatter * (len(without) - 1)).sqrt()


def _groups(count: int) -> list[np.ndarray]:
    return [part for part in np.array_split(np.arange(count), PARTS) if len(part)]


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
