"""The leading directions of whole latents, of C H W dimensions, whose covariance is too large to be formed.

There are three ways: the covariance itself for small latents, the exact Gram matrix for few latents, else a sketch in
the one pass over the store (Nystrom's method: Halko, Martinsson and Tropp 2011; the single-pass form of Tropp,
Yurtsever, Udell and Cevher 2017). The eigenvalues of a sketch are never too large but for rounding, and the leading
ones are the more accurate the faster the spectrum falls.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from jlt.geometry.spectrum import Spectrum, descending
from jlt.runtime.random_numbers import generator

SKETCH = 256
"""Random directions of a sketch."""
LEADING = 64
"""Eigenvalues that are taken from it: a quarter, so that they are accurate."""
SEED = 0
RESOLVED = 1e-12
"""Share of the largest eigenvalue below which a sketch leaves one out."""


class LeadingSketch:
    """Products of the second moments of latents with random directions; merging is exact up to float64 rounding."""

    def __init__(self, dimension: int, directions: int = SKETCH, device: torch.device | str = "cpu") -> None:
        random = torch.randn(
            dimension, min(directions, dimension), generator=generator(SEED, "sketch", dimension), dtype=torch.float64
        )
        # Orthonormal directions keep the small matrix that is inverted well conditioned.
        self._test: Float64[Tensor, "d k"] = torch.linalg.qr(random).Q.to(device)
        self._product: Float64[Tensor, "d k"] = torch.zeros_like(self._test)
        self._sum: Float64[Tensor, " d"] = torch.zeros(dimension, dtype=torch.float64, device=device)
        self._squares = 0.0
        self.images = 0

    def update(self, latents: Float[Tensor, "n c h w"]) -> None:
        """Add a batch of latents."""
        rows = latents.to(self._test.device).double().flatten(1)
        self._product.addmm_(rows.T, rows @ self._test)
        self._sum += rows.sum(0)
        self._squares += rows.square().sum().item()
        self.images += len(rows)

    def merge(self, other: LeadingSketch) -> None:
        """Add the sums of another sketch with the same directions."""
        device = self._test.device
        self._product += other._product.to(device)
        self._sum += other._sum.to(device)
        self._squares += other._squares
        self.images += other.images

    @property
    def trace(self) -> float:
        """The total variance, exact."""
        return (self._squares - self._sum.square().sum().item() / self.images) / (self.images - 1)

    def eigenvalues(self, leading: int = LEADING) -> Spectrum:
        """Return estimates of the leading eigenvalues of the covariance, largest first."""
        mean = self._sum / self.images
        product = (self._product - torch.outer(self._sum, mean @ self._test)) / (self.images - 1)
        small = self._test.T @ product
        squares, vectors = torch.linalg.eigh((small + small.T) / 2)
        # A smaller square is rounding, and a quotient by its root would be noise.
        kept = squares > RESOLVED * squares[-1]
        half = product @ (vectors[:, kept] / squares[kept].sqrt())
        return descending(torch.linalg.svdvals(half).square().cpu().numpy())[:leading]


def gram_eigenvalues(latents: Float[Tensor, "n c h w"], leading: int = LEADING) -> Spectrum:
    """Return the leading eigenvalues of the covariance of few latents, exactly, by their products with each other."""
    rows = latents.double().flatten(1)
    rows = rows - rows.mean(0)
    gram = rows @ rows.T / (len(rows) - 1)
    return descending(torch.linalg.eigvalsh(gram).cpu().numpy())[: min(leading, len(rows) - 1)]
