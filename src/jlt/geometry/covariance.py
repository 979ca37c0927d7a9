"""Estimates of a covariance, accumulated in float64 over batches: of tokens, spatial frequencies and whole latents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Complex128, Float, Float64, Int64, Shaped
from torch import Tensor

from jlt.errors import JLTError
from jlt.geometry.spectrum import Spectrum, descending
from jlt.patches import patch_tokens, patches
from jlt.runtime.random_numbers import generator

CHUNK_BYTES = 2**24
"""Rows in float64 that are processed at a time: little memory, and large enough for a fast product."""
SKETCH = 256
"""Random directions of a sketch."""
LEADING = 64
"""Eigenvalues that are taken from it: a quarter, so that they are accurate."""
RESOLVED = 1e-12
"""Share of the largest eigenvalue below which a sketch leaves one out."""


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
        if not (self._sum - before).isfinite().all():
            position = int(latents.isfinite().flatten(1).all(1).long().argmin())
            position += self.images if first is None else first
            raise JLTError(f"Latent {position} of the store is not finite: run `jlt verify` on the store.")
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


def frequencies(latents: Float[Tensor, "n c h w"]) -> Complex128[Tensor, "f n c"]:
    """Return the orthonormal Fourier coefficients of every channel, one of each conjugate pair of frequencies."""
    return torch.fft.rfft2(latents.double(), norm="ortho").flatten(2).permute(2, 0, 1).contiguous()


def multiplicity(height: int, width: int) -> Int64[np.ndarray, " f"]:
    """Return the number of frequencies (1, or 2 with its conjugate) of each coefficient of `frequencies`."""
    columns = np.arange(width // 2 + 1)
    return np.tile(np.where((columns == 0) | (2 * columns == width), 1, 2), height)


class StationaryCovariance(RunningCovariance):
    """The covariance of whole latents, as if their positions were a torus on which none is special.

    A covariance that only depends on the distance of two positions is diagonal in spatial frequency: there is one C x C
    Hermitian matrix for each frequency, and their eigenvalues together are those of the whole C H W x C H W matrix,
    which is never formed. The trace is that of the real covariance. The dependence between frequencies is neglected,
    which exists at borders and wherever else positions differ. Groups are frequencies, rows the channels of a latent.
    """

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


class ClassMeans:
    """Sums of the latents of every class: K C H W numbers, whatever the size of the store."""

    def __init__(
        self, classes: int, channels: int, height: int, width: int, device: torch.device | str = "cpu"
    ) -> None:
        shape = (classes, channels, height, width)
        self._sum: Float64[Tensor, "k c h w"] = torch.zeros(shape, dtype=torch.float64, device=device)
        self._count: Float64[Tensor, " k"] = torch.zeros(classes, dtype=torch.float64, device=device)

    def update(self, latents: Float[Tensor, "n c h w"], labels: Int64[Tensor, " n"]) -> None:
        """Add a batch of latents with their classes."""
        device = self._sum.device
        labels = labels.to(device)
        self._sum.index_add_(0, labels, latents.to(device).double())
        self._count += torch.bincount(labels, minlength=len(self._count))

    def merge(self, other: ClassMeans) -> None:
        """Add the sums of another accumulator of the same classes and shape."""
        self._sum += other._sum.to(self._sum.device)
        self._count += other._count.to(self._sum.device)

    @property
    def means(self) -> Float64[Tensor, "k c h w"]:
        """The mean latents of the classes that have any."""
        seen = self._count > 0
        return self._sum[seen] / self._count[seen, None, None, None]

    @property
    def counts(self) -> Float64[Tensor, " k"]:
        """The number of latents of each of these classes."""
        return self._count[self._count > 0]

    @property
    def freedom(self) -> int:
        """Latents less classes: the degrees of freedom within classes."""
        return int(self._count.sum()) - len(self.counts)

    @property
    def enough(self) -> bool:
        """Whether there are several classes, with enough latents for a covariance within them."""
        return 1 < len(self.counts) <= self.freedom

    def between_tokens(self, patch_size: int, centre: Float64[Tensor, " d"]) -> Float64[Tensor, "d d"]:
        """Return the scatter of the tokens of class means about a mean token, each weighted by its number of latents.

        The mean of a token is that of its class at its position. The rest of the scatter is that within classes.
        """
        total = torch.zeros(len(centre), len(centre), dtype=torch.float64, device=centre.device)
        for means, weight in self._weighted():
            tokens = (patch_tokens(means, patch_size) - centre).view(len(means), -1, len(centre))
            tokens = (tokens * weight[:, None, None]).flatten(0, 1)
            total.addmm_(tokens.T, tokens)
        return total

    def between_frequencies(self, centre: Complex128[Tensor, "f c"]) -> Complex128[Tensor, "f c c"]:
        """Return the scatter of the coefficients of class means, as `between_tokens`."""
        total = torch.zeros(*centre.shape, centre.shape[1], dtype=torch.complex128, device=centre.device)
        for means, weight in self._weighted():
            found = (frequencies(means) - centre[:, None]) * weight[None, :, None]
            total.baddbmm_(found.mT, found.conj())
        return total

    def _weighted(self) -> Iterator[tuple[Float64[Tensor, "n c h w"], Float64[Tensor, " n"]]]:
        """Return class means, some at a time, with the roots of their numbers of latents."""
        return zip(self.means.split(64), self.counts.sqrt().split(64), strict=True)


class LeadingSketch:
    """Products of the second moments of latents with random directions, for dimensions too large for a covariance.

    Nystrom's method (Halko, Martinsson and Tropp 2011) in one pass over the store (Tropp, Yurtsever, Udell and Cevher
    2017). Its eigenvalues are never too large but for rounding, and the leading ones are the more accurate the faster
    the spectrum falls. Merging is exact up to float64 rounding.
    """

    def __init__(self, dimension: int, directions: int = SKETCH, device: torch.device | str = "cpu") -> None:
        random = torch.randn(
            dimension, min(directions, dimension), generator=generator(0, "sketch", dimension), dtype=torch.float64
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
