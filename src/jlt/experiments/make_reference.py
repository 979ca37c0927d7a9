"""A file of reference statistics, made by one or several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jlt.errors import JLTError
from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.reference import (
    KEPT,
    Reference,
    read_reference_file,
    reference_protocol,
    reference_statistics,
    require_npz,
)
from jlt.images.source import ImageSource
from jlt.runtime.processes import join_group
from jlt.runtime.progress import inform
from jlt.storage.files import difference, format_difference
from jlt.storage.rows import require_space


def make_reference(
    source: ImageSource, extractor: FeatureExtractor, resolution: int, out: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Measure the images of a source, write the statistics to `out`, and return their identity.

    Processes that torchrun started share the work. A file of the same images by the same extractor is kept. JLTError
    before the first image for any other existing file, a folder that is not writable and a full disk.
    """
    protocol = reference_protocol(source, extractor, resolution)
    with join_group(device) as group:
        kept = group.on_rank0(lambda: _kept(out, protocol, len(source), extractor))
        if kept is not None:
            return kept
        reference = reference_statistics(source, extractor, resolution, group=group)
        group.on_rank0(lambda: reference.save(out))
    return reference.identity()


def _kept(out: Path, protocol: dict[str, Any], count: int, extractor: FeatureExtractor) -> dict[str, Any] | None:
    """Return the identity of a finished file of the same protocol; None if a new one can be written."""
    require_npz(out)
    protocol_file = out.with_suffix(".json")
    if out.exists():
        reference = Reference.load(out)
        if lines := difference(reference.protocol, protocol):
            raise JLTError(f"{out} holds other statistics ({format_difference(lines)}): name another file.")
        inform(f"{out} is already finished.")
        return reference.identity()
    # A process that was killed between the two files leaves the first one.
    if protocol_file.exists() and read_reference_file(protocol_file).protocol != protocol:
        raise JLTError(f"{protocol_file} exists without {out.name} and has another protocol: name another file.")
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise JLTError(f"{place} is not writable: name another file.")
    needed = sum(8 * size * (size + 1) for size in (extractor.dimension, extractor.spatial_dimension))
    needed += 4 * min(count, KEPT) * extractor.dimension
    require_space(place, needed, "The statistics")
    return None
