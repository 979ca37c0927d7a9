"""The covariance of whole latents, were their positions a torus on which none is special.

A covariance that only depends on the distance of two positions is diagonal in spatial frequency: what is left are C x C
Hermitian matrices, one for each frequency, whose eigenvalues together are those of the whole C H W x C H W matrix. That
matrix is never formed. The trace is that of the real covariance; what is neglected is how frequencies depend on each
other, at borders and wherever else positions differ.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Complex128, Float, Float64, Int64
from torch import Tensor

from jlt.geometry.spectrum import Spectrum, descending


def frequencies(latents: Float[Tensor, "n c h w"]) -> Complex128[Tensor, "f n c"]:
    """Return the orthonormal Fourier coefficients of every channel, one of each conjugate pair of frequencies."""
    return torch.fft.rfft2(latents.double(), norm="ortho").flatten(2).permute(2, 0, 1).contiguous()


def multiplicity(height: int, width: int) -> Int64[np.ndarray, " f"]:
    """Return for how many frequencies, itself and perhaps its conjugate, each coefficient of `frequencies` stands."""
    columns = np.arange(width // 2 + 1)
    return np.tile(np.where((columns == 0) | (2 * columns == width), 1, 2), height)


class StationaryCovariance:
    """First and second moments of the Fourier coefficients; merging is exact up to float64 rounding."""

    def __init__(self, channels: int, height: int, width: int, device: torch.device | str = "cpu") -> None:
        self.shape = (channels, height, width)
        self.images = 0
        count = height * (width // 2 + 1)
        self._centre: Complex128[Tensor, "f 1 c"] | None = None
        self._sum: Complex128[Tensor, "f c"] = torch.zeros(count, channels, dtype=torch.complex128, device=device)
        self._squares: Complex128[Tensor, "f c c"] = torch.zeros(
            count, channels, channels, dtype=torch.complex128, device=device
        )

    def update(self, latents: Float[Tensor, "n c h w"]) -> None:
        """Add a batch of latents of any float type."""
        if tuple(latents.shape[1:]) != self.shape:
            raise ValueError(f"expected latents of {self.shape}, got {tuple(latents.shape[1:])}")
        if not len(latents):
            return
        found = frequencies(latents.to(self._sum.device))
        if self._centre is None:
            self._centre = found[:, :1].clone()
        found -= self._centre
        self._sum += found.sum(1)
        self._squares.baddbmm_(found.mT, found.conj())
        self.images += len(latents)

    def merge(self, other: StationaryCovariance) -> None:
        """Add what another accumulator of the same shape has seen."""
        if self.shape != other.shape:
            raise ValueError("only accumulators of one shape can be merged")
        if other._centre is None:
            return
        device = self._sum.device
        if self._centre is None:
            self._centre = other._centre.to(device)
        shift = (other._centre.to(device) - self._centre)[:, 0]
        moved = other._sum.to(device)
        self._squares += other._squares.to(device) + _outer(moved, shift) + _outer(shift, moved)
        self._squares += other.images * _outer(shift, shift)
        self._sum += moved + other.images * shift
        self.images += other.images

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._sum.device

    @property
    def mean(self) -> Complex128[Tensor, "f c"]:
        """The mean coefficients; ValueError if there are none."""
        if self._centre is None:
            raise ValueError("a mean needs at least one latent")
        return self._centre[:, 0] + self._sum / self.images

    @property
    def scatter(self) -> Complex128[Tensor, "f c c"]:
        """The sum over latents of the outer products of what their coefficients differ by from the mean."""
        return self._squares - _outer(self._sum, self._sum) / max(1, self.images)

    def eigenvalues(self, scatter: Complex128[Tensor, "f c c"] | None = None, freedom: int | None = None) -> Spectrum:
        """Return all C H W eigenvalues, largest first: of the covariance, or of another scatter with its freedom."""
        scatter = self.scatter if scatter is None else scatter
        found = torch.linalg.eigvalsh(scatter).cpu().numpy() / (self.images - 1 if freedom is None else freedom)
        return descending(np.repeat(found, multiplicity(*self.shape[1:]), axis=0).ravel())


def _outer(a: Complex128[Tensor, "f c"], b: Complex128[Tensor, "f c"]) -> Complex128[Tensor, "f c c"]:
    return a[:, :, None] * b[:, None, :].conj()


def between_classes(
    means: Float64[Tensor, "k c h w"], counts: Float64[Tensor, " k"], centre: Complex128[Tensor, "f c"]
) -> Complex128[Tensor, "f c c"]:
    """Return the scatter of class means, each counted as often as it has latents; the rest is that within classes."""
    total = torch.zeros(*centre.shape, centre.shape[1], dtype=torch.complex128, device=centre.device)
    for part, weight in zip(means.split(64), counts.split(64), strict=True):
        found = (frequencies(part) - centre[:, None]) * weight.sqrt()[None, :, None]
        total.baddbmm_(found.mT, found.conj())
    return total
