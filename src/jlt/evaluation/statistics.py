"""Sums over images, in float64 and mergeable: beyond rounding, batches and who counted what do not matter."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from jlt.errors import JLTError
from jlt.evaluation.metrics import inception_score, label_agreement
from jlt.files import atomic_path, read_json, write_json

SCHEMA = 1


class FeatureStatistics:
    """Count, mean and covariance of feature vectors, merged pairwise (Chan, Golub and LeVeque 1983).

    `count` is None for statistics from elsewhere that do not say it: they can be compared with, not added to.
    `protocol` holds what the features are of, as JSON values.
    """

    def __init__(self, dimension: int, protocol: dict[str, Any] | None = None) -> None:
        self.count: int | None = 0
        self.mean: Float64[Tensor, " d"] = torch.zeros(dimension, dtype=torch.float64)
        self._covariance: Float64[Tensor, "d d"] = torch.zeros(dimension, dimension, dtype=torch.float64)
        self.protocol = dict(protocol or {})

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

    def update(self, features: Float[Tensor, "n d"]) -> None:
        """Add feature vectors; JLTError if one of them is not finite."""
        features = features.detach().cpu().double()
        finite: Bool[Tensor, " n"] = features.isfinite().all(dim=1)
        if not finite.all():
            raise JLTError(f"The features of {int((~finite).sum())} images of {len(features)} are not finite.")
        if len(features) == 0:
            return
        batch = FeatureStatistics(self.dimension)
        batch.count = len(features)
        batch.mean = features.mean(dim=0)
        centred = features - batch.mean
        batch._covariance = centred.T @ centred / max(1, len(features) - 1)
        self.merge(batch)

    def merge(self, other: FeatureStatistics) -> None:
        """Add what another one has counted; ValueError if either does not know its count."""
        if self.count is None or other.count is None:
            raise ValueError("statistics whose count is unknown cannot be merged")
        count = self.count + other.count
        if count == 0:
            return
        difference = other.mean - self.mean
        # Sums of squares about the common mean. A side that has counted nothing adds exactly nothing.
        squares = max(0, self.count - 1) * self._covariance + max(0, other.count - 1) * other._covariance
        squares += difference.outer(difference) * (self.count * other.count / count)
        self.mean = self.mean + difference * (other.count / count)
        self._covariance = squares / max(1, count - 1)
        self.count = count

    def identity(self) -> dict[str, Any]:
        """Return the SHA-256 of mean and covariance, the count, and the protocol."""
        digest = hashlib.sha256(self.mean.numpy().tobytes() + self.covariance.contiguous().numpy().tobytes())
        return {"sha256": digest.hexdigest(), "count": self.count, **self.protocol}

    def save(self, path: Path) -> None:
        """Write `mu` and `sigma` to an .npz, as the field exchanges them, and the identity to a .json beside it."""
        if path.suffix != ".npz":
            raise JLTError(f"{path}: statistics are written to a file that ends in .npz.")
        # The identity first: statistics that nobody can place would be taken for a foreign program's.
        write_json(path.with_suffix(".json"), {"schema": SCHEMA, **self.identity()})
        with atomic_path(path) as temporary:
            np.savez(temporary, mu=self.mean.numpy(), sigma=self.covariance.numpy())

    @classmethod
    def load(cls, path: Path) -> FeatureStatistics:
        """Read an .npz with `mu` (d) and `sigma` (d, d), with the protocol if it lies beside.

        No pickle is ever run. JLTError for a file that is damaged, holds objects or misses an array, for values that
        are not finite or do not fit together, and for a protocol of other statistics.
        """
        mean, covariance = _read_moments(path)
        statistics = cls(len(mean))
        statistics.mean, statistics._covariance, statistics.count = mean, covariance, None
        beside = path.with_suffix(".json")
        if beside.is_file():
            protocol = read_json(beside)
            if protocol.get("sha256") != statistics.identity()["sha256"]:
                raise JLTError(f"{beside} describes other statistics than {path} holds: one of the two was replaced.")
            statistics.count = protocol["count"]
            statistics.protocol = {k: v for k, v in protocol.items() if k not in ("schema", "sha256", "count")}
        return statistics


def _read_moments(path: Path) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
    if not path.is_file():
        raise JLTError(f"{path} does not exist: write reference statistics first.")
    try:
        # numpy leaves a damaged file open if it opened it itself.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
    except (OSError, KeyError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        # numpy refuses object arrays and bare pickles with a ValueError; an .npy has no context to enter.
        raise JLTError(f"{path} does not hold statistics, arrays of numbers named mu and sigma ({error}).") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise JLTError(f"{path} does not hold statistics: mu is {mean.shape}, sigma is {covariance.shape}.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise JLTError(f"{path} holds statistics that are not finite.")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max(initial=0)):
        raise JLTError(f"{path} does not hold statistics: sigma is not symmetric, so it is no covariance.")
    return torch.from_numpy(mean), torch.from_numpy(covariance)


class LogitStatistics:
    """Class logits of single images and, where they have any, the labels they were drawn for."""

    def __init__(self) -> None:
        self._logits: list[Float[Tensor, "n k"]] = []
        self._labels: list[Int64[Tensor, " n"]] = []

    @property
    def count(self) -> int:
        """Images so far."""
        return sum(map(len, self._logits))

    def update(self, logits: Float[Tensor, "n k"], labels: Int64[Tensor, " n"] | None = None) -> None:
        """Add the logits of images; either every image has a label or none has (ValueError)."""
        if self._logits and (labels is None) == bool(self._labels):
            raise ValueError("some images have labels and some have none")
        self._logits.append(logits.detach().cpu().float())
        if labels is not None:
            self._labels.append(labels.cpu())

    def merge(self, other: LogitStatistics) -> None:
        """Append another one's images."""
        for index, logits in enumerate(other._logits):
            self.update(logits, other._labels[index] if other._labels else None)

    def inception_score(self, splits: int = 10) -> tuple[float, float]:
        """Return mean and standard deviation over splits, in [1, classes]; JLTError for fewer images than splits."""
        return inception_score(torch.cat(self._logits).softmax(dim=1, dtype=torch.float64).float(), splits)

    def label_agreement(self) -> float | None:
        """Return the share of images that are classified as their label; None without labels."""
        return label_agreement(torch.cat(self._logits), torch.cat(self._labels)) if self._labels else None
