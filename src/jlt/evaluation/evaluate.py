"""Images -> features -> statistics -> numbers, in one pass and with no file in between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from jlt.data.crop import Exif
from jlt.data.images import load_pixels
from jlt.data.sources.contract import ImageSource
from jlt.errors import JLTError
from jlt.evaluation.features import FeatureExtractor
from jlt.evaluation.images import LabelledBatch
from jlt.evaluation.metrics import frechet_distance
from jlt.evaluation.statistics import FeatureStatistics, LogitStatistics
from jlt.progress import track

BATCH_SIZE = 128


@dataclass(frozen=True)
class Metrics:
    """What was measured on `count` images; `label_agreement` is None where the images have no labels."""

    frechet_distance: float
    inception_score: float
    inception_score_std: float
    label_agreement: float | None
    count: int


def reference_statistics(
    source: ImageSource, extractor: FeatureExtractor, resolution: int, exif: Exif = "ignore"
) -> FeatureStatistics:
    """Return the feature statistics of all images of a source, brought to `resolution` pixels by the ADM crop.

    BadImageError for an image that does not decode.
    """
    protocol = {"extractor": extractor.identity(), "images": source.identity(), "resolution": resolution}
    if exif != "ignore":
        protocol["exif"] = exif
    statistics = FeatureStatistics(extractor.dimension, protocol)
    for start in track(range(0, len(source), BATCH_SIZE), f"Reference features of {source.name}"):
        indices = range(start, min(start + BATCH_SIZE, len(source)))
        images = np.stack([load_pixels(source, index, resolution, exif)[0] for index in indices])
        statistics.update(extractor(torch.from_numpy(images)).pooled)
    return statistics


def evaluate_images(
    batches: Iterable[LabelledBatch], reference: FeatureStatistics, extractor: FeatureExtractor
) -> Metrics:
    """Measure RGB images 0..255, with the labels they were drawn for or None, against a reference.

    JLTError before the first batch is drawn if the reference is of another extractor, and for fewer than 10 images.
    """
    check_reference(reference, extractor)
    features, logits = FeatureStatistics(extractor.dimension), LogitStatistics()
    for images, labels in batches:
        found = extractor(images)
        features.update(found.pooled)
        logits.update(found.logits, labels)
    score, score_std = logits.inception_score()
    return Metrics(
        frechet_distance=frechet_distance(features.mean, features.covariance, reference.mean, reference.covariance),
        inception_score=score,
        inception_score_std=score_std,
        label_agreement=logits.label_agreement(),
        count=logits.count,
    )


def check_reference(reference: FeatureStatistics, extractor: FeatureExtractor) -> None:
    """Raise JLTError if a reference was not made by this extractor, as far as the reference says by what it was."""
    mine, theirs = extractor.identity(), reference.protocol.get("extractor")
    if reference.dimension != extractor.dimension:
        raise JLTError(
            f"The reference has features of dimension {reference.dimension}, "
            f"the extractor {extractor.name!r} gives {extractor.dimension}: make a reference with this extractor."
        )
    if theirs is not None and theirs != mine:
        differing = [
            f"{key} {theirs.get(key)!r} against {mine.get(key)!r}" for key in mine if theirs.get(key) != mine[key]
        ]
        raise JLTError(f"The reference was made by another extractor ({'; '.join(differing)}): make it anew.")
