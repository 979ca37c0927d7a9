"""Features on disk, a row per image: what is measured is mapped from there, so that memory does not grow with it."""

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
    """Return what was found in images as rows for a table, all but the labels."""
    tensors = {"pooled": features.pooled, "logits": features.logits, "spatial": features.spatial}
    return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items() if tensor is not None}


def columns_of(table: RowTable, labelled: bool) -> Columns:
    """Return a full table for measuring, with labels where they are to be compared."""
    found = table.read()
    return Columns(
        pooled=found["pooled"],
        logits=found.get("logits"),
        spatial=found.get("spatial"),
        labels=found["labels"] if labelled else None,
    )
