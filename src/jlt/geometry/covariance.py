"""Mean and covariance of tokens, accumulated in float64 from batches that are then forgotten."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from jlt.errors import JLTError
from jlt.patches import patches

CHUNK_BYTES = 2**24
"""Rows in float64 that are at work at a time: what is beside them in memory, and large enough for a product."""


def require_finite(latents: Float[Tensor, "n c h w"], mean: Tensor, first: int) -> None:
    """Raise JLTError naming the first latent that is not finite, if the mean of all is not."""
    if not mean.isfinite().all():
        position = first + int(latents.isfinite().flatten(1).all(1).long().argmin())
        raise JLTError(f"Latent {position} of the store is not finite: run `jlt verify` on the store.")


class TokenCovariance:
    """First and second moments of the tokens of one patch size; merging is exact up to float64 rounding.

    Moments are kept about a point in the midst of the first batch, so a large mean costs no digits.
    """

    def __init__(self, channels: int, patch_size: int, device: torch.device | str = "cpu") -> None:
        self.channels = channels
        self.patch_size = patch_size
        self.dimension = channels * patch_size**2
        self.images = 0
        self.count = 0
        self._centre: Float64[Tensor, " d"] | None = None
        self._sum: Float64[Tensor, " d"] = torch.zeros(self.dimension, dtype=torch.float64, device=device)
        self._squares: Float64[Tensor, "d d"] = torch.zeros(
            self.dimension, self.dimension, dtype=torch.float64, device=device
        )

    def update(self, latents: Float[Tensor, "n c h w"], first: int | None = None) -> None:
        """Add a batch of latents of any float type; values that are not finite raise JLTError.

        It names the latent: `first` is the number of the first of them, where it is not what was added before.
        """
        if latents.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels, got {latents.shape[1]}")
        tokens = patches(latents.to(self._sum.device), self.patch_size)
        if not len(tokens):
            return
        n, rows, columns, *shape = tokens.shape
        if self._centre is None:
            self._centre = tokens[:1].double().mean((0, 1, 2)).flatten()
        centre, before = self._centre.view(shape), self._sum.clone()
        size = max(1, CHUNK_BYTES // (8 * rows * columns * self.dimension))
        buffer = torch.empty(size, rows, columns, *shape, dtype=torch.float64, device=self._sum.device)
        for part in tokens.split(size):
            # Converted, gathered and centred in one pass.
            centred = torch.sub(part, centre, out=buffer[: len(part)]).view(-1, self.dimension)
            self._sum += centred.sum(0)
            self._squares.addmm_(centred.T, centred)
        require_finite(latents, self._sum - before, self.images if first is None else first)
        self.images += n
        self.count += n * rows * columns

    def merge(self, other: TokenCovariance) -> None:
        """Add what another accumulator of the same channels and patch size has seen."""
        if (self.channels, self.patch_size) != (other.channels, other.patch_size):
            raise ValueError("only accumulators of one channel count and patch size can be merged")
        if other._centre is None:
            return
        if self._centre is None:
            self._centre = other._centre.to(self._sum.device)
        shift = other._centre.to(self._sum.device) - self._centre
        moved, squares = other._sum.to(self._sum.device), other._squares.to(self._sum.device)
        cross = torch.outer(moved, shift)
        self._squares += squares + cross + cross.T + other.count * torch.outer(shift, shift)
        self._sum += moved + other.count * shift
        self.images += other.images
        self.count += other.count

    @property
    def mean(self) -> Float64[Tensor, " d"]:
        """The mean token; ValueError if there is none."""
        if self._centre is None:
            raise ValueError("a mean needs at least one token")
        return self._centre + self._sum / self.count

    @property
    def scatter(self) -> Float64[Tensor, "d d"]:
        """The sum over tokens of the outer products of what they differ by from their mean."""
        return self._squares - torch.outer(self._sum, self._sum) / max(1, self.count)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance over tokens; ValueError below two tokens."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two tokens")
        return self.scatter / (self.count - 1)

    @property
    def channel_variance(self) -> Float64[Tensor, " c"]:
        """The variance of each channel about its own mean, over images and positions: the same for every patch size."""
        mean = self.mean.reshape(self.channels, -1)
        within = self.scatter.diagonal().reshape(self.channels, -1).sum(1)
        between = self.count * (mean - mean.mean(1, keepdim=True)).square().sum(1)
        return (within + between) / (self.count * self.patch_size**2)
