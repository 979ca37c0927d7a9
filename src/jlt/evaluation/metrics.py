"""Moments and metrics of features in float64, tested against closed forms and against other programs.

A Gaussian with mean m and covariance A represents a set of feature vectors; F is a factor of A, F F^T = A.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from jlt.errors import JLTError
from jlt.storage.rows import blocks

SEED = 2020
"""The seed of torch-fidelity, for the order of images in the inception score and the subsets of the kernel distance."""
KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
BLOCK = 512
"""Rows of a distance matrix in memory at a time."""
TIE = 1e-9
"""Relative difference up to which two squared distances count as equal."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A mean and a symmetric, positive semi-definite covariance; its factor is computed once."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]

    @functools.cached_property
    def factor(self) -> Float64[Tensor, "d r"]:
        """F with as many columns as the covariance has rank, which is below the number of images.

        Zero eigenvalues are dropped: of these only rounding errors are left, and their roots would not be small (1e-16
        becomes 1e-8, once per dimension).
        """
        eigenvalues, eigenvectors = torch.linalg.eigh(self.covariance.double())
        rounding = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues[-1:].clamp_min(0)
        kept = eigenvalues > rounding
        return eigenvectors[:, kept] * eigenvalues[kept].sqrt()

    def distance(self, other: Gaussian) -> float:
        """Return the squared 2-Wasserstein distance (Dowson and Landau 1982; as FID: Heusel et al. 2017).

        |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^1/2), whose last trace is the sum of the singular values of
        F_a^T F_b. This sum is real and finite for singular covariances too, where a general matrix root fails. It keeps
        small values exact, unlike their squares, the eigenvalues of F_a^T B F_a.
        """
        return self._distance(other, torch.linalg.svdvals(self.factor.T @ other.factor).sum())

    def rough_distance(self, other: Gaussian) -> float:
        """Return the distance from those eigenvalues, without a factor of the other one, in a third of the time.

        Rounding adds about 1e-8 of the largest standard deviation for each dimension in which the other has none.
        """
        squares = self.factor.T @ other.covariance.double() @ self.factor
        return self._distance(other, torch.linalg.eigvalsh(squares).clamp_min(0).sqrt().sum())

    def _distance(self, other: Gaussian, overlap: Float64[Tensor, ""]) -> float:
        moved = (self.mean.double() - other.mean.double()).square().sum()
        spread = self.covariance.double().trace() + other.covariance.double().trace()
        return max(0.0, (moved + spread - 2 * overlap).item())


class FeatureStatistics:
    """Count, mean and covariance of feature vectors, merged pairwise (Chan, Golub and LeVeque 1983).

    Beyond rounding they do not depend on batches or on the number of processes.

    `count` is None for statistics of another program that do not contain it: they can be compared, but not merged.
    """

    def __init__(self, dimension: int) -> None:
        self.count: int | None = 0
        self.mean: Float64[Tensor, " d"] = torch.zeros(dimension, dtype=torch.float64)
        self._covariance: Float64[Tensor, "d d"] = torch.zeros(dimension, dimension, dtype=torch.float64)

    @classmethod
    def of(
        cls, mean: Float64[Tensor, " d"], covariance: Float64[Tensor, "d d"], count: int | None
    ) -> FeatureStatistics:
        """Return statistics from moments that were computed before."""
        statistics = cls(0)
        statistics.count, statistics.mean, statistics._covariance = count, mean, covariance
        return statistics

    @classmethod
    def over(cls, features: Float32[np.ndarray, "n d"]) -> FeatureStatistics:
        """Return the statistics of an array, in memory or mapped from a file."""
        statistics = cls(features.shape[1])
        for _, block in blocks(features):
            statistics.update(block)
        return statistics

    @property
    def dimension(self) -> int:
        """Length of a feature vector."""
        return len(self.mean)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """Unbiased covariance, divided by count - 1; JLTError for fewer than two vectors."""
        if self.count is not None and self.count < 2:
            raise JLTError(f"A covariance needs the features of at least 2 images, there are {self.count}.")
        return self._covariance

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian with this mean and covariance, for a Frechet distance."""
        return Gaussian(self.mean, self.covariance)

    def update(self, features: Float[Tensor, "n d"]) -> None:
        """Add feature vectors; JLTError if one of them is not finite."""
        features = features.detach().cpu()
        finite: Bool[Tensor, " n"] = features.isfinite().all(dim=1)
        if not finite.all():
            raise JLTError(f"The features of {int((~finite).sum())} images of {len(features)} are not finite.")
        if len(features) == 0:
            return
        before, added = self._known_count(), len(features)
        rows = torch.empty(added + 1, self.dimension, dtype=torch.float64)
        rows[:added] = features
        mean = rows[:added].mean(dim=0)
        rows[:added] -= mean
        # The difference of the two means is one more row, so that a single product in place computes everything.
        difference = mean - self.mean
        rows[added] = difference * (before * added / (before + added)) ** 0.5
        divisor = max(1, before + added - 1)
        self._covariance.addmm_(rows.T, rows, beta=max(0, before - 1) / divisor, alpha=1 / divisor)
        self.mean = self.mean + difference * (added / (before + added))
        self.count = before + added

    def merge(self, other: FeatureStatistics) -> None:
        """Add the vectors of other statistics; ValueError if either count is unknown."""
        a, b = self._known_count(), other._known_count()
        if b == 0:
            return
        divisor = max(1, a + b - 1)
        difference = other.mean - self.mean
        self._covariance.mul_(max(0, a - 1) / divisor).add_(other._covariance, alpha=max(0, b - 1) / divisor)
        self._covariance.addr_(difference, difference, alpha=a * b / (a + b) / divisor)
        self.mean = self.mean + difference * (b / (a + b))
        self.count = a + b

    def without(self, part: FeatureStatistics) -> FeatureStatistics:
        """Return the statistics without the vectors of `part`: the inverse of `merge`; ValueError if none remain."""
        whole, left_out = self._known_count(), part._known_count()
        rest = whole - left_out
        if rest < 1:
            raise ValueError(f"nothing remains of {whole} vectors without {left_out}")
        divisor = max(1, rest - 1)
        mean = self.mean + (self.mean - part.mean) * (left_out / rest)
        difference = part.mean - mean
        covariance = self._covariance * (max(0, whole - 1) / divisor)
        covariance.add_(part._covariance, alpha=-max(0, left_out - 1) / divisor)
        covariance.addr_(difference, difference, alpha=-rest * left_out / whole / divisor)
        return FeatureStatistics.of(mean, covariance, rest)

    def _known_count(self) -> int:
        if self.count is None:
            raise ValueError("statistics whose count is unknown cannot be merged")
        return self.count


def jackknife(whole: float, without: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Return standard error and bias of an estimate, from estimates that each leave out one group of images.

    `sizes` are the groups' m_j, with sum n. Delete-m_j jackknife for groups of unequal sizes (Busing, Meijer and van
    der Leeden 1999): with h_j = n / m_j and pseudo-values p_j = h_j whole - (h_j - 1) without_j, the bias is
    sum (1 - m_j / n) without_j - (g - 1) whole, the variance mean((p_j - (whole - bias))^2 / (h_j - 1)). For g equal
    groups these are Quenouille's (g - 1)(mean(without) - whole) and Tukey's variance. This is the bias of order 1/n.
    """
    left_out, m = np.array(without, dtype=np.float64), np.array(sizes, dtype=np.float64)
    h = m.sum() / m
    bias = ((1 - 1 / h) * left_out).sum() - (len(m) - 1) * whole
    pseudo = h * whole - (h - 1) * left_out
    variance = ((pseudo - (whole - bias)) ** 2 / (h - 1)).mean()
    return float(np.sqrt(variance)), float(bias)


def inception_score(logits: Float[np.ndarray, "n k"], splits: int = 10) -> tuple[float, float]:
    """Return mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016).

    The splits are equal parts of the images in torch-fidelity's fixed random order; without it, images sorted by class
    would give splits of one class. Logits may be -inf. JLTError for fewer images than splits.
    """
    count = len(logits)
    if count < splits:
        raise JLTError(f"An inception score over {splits} splits needs at least {splits} images, there are {count}.")
    sizes = torch.tensor([(split + 1) * count // splits - split * count // splits for split in range(splits)])
    split_of = torch.empty(count, dtype=torch.int64)
    split_of[torch.from_numpy(np.random.RandomState(SEED).permutation(count))] = torch.arange(splits).repeat_interleave(
        sizes
    )
    # mean KL(p_i || q) = H(q) - mean H(p_i), for q the mean of the p_i.
    total = torch.zeros(splits, logits.shape[1], dtype=torch.float64)
    entropy = torch.zeros(splits, dtype=torch.float64)
    for rows, block in blocks(logits):
        p = block.double().softmax(dim=1)
        total.index_add_(0, split_of[rows], p)
        entropy.index_add_(0, split_of[rows], torch.special.entr(p).sum(dim=1))
    marginal = torch.special.entr(total / sizes[:, None]).sum(dim=1)
    scores = (marginal - entropy / sizes).exp().numpy()
    return float(scores.mean()), float(scores.std())


def label_agreement(logits: Float[Tensor, "n k"], labels: Int64[Tensor, " n"]) -> float:
    """Return the share of images, 0..1, whose highest logit is that of their label."""
    return (logits.argmax(dim=1) == labels.to(logits.device)).double().mean().item()


def kernel_distance(
    samples: Float[Tensor, "n d"],
    real: Float[Tensor, "m d"],
    subsets: int = KERNEL_SUBSETS,
    subset_size: int = KERNEL_SUBSET_SIZE,
) -> tuple[float, float]:
    """Return mean and standard deviation, over random subsets, of the squared MMD (KID: Binkowski et al. 2018).

    The kernel is (x . y / d + 1)^3; the estimate of each subset is unbiased, so it may be negative. Subsets are drawn
    without replacement, as in torch-fidelity, and are not larger than the smaller set. ValueError for fewer than two
    images.
    """
    size = min(subset_size, len(samples), len(real))
    if size < 2:
        raise ValueError("a kernel distance needs two images of each kind")
    random = np.random.RandomState(SEED)
    found = []
    for _ in range(subsets):
        # In the order of torch-fidelity's random numbers.
        x = samples[torch.from_numpy(random.choice(len(samples), size, replace=False))].double()
        y = real[torch.from_numpy(random.choice(len(real), size, replace=False))].double()
        within = _kernel_sum(x, x) - _kernel_diagonal(x) + _kernel_sum(y, y) - _kernel_diagonal(y)
        found.append(within / (size * (size - 1)) - 2 * _kernel_sum(x, y) / size**2)
    return float(np.mean(found)), float(np.std(found))


def _kernel_sum(x: Float64[Tensor, "n d"], y: Float64[Tensor, "n d"]) -> float:
    root = torch.addmm(x.new_ones(1, 1), x, y.T, alpha=1 / x.shape[1]).flatten()
    return torch.dot(root.square(), root).item()


def _kernel_diagonal(x: Float64[Tensor, "n d"]) -> float:
    return (x.square().sum(dim=1) / x.shape[1] + 1).pow(3).sum().item()


@dataclass(frozen=True)
class Overlap:
    """How far samples and real images are in each other's neighbourhoods; all but density are in 0..1."""

    precision: float
    recall: float
    density: float
    coverage: float


def overlap(
    samples: Float[Tensor, "n d"],
    real: Float[Tensor, "m d"],
    precision_neighbours: int = PRECISION_NEIGHBOURS,
    density_neighbours: int = DENSITY_NEIGHBOURS,
) -> Overlap:
    """Return improved precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The ball of an image reaches to its k-th nearest neighbour in its own set; balls are closed. Precision is the share
    of samples in any real image's ball, recall the share of real images in any sample's ball. Density is the number of
    real balls around a sample, over k; coverage is the share of real balls with a sample in them. ValueError for a set
    with no more images than neighbours.
    """
    if min(len(samples), len(real)) <= max(precision_neighbours, density_neighbours):
        raise ValueError("each set needs more images than neighbours")
    centre = real.mean(dim=0, dtype=torch.float64)
    around_samples = _radii(samples, (precision_neighbours,), centre)[0]
    around_real, wide = _radii(real, (precision_neighbours, density_neighbours), centre)
    precise = torch.zeros(len(samples), dtype=torch.bool)
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool) for _ in range(2))
    inside = 0
    for rows, squares in _squared_distances(real, samples, centre):
        precise |= (squares <= around_real[rows, None]).any(dim=0)
        recalled[rows] = (squares <= around_samples).any(dim=1)
        in_wide = squares <= wide[rows, None]
        inside += int(in_wide.sum())
        covered[rows] = in_wide.any(dim=1)
    precision, recall, coverage = (found.double().mean().item() for found in (precise, recalled, covered))
    return Overlap(precision, recall, inside / (density_neighbours * len(samples)), coverage)


def _radii(
    points: Float[Tensor, "n d"], neighbours: Sequence[int], centre: Float64[Tensor, " d"]
) -> list[Float64[Tensor, " n"]]:
    """Return, per k in `neighbours`, each point's squared distance to the k-th nearest other, times 1 + `TIE`."""
    radii = [torch.empty(len(points), dtype=torch.float64) for _ in neighbours]
    for rows, squares in _squared_distances(points, points, centre):
        # A point is not its own neighbour.
        squares[torch.arange(len(squares)), torch.arange(rows.start, rows.start + len(squares))] = torch.inf
        nearest = squares.topk(max(neighbours), dim=1, largest=False).values
        for radius, k in zip(radii, neighbours, strict=True):
            radius[rows] = nearest[:, k - 1] * (1 + TIE)
    return radii


def _squared_distances(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], centre: Float64[Tensor, " d"]
) -> Iterator[tuple[slice, Float64[Tensor, "_ m"]]]:
    """Yield |a_i - b_j|^2 for some rows at a time; only these rows are converted to float64.

    Subtracting a `centre` of the points keeps the digits of the distances.
    """
    for start in range(0, len(a), BLOCK):
        rows = slice(start, start + BLOCK)
        p = a[rows] - centre
        found = torch.empty(len(p), len(b), dtype=torch.float64)
        for left in range(0, len(b), BLOCK):
            columns = slice(left, left + BLOCK)
            q = b[columns] - centre
            found[:, columns] = torch.addmm(q.square().sum(dim=1), p, q.T, alpha=-2)
        yield rows, found.add_(p.square().sum(dim=1, keepdim=True)).clamp_min_(0)
