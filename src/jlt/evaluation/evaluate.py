"""Images -> features -> numbers, in one pass and with no file in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from jlt.errors import JLTError
from jlt.evaluation.features import FeatureExtractor, Features
from jlt.evaluation.images import LabelledBatch
from jlt.evaluation.measure import Columns, Metrics, measure
from jlt.evaluation.real import CHUNK
from jlt.evaluation.reference import Reference, check_reference


def evaluate_images(batches: Iterable[LabelledBatch], reference: Reference, extractor: FeatureExtractor) -> Metrics:
    """Measure RGB images 0..255, with the labels they were drawn for or None, against a reference.

    JLTError before the first batch is drawn if the reference is of another extractor, at the first batch if it is of
    images of another size, and for fewer than 10 images.
    """
    check_reference(reference, extractor)
    found: list[Features] = []
    labels: list[Int64[Tensor, " _"]] = []
    for images, chunk_labels in in_chunks(batches, CHUNK):
        if not found:
            check_reference(reference, extractor, images.shape[1])
        found.append(extractor(images))
        labels += [] if chunk_labels is None else [chunk_labels]
    if not found:
        raise JLTError("There are no images to measure.")
    columns = Columns(
        pooled=torch.cat([features.pooled for features in found]).float().cpu().numpy(),
        logits=_column([features.logits for features in found]),
        spatial=_column([features.spatial for features in found]),
        labels=torch.cat(labels).cpu().numpy() if labels else None,
    )
    return measure(columns, reference, extractor)


def in_chunks(batches: Iterable[LabelledBatch], size: int = CHUNK) -> Iterator[LabelledBatch]:
    """Yield the same images in batches of `size`, the last of what remains; ValueError if only some have labels."""
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


def _column(parts: list[Tensor | None]) -> np.ndarray | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present).float().cpu().numpy() if present else None
