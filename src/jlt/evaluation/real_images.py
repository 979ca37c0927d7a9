"""Real images -> reference, in one pass that several processes share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64

from jlt.evaluation.extractor import FeatureExtractor, Features
from jlt.evaluation.feature_statistics import FeatureStatistics
from jlt.evaluation.reference import SUFFIXES, Reference, check_reference
from jlt.images.crop import Exif
from jlt.images.decoding import default_workers, load_batches
from jlt.images.registry import open_source
from jlt.images.source import BadImageError, ImageSource
from jlt.runtime.processes import Group, SingleProcess, require_same_arguments, stop_together
from jlt.runtime.progress import bar, inform
from jlt.runtime.random_numbers import random_subset

CHUNK = 64
"""Images per call of an extractor. Chunks are fixed by the images' numbers, since last digits depend on the chunk."""
KEPT = 10_000
"""Images whose features are kept for precision, recall and the like: 80 MB of 2048 dimensions."""
CHUNKS_PER_WORKER = 16
"""With fewer chunks, a worker takes longer to start than to work."""


def reference_statistics(
    source: ImageSource,
    extractor: FeatureExtractor,
    resolution: int,
    exif: Exif = "ignore",
    kept: int = KEPT,
    group: Group | None = None,
) -> Reference:
    """Measure all images of a source, brought to `resolution` pixels by the ADM crop.

    The processes of `group` share the images and all return the same result; their number changes last digits of the
    moments. BadImageError for an image that does not decode, JLTError for processes with different arguments, Stopped
    on a request to stop.
    """
    group = group or SingleProcess()
    protocol = reference_protocol(source, extractor, resolution, exif)
    require_same_arguments(group, protocol, "measure")
    chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    share = chunks[group.rank :: group.size]
    measured, selection = _Measured.empty(extractor), random_subset(len(source), kept)
    seen = group.begin()
    with stop_together(group) as until_stopped, bar(f"Reference features of {source.name}", len(source)) as shown:
        workers = default_workers(source, len(share), CHUNKS_PER_WORKER)
        for batch in until_stopped(load_batches(source, share, resolution, exif, workers)):
            if batch.bad:
                raise BadImageError(batch.bad[0].image, batch.bad[0].reason)
            measured.add(batch.rows, extractor(torch.from_numpy(batch.pixels)), selection)
            shown.show(group.add(seen, len(batch.rows)))
    parts = group.gather(measured)

    def merged() -> Reference:
        # In the order of ranks.
        whole = _Measured.empty(extractor)
        for part in parts:
            whole.merge(part)
        return whole.reference(protocol)

    return group.on_rank0(merged)


def reference_protocol(
    source: ImageSource, extractor: FeatureExtractor, resolution: int, exif: Exif = "ignore"
) -> dict[str, Any]:
    """Return the protocol of a reference: its extractor, its images and their size."""
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
            inform(f"{images} does not record the extractor and the image size of its statistics: they are unchecked.")
    else:
        source = open_source(images) if isinstance(images, str) else images
        reference = reference_statistics(source, extractor, resolution, exif, group=group)
    check_reference(reference, extractor, resolution)
    return reference


@dataclass
class _Measured:
    """The statistics of one process's images, and the pooled features of its selected images by their numbers."""

    pooled: FeatureStatistics
    spatial: FeatureStatistics | None
    kept: dict[int, Float32[np.ndarray, " d"]] = field(default_factory=dict)

    @classmethod
    def empty(cls, extractor: FeatureExtractor) -> _Measured:
        spatial = FeatureStatistics(extractor.spatial_dimension) if extractor.spatial_dimension else None
        return cls(FeatureStatistics(extractor.dimension), spatial)

    def add(self, rows: range, features: Features, selection: Int64[np.ndarray, " m"]) -> None:
        """Add the features of the images numbered `rows`; keep those of the ascending numbers in `selection`."""
        self.pooled.update(features.pooled)
        if self.spatial is not None and features.spatial is not None:
            self.spatial.update(features.spatial)
        low, high = np.searchsorted(selection, (rows.start, rows.stop))
        pooled = features.pooled.float().cpu().numpy()
        for number in selection[low:high].tolist():
            self.kept[number] = pooled[number - rows.start].copy()

    def merge(self, other: _Measured) -> None:
        self.pooled.merge(other.pooled)
        if self.spatial is not None and other.spatial is not None:
            self.spatial.merge(other.spatial)
        self.kept |= other.kept

    def reference(self, protocol: dict[str, Any]) -> Reference:
        kept = [self.kept[number] for number in sorted(self.kept)]
        return Reference(self.pooled, self.spatial, torch.from_numpy(np.stack(kept)) if kept else None, protocol)
