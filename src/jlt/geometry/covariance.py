"""Mean and covariance of tokens, accumulated in float64 over batches."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from jlt.errors import JLTError
from jlt.patches import patches

CHUNK_BYTES = 2**24
"""Rows in float64 that are processed at a time: little memory, and large enough for a fast product."""


def require_finite(latents: Float[Tensor, "n c h w"], mean: Tensor, first: int) -> None:
    """Raise JLTError naming the first latent that is not finite, if the mean of all is not."""
    if not mean.isfinite().all():
        position = first + int(latents.isfinite().flatten(1).all(1).long().argmin())
        raise JLTError(f"Latent {position} of the store is not finite: run `jlt verify` on the store.")


class RunningCovariance:
    """First and second moments of rows of d values, in groups *g that do not mix; merging is exact up to rounding.

    Moments are kept about a point in the midst of the first batch, so a large mean costs no digits.
    """

    def __init__(self, groups: tuple[int, ...], dimension: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.images = 0
        self.count = 0
        """Rows, several for each image where tokens are rows."""
        self._centre: Shaped[Tensor, "*g d"] | None = None
        self._sum: Shaped[Tensor, "*g d"] = torch.zeros(*groups, dimension, dtype=dtype, device=device)
        self._squares: Shaped[Tensor, "*g d d"] = torch.zeros(*groups, dimension, dimension, dtype=dtype, device=device)

    def merge(self, other: RunningCovariance) -> None:
        """Add the moments of another accumulator of the same shape."""
        if self._sum.shape != other._sum.shape:
            raise ValueError("only accumulators of one shape can be merged")
        if other._centre is None:
            return
        if self._centre is None:
            self._centre = other._centre.to(self.device)
        shift = other._centre.to(self.device) - self._centre
        moved = other._sum.to(self.device)
        self._squares += other._squares.to(self.device) + outer(moved, shift) + outer(shift, moved)
        self._squares += other.count * outer(shift, shift)
        self._sum += moved + other.count * shift
        self.images += other.images
        self.count += other.count

    @property
    def device(self) -> torch.device:
        """The device of the sums."""
        return self._sum.device

    @property
    def mean(self) -> Shaped[Tensor, "*g d"]:
        """The mean row; ValueError if there is none."""
        if self._centre is None:
            raise ValueError("a mean needs at least one row")
        return self._centre + self._sum / self.count

    @property
    def scatter(self) -> Shaped[Tensor, "*g d d"]:
        """The sum over rows of the outer products of their differences from the mean."""
        return self._squares - outer(self._sum, self._sum) / max(1, self.count)


def outer(a: Shaped[Tensor, "*g d"], b: Shaped[Tensor, "*g d"]) -> Shaped[Tensor, "*g d d"]:
    """Return the outer product a b^H of each group."""
    return a[..., :, None] * b[..., None, :].conj()


class TokenCovariance(RunningCovariance):
    """First and second moments of the tokens of one patch size."""

    def __init__(self, channels: int, patch_size: int, device: torch.device | str = "cpu") -> None:
        self.channels = channels
        self.patch_size = patch_size
        self.dimension = channels * patch_size**2
        super().__init__((), self.dimension, torch.float64, device)

    def update(self, latents: Float[Tensor, "n c h w"], first: int | None = None) -> None:
        """Add a batch of latents of any float type; values that are not finite raise JLTError.

        The error names the latent: `first` is the number of the first of the batch, by default the next one.
        """
        if latents.shape[1] != self.channels:
            raise ValueError(f"expected {self.channels} channels, got {latents.shape[1]}")
        tokens = patches(latents.to(self.device), self.patch_size)
        if not len(tokens):
            return
        n, rows, columns, *shape = tokens.shape
        if self._centre is None:
            self._centre = tokens[:1].double().mean((0, 1, 2)).flatten()
        centre, before = self._centre.view(shape), self._sum.clone()
        size = max(1, CHUNK_BYTES // (8 * rows * columns * self.dimension))
        buffer = torch.empty(size, rows, columns, *shape, dtype=torch.float64, device=self.device)
        for part in tokens.split(size):
            # Converted, gathered and centred in one pass.
            centred = torch.sub(part, centre, out=buffer[: len(part)]).view(-1, self.dimension)
            self._sum += centred.sum(0)
            self._squares.addmm_(centred.T, centred)
        require_finite(latents, self._sum - before, self.images if first is None else first)
        self.images += n
        self.count += n * rows * columns

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
