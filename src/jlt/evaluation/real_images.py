"""Real images -> reference, in one pass that several processes share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.feature_statistics import FeatureStatistics
from jlt.evaluation.reference import SUFFIXES, Reference, check_reference
from jlt.images.crop import Exif
from jlt.images.decoding import load_batches
from jlt.images.registry import open_source
from jlt.images.source import BadImageError, ImageSource
from jlt.runtime.environment import cores
from jlt.runtime.processes import Group, SingleProcess, local_world_size, require_same_arguments, stop_together
from jlt.runtime.progress import bar, inform
from jlt.runtime.random_numbers import random_subset

CHUNK = 64
"""Images that an extractor sees at a time, always the same by their numbers: its last digits may depend on it."""
KEPT = 10_000
"""Images whose features are kept for precision, recall and the like: 80 MB of 2048 dimensions."""
MAX_WORKERS = 16
CHUNKS_PER_WORKER = 16
"""With less to do than this, starting a worker takes longer than its work."""


def reference_statistics(
    source: ImageSource,
    extractor: FeatureExtractor,
    resolution: int,
    exif: Exif = "ignore",
    kept: int = KEPT,
    group: Group | None = None,
) -> Reference:
    """Measure all images of a source, brought to `resolution` pixels by the ADM crop.

    The processes of `group` share the images and all return the same; how many there are moves the last digits of the
    moments. BadImageError for an image that does not decode, JLTError if the processes have unlike words, Stopped when
    asked to end.
    """
    group = group or SingleProcess()
    protocol = reference_protocol(source, extractor, resolution, exif)
    require_same_arguments(group, protocol, "measure")
    chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    mine = _Share(extractor, random_subset(len(source), kept))
    share = chunks[group.rank :: group.size]
    seen = group.begin()
    with stop_together(group) as until_stopped, bar(f"Reference features of {source.name}", len(source)) as shown:
        workers = _workers(source, len(share))
        for batch in until_stopped(load_batches(source, share, resolution, exif, workers)):
            if batch.bad:
                raise BadImageError(batch.bad[0].image, batch.bad[0].reason)
            mine.add(batch.rows, torch.from_numpy(batch.pixels))
            shown.show(group.add(seen, len(batch.rows)))
    # In the order of ranks, on the first process.
    parts = group.gather((mine.pooled, mine.spatial, mine.numbers, mine.kept))
    return group.on_rank0(lambda: _merged(parts, extractor, protocol))


def reference_protocol(
    source: ImageSource, extractor: FeatureExtractor, resolution: int, exif: Exif = "ignore"
) -> dict[str, Any]:
    """Return what a reference says of what it was made of."""
    protocol = {"extractor": extractor.identity(), "images": source.identity(), "resolution": resolution}
    return protocol if exif == "ignore" else {**protocol, "exif": exif}


def open_reference(
    images: str | ImageSource,
    extractor: FeatureExtractor,
    resolution: int,
    exif: Exif = "ignore",
    group: Group | None = None,
) -> Reference:
    """Read statistics from a file, or measure those of a source of images.

    JLTError for those of another extractor or of images of another size.
    """
    if isinstance(images, str) and images.endswith(SUFFIXES):
        reference = Reference.load(Path(images))
        if not reference.protocol:
            inform(f"{images}: nothing says by which extractor its statistics were made, nor of images of which size.")
    else:
        source = open_source(images) if isinstance(images, str) else images
        reference = reference_statistics(source, extractor, resolution, exif, group=group)
    check_reference(reference, extractor, resolution)
    return reference


class _Share:
    """What one process has measured."""

    def __init__(self, extractor: FeatureExtractor, wanted: Int64[np.ndarray, " m"]) -> None:
        self._extractor, self._wanted = extractor, wanted
        self.pooled = FeatureStatistics(extractor.dimension)
        self.spatial = FeatureStatistics(extractor.spatial_dimension) if extractor.spatial_dimension else None
        self.numbers: list[int] = []
        self.kept: list[Float32[np.ndarray, " d"]] = []

    def add(self, rows: range, images: Tensor) -> None:
        features = self._extractor(images)
        self.pooled.update(features.pooled)
        if self.spatial is not None and features.spatial is not None:
            self.spatial.update(features.spatial)
        low, high = np.searchsorted(self._wanted, (rows.start, rows.stop))
        pooled = features.pooled.float().cpu().numpy()
        for number in self._wanted[low:high].tolist():
            self.numbers.append(number)
            self.kept.append(pooled[number - rows.start].copy())


def _merged(parts: Sequence[Any], extractor: FeatureExtractor, protocol: dict[str, Any]) -> Reference:
    pooled = FeatureStatistics(extractor.dimension)
    spatial = FeatureStatistics(extractor.spatial_dimension) if extractor.spatial_dimension else None
    rows: dict[int, Float32[np.ndarray, " d"]] = {}
    for part, part_spatial, numbers, kept in parts:
        pooled.merge(part)
        if spatial is not None:
            spatial.merge(part_spatial)
        rows |= dict(zip(numbers, kept, strict=True))
    features = torch.from_numpy(np.stack([rows[number] for number in sorted(rows)])) if rows else None
    return Reference(pooled, spatial, features, protocol)


def _workers(source: ImageSource, chunks: int) -> int:
    if source.in_memory:
        return 0
    return min(MAX_WORKERS, max(1, cores() // local_world_size()), chunks // CHUNKS_PER_WORKER)
