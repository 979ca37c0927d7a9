"""The covariance of whole latents, as if their positions were a torus on which none is special.

A covariance that only depends on the distance of two positions is diagonal in spatial frequency: there is one C x C
Hermitian matrix for each frequency, and their eigenvalues together are those of the whole C H W x C H W matrix. That
matrix is never formed. The trace is that of the real covariance. The dependence between frequencies is neglected, which
exists at borders and wherever else positions differ.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Complex128, Float, Float64, Int64
from torch import Tensor

from jlt.geometry.covariance import RunningCovariance
from jlt.geometry.spectrum import Spectrum, descending


def frequencies(latents: Float[Tensor, "n c h w"]) -> Complex128[Tensor, "f n c"]:
    """Return the orthonormal Fourier coefficients of every channel, one of each conjugate pair of frequencies."""
    return torch.fft.rfft2(latents.double(), norm="ortho").flatten(2).permute(2, 0, 1).contiguous()


def multiplicity(height: int, width: int) -> Int64[np.ndarray, " f"]:
    """Return the number of frequencies (1, or 2 with its conjugate) of each coefficient of `frequencies`."""
    columns = np.arange(width // 2 + 1)
    return np.tile(np.where((columns == 0) | (2 * columns == width), 1, 2), height)


class StationaryCovariance(RunningCovariance):
    """First and second moments of the Fourier coefficients: groups are frequencies, rows the channels of a latent."""

    def __init__(self, channels: int, height: int, width: int, device: torch.device | str = "cpu") -> None:
        self.shape = (channels, height, width)
        super().__init__((height * (width // 2 + 1),), channels, torch.complex128, device)

    def update(self, latents: Float[Tensor, "n c h w"]) -> None:
        """Add a batch of latents of any float type."""
        if tuple(latents.shape[1:]) != self.shape:
            raise ValueError(f"expected latents of {self.shape}, got {tuple(latents.shape[1:])}")
        if not len(latents):
            return
        found = frequencies(latents.to(self.device))
        if self._centre is None:
            self._centre = found[:, 0].clone()
        found -= self._centre[:, None]
        self._sum += found.sum(1)
        self._squares.baddbmm_(found.mT, found.conj())
        self.images += len(latents)
        self.count = self.images

    def eigenvalues(self, scatter: Complex128[Tensor, "f c c"] | None = None, freedom: int | None = None) -> Spectrum:
        """Return all C H W eigenvalues, largest first: of the covariance, or of another scatter with its freedom."""
        scatter = self.scatter if scatter is None else scatter
        found = torch.linalg.eigvalsh(scatter).cpu().numpy() / (self.images - 1 if freedom is None else freedom)
        return descending(np.repeat(found, multiplicity(*self.shape[1:]), axis=0).ravel())


def between_classes(
    means: Float64[Tensor, "k c h w"], counts: Float64[Tensor, " k"], centre: Complex128[Tensor, "f c"]
) -> Complex128[Tensor, "f c c"]:
    """Return the scatter of class means, each weighted by its number of latents; the rest is that within classes."""
    total = torch.zeros(*centre.shape, centre.shape[1], dtype=torch.complex128, device=centre.device)
    for part, weight in zip(means.split(64), counts.split(64), strict=True):
        found = (frequencies(part) - centre[:, None]) * weight.sqrt()[None, :, None]
        total.baddbmm_(found.mT, found.conj())
    return total
