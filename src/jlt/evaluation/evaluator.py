"""Existing images -> features -> numbers, in one pass."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.feature_table import arrays_of, columns_of, open_table
from jlt.evaluation.image_files import LabelledBatch
from jlt.evaluation.real_images import CHUNK
from jlt.evaluation.reference import Reference, check_reference
from jlt.evaluation.suite import measure, require_enough
from jlt.results.evaluation import Metrics


def evaluate_images(
    batches: Iterable[LabelledBatch], reference: Reference, extractor: FeatureExtractor, count: int
) -> Metrics:
    """Measure `count` RGB images 0..255, with the labels they were drawn for or None, against a reference.

    A temporary folder holds their features. JLTError before the first batch for a reference of another extractor, fewer
    than 10 images or a disk without room; at the first batch for a reference of another image size. ValueError unless
    there are `count` images.
    """
    check_reference(reference, extractor)
    require_enough(count)
    with tempfile.TemporaryDirectory(prefix="jlt-") as folder:
        table = open_table(Path(folder) / "features", extractor, count)
        start, labelled = 0, False
        for images, labels in in_chunks(batches, CHUNK):
            if start == 0:
                check_reference(reference, extractor, images.shape[1])
                labelled = labels is not None
            if start + len(images) > count:
                break
            numbers = np.full(len(images), -1) if labels is None else labels.cpu().numpy()
            table.write(start, {**arrays_of(extractor(images)), "labels": numbers})
            start += len(images)
        if start != count:
            raise ValueError(f"{count} images were expected, and there are more or fewer")
        return measure(columns_of(table, labelled), reference, extractor)[0]


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
