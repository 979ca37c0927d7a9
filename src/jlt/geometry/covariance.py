"""Mean and covariance of latent tokens, accumulated in float64 from batches that are then forgotten."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from jlt.errors import JLTError


def patch_tokens(latents: Float[Tensor, "n c h w"], patch_size: int) -> Float[Tensor, "tokens d"]:
    """Cut latents into non-overlapping patches: n (h/p) (w/p) tokens of d = c p p values, channel first.

    Raises JLTError where the grid is no multiple of the patch size.
    """
    n, c, h, w = latents.shape
    p = patch_size
    if p < 1 or h % p or w % p:
        raise JLTError(f"Latents of {h} x {w} positions cannot be cut into patches of {p} x {p}: choose a divisor.")
    patches = latents.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, c * p * p)


class TokenCovariance:
    """First and second moments of the tokens of one patch size; merging is exact up to float64 rounding.

    The moments are kept centred (pairwise update of Chan, Golub and LeVeque 1983), so a large mean costs no digits.
    """

    def __init__(self, channels: int, patch_size: int) -> None:
        self.channels = channels
        self.patch_size = patch_size
        self.dimension = channels * patch_size**2
        self.images = 0
        self.count = 0
        self.mean: Float64[Tensor, " d"] = torch.zeros(self.dimension, dtype=torch.float64)
        self._scatter: Float64[Tensor, "d d"] = torch.zeros(self.dimension, self.dimension, dtype=torch.float64)

    def update(self, latents: Float[Tensor, "n c h w"]) -> None:
        """Add a batch of latents of any float type; values that are not finite raise JLTError."""
        if latents.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels, got {latents.shape[1]}")
        tokens = patch_tokens(latents, self.patch_size).double()
        if not len(tokens):
            return
        mean = tokens.mean(0)
        if not mean.isfinite().all():
            position = self.images + int(latents.isfinite().flatten(1).all(1).long().argmin())
            raise JLTError(f"Latent {position} of the store is not finite: run `jlt verify` on the store.")
        centred = tokens - mean
        self._add(len(latents), len(tokens), mean, centred.T @ centred)

    def merge(self, other: TokenCovariance) -> None:
        """Add what another accumulator of the same channels and patch size has seen."""
        if (self.channels, self.patch_size) != (other.channels, other.patch_size):
            raise ValueError("only accumulators of one channel count and patch size can be merged")
        if other.count:
            self._add(other.images, other.count, other.mean, other._scatter)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance over tokens; ValueError below two tokens."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two tokens")
        return self._scatter / (self.count - 1)

    @property
    def channel_variance(self) -> Float64[Tensor, " c"]:
        """The variance of each channel about its own mean, over images and positions: the same for every patch size."""
        mean = self.mean.reshape(self.channels, -1)
        within = self._scatter.diagonal().reshape(self.channels, -1).sum(1)
        between = self.count * (mean - mean.mean(1, keepdim=True)).square().sum(1)
        return (within + between) / (self.count * self.patch_size**2)

    def _add(self, images: int, count: int, mean: Float64[Tensor, " d"], scatter: Float64[Tensor, "d d"]) -> None:
        total = self.count + count
        shift = (mean - self.mean.to(mean.device)).to(self.mean.device)
        self._scatter += scatter.to(self.mean.device)
        self._scatter += torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.images += images
        self.count = total
