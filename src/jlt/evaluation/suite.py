"""Columns of features, a row per image -> numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from jlt.errors import JLTError
from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.feature_statistics import FeatureStatistics
from jlt.evaluation.metrics import (
    DENSITY_NEIGHBOURS,
    Gaussian,
    inception_score,
    jackknife,
    kernel_distance,
    label_agreement,
    overlap,
)
from jlt.evaluation.real_images import KEPT
from jlt.evaluation.reference import Reference, check_reference
from jlt.results.evaluation import Metrics
from jlt.runtime.random_numbers import random_subset
from jlt.storage.blocks import blocks, take

GROUPS = 10
"""Parts of the jackknife, and fewest images that are measured."""
GROUP_RUN = 64
"""Consecutive images that belong to one part."""
RUNS_AT_ONCE = 16
IMAGES_FOR_BIAS = 5
"""Images for each dimension from which the jackknife tells the bias: with fewer it is no longer as 1 / count."""


@dataclass(frozen=True, eq=False)
class Columns:
    """What an extractor found in images, in the order of their numbers: arrays in memory, or mapped from a file.

    `logits` and `spatial` are None where it gives none, `labels` where the images have none to be compared with.
    """

    pooled: Float32[np.ndarray, "n d"]
    logits: Float[np.ndarray, "n k"] | None = None
    spatial: Float32[np.ndarray, "n s"] | None = None
    labels: Int64[np.ndarray, " n"] | None = None


@dataclass(frozen=True)
class LeftOut:
    """What a jackknife over groups of images is made of: differences of two have the error of the difference.

    The `rough` distance of all images, and those `without` one group of so many images (`sizes`) each, by one rule;
    `distance` is the exact one. The reference is taken as it is: its own images are the same for all.
    """

    distance: float
    rough: float
    without: Sequence[float]
    sizes: Sequence[int]

    def error_and_bias(self) -> tuple[float, float]:
        """Return the standard error of the distance, and by how much it is too large for want of images."""
        return jackknife(self.rough, self.without, self.sizes)


def measure(columns: Columns, reference: Reference, extractor: FeatureExtractor) -> tuple[Metrics, LeftOut]:
    """Measure images by their features; return also what the error of the Frechet distance was found from.

    JLTError for another extractor's reference and for fewer than 10 images.
    """
    check_reference(reference, extractor)
    count = len(columns.pooled)
    require_enough(count)
    left_out = frechet_without_groups(columns.pooled, reference.gaussian)
    error, bias = left_out.error_and_bias()
    found: dict[str, float] = {"frechet_distance_error": error}
    if count >= IMAGES_FOR_BIAS * extractor.dimension:
        found["frechet_distance_bias"] = bias
    if columns.logits is not None:
        found["inception_score"], found["inception_score_std"] = inception_score(columns.logits)
        found["inception_score_whole"], _ = inception_score(columns.logits, splits=1)
        if columns.labels is not None:
            found["label_agreement"] = _label_agreement(columns.logits, columns.labels)
    if columns.spatial is not None and reference.spatial is not None:
        spatial = FeatureStatistics(columns.spatial.shape[1])
        for _, block in blocks(columns.spatial):
            spatial.update(block)
        found["spatial_frechet_distance"] = reference.spatial.gaussian.distance(spatial.gaussian)
    if reference.kept is not None and len(reference.kept) > DENSITY_NEIGHBOURS:
        found |= _of_single_images(columns.pooled, reference.kept)
    return Metrics(frechet_distance=left_out.distance, count=count, **found), left_out


def require_enough(count: int) -> None:
    """Raise JLTError for fewer images than an evaluation needs."""
    if count < GROUPS:
        raise JLTError(f"An evaluation needs at least {GROUPS} images, there are {count}.")


def frechet_without_groups(pooled: Float32[np.ndarray, "n d"], reference: Gaussian) -> LeftOut:
    """Return the Frechet distances of images to a reference, of all and without each of 10 groups."""
    whole = FeatureStatistics(pooled.shape[1])
    for _, block in blocks(pooled):
        whole.update(block)
    distance = reference.distance(whole.gaussian)
    # Among themselves these are exact enough, and there are eleven.
    rough = reference.rough_distance(whole.gaussian)
    groups, without, sizes = group_of(len(pooled)), [], []
    for group in range(GROUPS):
        # Read once more: ten covariances at a time would be half of all memory that is needed here.
        part = _statistics_of(pooled, np.flatnonzero(groups == group))
        without.append(reference.rough_distance(whole.without(part).gaussian))
        sizes.append(part.count or 0)
    return LeftOut(distance, rough, without, sizes)


def _statistics_of(pooled: Float32[np.ndarray, "n d"], members: Int64[np.ndarray, " m"]) -> FeatureStatistics:
    part = FeatureStatistics(pooled.shape[1])
    for start in range(0, len(members), GROUP_RUN * RUNS_AT_ONCE):
        part.update(take(pooled, members[start : start + GROUP_RUN * RUNS_AT_ONCE]))
    return part


def group_of(count: int) -> Int64[np.ndarray, " n"]:
    """Return each image's group, 0..9: runs of consecutive images, so that labels i mod K are balanced in each.

    Runs of 64 take turns where there are enough images for ten of them; fewer are cut into ten runs. Images that are
    sorted by class make groups of unlike classes, and the error is then overestimated.
    """
    numbers = np.arange(count)
    return numbers * GROUPS // max(1, count) if count < GROUP_RUN * GROUPS else numbers // GROUP_RUN % GROUPS


def _label_agreement(logits: Float[np.ndarray, "n k"], labels: Int64[np.ndarray, " n"]) -> float:
    wanted = torch.from_numpy(np.array(labels))
    return sum(label_agreement(part, wanted[rows]) * len(part) for rows, part in blocks(logits)) / len(logits)


def _of_single_images(pooled: Float32[np.ndarray, "n d"], real: Float[Tensor, "m d"]) -> dict[str, float]:
    samples = take(pooled, random_subset(len(pooled), KEPT))
    distance, spread = kernel_distance(samples, real)
    near = overlap(samples, real)
    return {
        "kernel_distance": distance,
        "kernel_distance_std": spread,
        "precision": near.precision,
        "recall": near.recall,
        "density": near.density,
        "coverage": near.coverage,
    }
