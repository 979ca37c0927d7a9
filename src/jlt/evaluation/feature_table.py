"""Features on disk, one row per image; they are measured from a memory map, so memory does not grow with the count."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jlt.evaluation.extractor import FeatureExtractor, Features
from jlt.evaluation.suite import Columns
from jlt.storage.rows import Column, RowTable


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


def columns_of(table: RowTable, labelled: bool) -> Columns:
    """Return the columns of a full table, with labels if `labelled`."""
    columns = table.read()
    labels = columns.pop("labels")
    return Columns(**columns, labels=labels if labelled else None)
