"""Moments of features in float64; beyond rounding they do not depend on batches or on the number of processes."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from jlt.errors import JLTError
from jlt.evaluation.metrics import Gaussian
from jlt.storage.rows import blocks


class FeatureStatistics:
    """Count, mean and covariance of feature vectors, merged pairwise (Chan, Golub and LeVeque 1983).

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
