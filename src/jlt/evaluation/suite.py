"""Existing images -> their features on disk, one row per image -> numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from jlt.errors import JLTError
from jlt.evaluation.extractor import FeatureExtractor, Features
from jlt.evaluation.image_files import LabelledBatch
from jlt.evaluation.metrics import (
    DENSITY_NEIGHBOURS,
    FeatureStatistics,
    Gaussian,
    inception_score,
    jackknife,
    kernel_distance,
    label_agreement,
    overlap,
)
from jlt.evaluation.reference import CHUNK, KEPT, Reference, check_reference
from jlt.results.evaluation import Metrics
from jlt.runtime.random_numbers import random_subset
from jlt.storage.rows import Column, RowTable, blocks, take

GROUPS = 10
"""Groups of the jackknife, and the fewest images that are measured."""
GROUP_RUN = 64
"""Consecutive images that belong to one group."""
RUNS_AT_ONCE = 16
IMAGES_FOR_BIAS = 5
"""Images per dimension from which on the jackknife estimates the bias; with fewer it does not fall as 1 / count."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The features of images in the order of their numbers: arrays in memory, or mapped from a file.

    `logits` and `spatial` are None if the extractor has none. `class_logits` is the logit of each class, None if
    `labels` cannot be compared with the logits.
    """

    pooled: Float32[np.ndarray, "n d"]
    logits: Float[np.ndarray, "n k"] | None = None
    spatial: Float32[np.ndarray, "n s"] | None = None
    labels: Int64[np.ndarray, " n"] | None = None
    class_logits: Sequence[int] | None = None


@dataclass(frozen=True)
class LeftOut:
    """The data of a jackknife over groups of images; differences of two give the error of the difference.

    `rough` is the distance of all images, and `without` the distances that each leave out one group, of `sizes` images;
    both have rounding errors that `distance` has not. The reference is the same in all.
    """

    distance: float
    rough: float
    without: Sequence[float]
    sizes: Sequence[int]

    def error_and_bias(self) -> tuple[float, float]:
        """Return the standard error of the distance, and its excess because of the finite number of images."""
        return jackknife(self.rough, self.without, self.sizes)


def measure(columns: Columns, reference: Reference, extractor: FeatureExtractor) -> tuple[Metrics, LeftOut]:
    """Measure images by their features; return also the jackknife data of the Frechet distance.

    JLTError for a reference of another extractor and for fewer than 10 images.
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
        if columns.labels is not None and columns.class_logits is not None:
            labels, classes = torch.from_numpy(np.array(columns.labels)), list(columns.class_logits)
            agreeing = (
                label_agreement(part[:, classes], labels[rows]) * len(part) for rows, part in blocks(columns.logits)
            )
            found["label_agreement"] = sum(agreeing) / count
    if columns.spatial is not None and reference.spatial is not None:
        spatial = FeatureStatistics.over(columns.spatial)
        found["spatial_frechet_distance"] = reference.spatial.gaussian.distance(spatial.gaussian)
    if reference.kept is not None and len(reference.kept) > DENSITY_NEIGHBOURS:
        samples = take(columns.pooled, random_subset(count, KEPT))
        found["kernel_distance"], found["kernel_distance_std"] = kernel_distance(samples, reference.kept)
        found |= asdict(overlap(samples, reference.kept))
    return Metrics(frechet_distance=left_out.distance, count=count, **found), left_out


def require_enough(count: int) -> None:
    """Raise JLTError for fewer images than an evaluation needs."""
    if count < GROUPS:
        raise JLTError(f"An evaluation needs at least {GROUPS} images, there are {count}.")


def frechet_without_groups(pooled: Float32[np.ndarray, "n d"], reference: Gaussian) -> LeftOut:
    """Return the Frechet distances of images to a reference, of all and without each of 10 groups."""
    whole = FeatureStatistics.over(pooled)
    distance = reference.distance(whole.gaussian)
    # These eleven distances are compared only with each other, so the faster formula is exact enough.
    rough = reference.rough_distance(whole.gaussian)
    groups, without, sizes = group_of(len(pooled)), [], []
    for group in range(GROUPS):
        # Read again for each group: ten covariances at a time would be half of all memory in use here.
        members = np.flatnonzero(groups == group)
        part = FeatureStatistics(pooled.shape[1])
        for start in range(0, len(members), GROUP_RUN * RUNS_AT_ONCE):
            part.update(take(pooled, members[start : start + GROUP_RUN * RUNS_AT_ONCE]))
        without.append(reference.rough_distance(whole.without(part).gaussian))
        sizes.append(len(members))
    return LeftOut(distance, rough, without, sizes)


def group_of(count: int) -> Int64[np.ndarray, " n"]:
    """Return each image's group, 0..9: runs of consecutive images, so that labels i mod K are balanced in each.

    Runs of 64 go to the groups in turn if there are enough images for ten of them; fewer images are cut into ten runs.
    Images sorted by class give groups of different classes, and then the error is overestimated.
    """
    numbers = np.arange(count)
    return numbers * GROUPS // max(1, count) if count < GROUP_RUN * GROUPS else numbers // GROUP_RUN % GROUPS


def open_table(folder: Path, extractor: FeatureExtractor, count: int) -> RowTable:
    """Open the table of the features of `count` images; JLTError for a disk without room."""
    columns: dict[str, Column] = {"pooled": (np.float32, (extractor.dimension,)), "labels": (np.int64, ())}
    if extractor.num_classes:
        columns["logits"] = (np.float32, (extractor.num_classes,))
    if extractor.spatial_dimension:
        columns["spatial"] = (np.float32, (extractor.spatial_dimension,))
    return RowTable(folder, columns, count)


def arrays_of(features: Features) -> dict[str, np.ndarray]:
    """Return the features of images as rows of a table, without the labels."""
    tensors = {"pooled": features.pooled, "logits": features.logits, "spatial": features.spatial}
    return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items() if tensor is not None}


def evaluate_images(
    batches: Iterable[LabelledBatch],
    reference: Reference,
    extractor: FeatureExtractor,
    count: int,
    class_logits: Sequence[int] | None = None,
) -> Metrics:
    """Measure `count` RGB images 0..255, with the labels they were drawn for or None, against a reference.

    `class_logits` is that of `Columns`. A temporary folder holds the features. JLTError before the first batch for a
    reference of another extractor, fewer than 10 images or a disk without room; at the first batch for a reference of
    another image size. ValueError unless there are `count` images.
    """
    check_reference(reference, extractor)
    require_enough(count)
    with tempfile.TemporaryDirectory(prefix="jlt-") as folder:
        table = open_table(Path(folder) / "features", extractor, count)
        start = 0
        for images, labels in in_chunks(batches, CHUNK):
            if start == 0:
                check_reference(reference, extractor, images.shape[1])
            if start + len(images) > count:
                break
            class_logits = None if labels is None else class_logits
            numbers = np.full(len(images), -1) if labels is None else labels.cpu().numpy()
            table.write(start, {**arrays_of(extractor(images)), "labels": numbers})
            start += len(images)
        if start != count:
            raise ValueError(f"{count} images were expected, and there are more or fewer")
        return measure(Columns(**table.read(), class_logits=class_logits), reference, extractor)[0]


def in_chunks(batches: Iterable[LabelledBatch], size: int = CHUNK) -> Iterator[LabelledBatch]:
    """Yield the same images in batches of `size`, the last one smaller; ValueError if only some have labels."""
    images: list[UInt8[Tensor, "_ h w 3"]] = []
    labels: list[Int64[Tensor, " _"]] = []
    waiting, labelled = 0, None
    for batch, batch_labels in batches:
        if labelled not in (None, batch_labels is not None):
            raise ValueError("some images have labels and some have none")
        labelled = batch_labels is not None
        images.append(batch)
        labels += [] if batch_labels is None else [batch_labels]
        waiting += len(batch)
        if waiting < size:
            continue
        all_images, all_labels = torch.cat(images), torch.cat(labels) if labelled else None
        whole = waiting - waiting % size
        for start in range(0, whole, size):
            part = slice(start, start + size)
            yield all_images[part], None if all_labels is None else all_labels[part]
        images, labels = [all_images[whole:]], [] if all_labels is None else [all_labels[whole:]]
        waiting -= whole
    if waiting:
        yield torch.cat(images), torch.cat(labels) if labelled else None
