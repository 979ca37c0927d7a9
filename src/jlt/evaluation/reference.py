"""References: the features of real images that samples are compared with, in the file formats of other programs."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from jlt.errors import JLTError, UsageError
from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.extractors import shows_digits
from jlt.evaluation.metrics import FeatureStatistics, Gaussian
from jlt.images.crop import Exif
from jlt.images.decoding import default_workers, load_batches
from jlt.images.reading import BadImageError
from jlt.images.registry import open_source
from jlt.images.source import ImageSource
from jlt.results.files import ResultFile, read_result, write_result
from jlt.runtime.processes import Group, SingleProcess, require_same_arguments, stop_together
from jlt.runtime.progress import bar, inform
from jlt.runtime.random_numbers import random_subset
from jlt.storage.codec import Size, from_json, to_json
from jlt.storage.files import UNREADABLE_ARRAYS, atomic_path, read_json, unsealed, why_unreadable
from jlt.storage.folders import remove_leftovers

STATISTICS_SUFFIXES = (".npz", ".pt")
"""Files of statistics: numpy's, which pytorch-fid and ADM use too, and torch's, which torch-fidelity uses."""
UNSEALED = 2
"""The schema of files of earlier versions."""
ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "features")


@dataclass(frozen=True)
class ReferenceFile(ResultFile):
    """The .json next to the .npz of a reference."""

    SCHEMA: ClassVar[int] = 3
    PLACED: ClassVar[bool] = False

    arrays: str
    """SHA-256 of all arrays of the .npz."""
    count: Size | None
    protocol: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of pooled features, of spatial features (sFID) if there are any, and the features of some images.

    `kept` are the pooled features of a fixed selection of images, for precision, recall and the like; None where a file
    has none. `protocol` identifies the extractor and the images as JSON values; it is empty for statistics of another
    program.
    """

    pooled: FeatureStatistics
    spatial: FeatureStatistics | None = None
    kept: Float[Tensor, "m d"] | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def gaussian(self) -> Gaussian:
        """The Gaussian of the pooled features, factored once for all comparisons."""
        return self.pooled.gaussian

    @property
    def count(self) -> int | None:
        """Number of measured images; None where a file does not contain it."""
        return self.pooled.count

    def identity(self) -> dict[str, Any]:
        """Return the SHA-256 of all arrays, the count, and the protocol."""
        digest = hashlib.sha256()
        for array in self._arrays().values():
            digest.update(np.ascontiguousarray(array).data)
        return {"sha256": digest.hexdigest(), "count": self.count, **self.protocol}

    def save(self, path: Path) -> None:
        """Write `mu`, `sigma`, `mu_s`, `sigma_s` and `features` to an .npz, and the identity to a .json next to it."""
        require_npz(path)
        for file in (path, path.with_suffix(".json")):
            remove_leftovers(file.parent, file.name)
        # The identity first, since statistics without it count as another program's.
        facts = ReferenceFile(self.identity()["sha256"], self.count, to_json(self.protocol))
        write_result(path.with_suffix(".json"), facts)
        with atomic_path(path) as temporary:
            np.savez(temporary, **self._arrays())  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read an .npz, or a .pt of torch-fidelity, with the protocol from the .json next to it if there is one.

        Pickled code never runs. JLTError for a file that is damaged, holds objects or misses an array, for values that
        are not finite or inconsistent, and for a protocol of other statistics.
        """
        arrays = _read_arrays(path)
        pooled = _moments(path, arrays, "mu", "sigma")
        spatial = _moments(path, arrays, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} & set(arrays) else None
        kept = None
        if "features" in arrays:
            kept = torch.from_numpy(_numbers(path, "features", arrays["features"], np.float32))
            if kept.ndim != 2 or kept.shape[1] != pooled.dimension:
                shape = tuple(kept.shape)
                raise JLTError(f"{path} holds features {shape}, but statistics of dimension {pooled.dimension}.")
        reference = cls(pooled, spatial, kept)
        protocol_path = path.with_suffix(".json")
        if not protocol_path.is_file():
            return reference
        stored = read_reference_file(protocol_path)
        if stored.arrays != reference.identity()["sha256"]:
            raise JLTError(
                f"{protocol_path} describes other statistics than {path} holds: one of the two was replaced."
            )
        pooled.count = stored.count
        if spatial:
            spatial.count = stored.count
        return cls(pooled, spatial, kept, stored.protocol)

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"mu": self.pooled.mean, "sigma": self.pooled.covariance}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        if self.kept is not None:
            arrays["features"] = self.kept
        return {name: tensor.numpy() for name, tensor in arrays.items()}


def read_reference_file(path: Path) -> ReferenceFile:
    """Read the file that describes statistics; JLTError if it is damaged, or an earlier version wrote it unsealed."""
    if read_json(path).get("schema") == UNSEALED:
        raise unsealed(path)
    return read_result(ReferenceFile, path)


def unsealed_reference(content: Mapping[str, Any]) -> ReferenceFile:
    """Return what a file of the version before seals describes; JLTError if a value in it is not possible."""
    protocol = {key: value for key, value in content.items() if key not in ("schema", "sha256", "count")}
    facts = {"arrays": content.get("sha256"), "count": content.get("count"), "protocol": protocol}
    return from_json(ReferenceFile, facts)


def require_npz(path: Path) -> None:
    """Raise JLTError unless statistics can be written to this path."""
    if path.suffix != ".npz":
        raise JLTError(f"{path}: statistics are written to a file that ends in .npz.")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise JLTError(f"{path} does not exist: write reference statistics first (jlt reference).")
    try:
        # Opened here, since numpy does not close a damaged file that it opened itself.
        with path.open("rb") as stream:
            if path.suffix == ".pt":
                found = _torch_arrays(stream.read())
                return {name: np.asarray(found[name]) for name in ARRAYS if name in found}
            with np.load(stream, allow_pickle=False) as file:
                if "mu" not in file and "arr_0" in file:
                    raise JLTError(
                        f"{path} holds images (arr_0), not statistics (mu and sigma): jlt evaluate --samples measures "
                        "such images, jlt reference makes statistics of a collection."
                    )
                return {name: file[name] for name in ARRAYS if name in file}
    except UNREADABLE_ARRAYS as error:
        # numpy refuses object arrays and pickles with a ValueError; an .npy is no context manager.
        why = why_unreadable(error)
        raise JLTError(f"{path} does not hold statistics, arrays of numbers named mu and sigma ({why}).") from error


def _torch_arrays(content: bytes) -> Mapping[str, Any]:
    """Return numpy arrays that torch.save wrote; torch's reader creates only the types that are listed here."""
    if not content.startswith(b"PK"):
        raise ValueError("it is no archive that torch.save wrote")
    import _codecs
    import pickle

    from numpy._core import multiarray

    # Files contain the name that the writing numpy had for this function.
    reconstruct = [
        (multiarray._reconstruct, f"{name}.multiarray._reconstruct") for name in ("numpy.core", "numpy._core")
    ]
    dtypes = [type(np.dtype(kind)) for kind in (np.float32, np.float64)]
    allowed: list[Any] = [*reconstruct, np.ndarray, np.dtype, *dtypes, _codecs.encode]
    try:
        with torch.serialization.safe_globals(allowed):
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    return found


def _moments(path: Path, arrays: Mapping[str, np.ndarray], mu: str, sigma: str) -> FeatureStatistics:
    wrong = f"{path} does not hold statistics"
    if mu not in arrays or sigma not in arrays:
        raise JLTError(f"{wrong}, arrays of numbers named {mu} and {sigma}.")
    mean, covariance = (_numbers(path, name, arrays[name], np.float64) for name in (mu, sigma))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise JLTError(f"{wrong}: {mu} is {mean.shape}, {sigma} is {covariance.shape}.")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max(initial=0)):
        raise JLTError(f"{wrong}: {sigma} is not symmetric, so it is no covariance.")
    return FeatureStatistics.of(torch.from_numpy(mean), torch.from_numpy(covariance), None)


def _numbers(path: Path, name: str, array: np.ndarray, dtype: type) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating) and not np.issubdtype(array.dtype, np.integer):
        raise JLTError(f"{path} does not hold statistics: {name} is of {array.dtype}, not of numbers.")
    numbers: np.ndarray = np.ascontiguousarray(array, dtype=dtype)
    if not np.isfinite(numbers).all():
        raise JLTError(f"{path} holds statistics that are not finite, in {name}.")
    return numbers


def check_reference(reference: Reference, extractor: FeatureExtractor, resolution: int | None = None) -> None:
    """Raise JLTError if a reference is known to be of another extractor or another image size."""
    mine, theirs = extractor.identity(), reference.protocol.get("extractor")
    _check_dimension("features", reference.pooled.dimension, extractor.dimension, extractor.name)
    if theirs is not None and theirs != mine:
        keys = [key for key in mine if theirs.get(key) != mine[key]]
        keys += [key for key in theirs if key not in mine]
        differing = [f"{key} {theirs.get(key)!r} against {mine.get(key)!r}" for key in keys]
        raise JLTError(f"The reference was made by another extractor ({'; '.join(differing)}): make it again.")
    if reference.spatial is not None and extractor.spatial_dimension:
        _check_dimension("spatial features", reference.spatial.dimension, extractor.spatial_dimension, extractor.name)
    size = reference.protocol.get("resolution")
    if resolution is not None and size not in (None, resolution):
        raise JLTError(
            f"The reference is of images of {size}x{size} pixels, the samples have {resolution}x{resolution}: make a "
            f"reference of that size (jlt reference --resolution {resolution})."
        )


def _check_dimension(what: str, theirs: int, mine: int, name: str) -> None:
    if theirs != mine:
        raise JLTError(
            f"The reference has {what} of dimension {theirs}, the extractor {name!r} gives {mine}: make a reference "
            "with this extractor."
        )


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
    selection = random_subset(len(source), kept)
    pooled, spatial = FeatureStatistics(extractor.dimension), FeatureStatistics(extractor.spatial_dimension)
    rows: dict[int, Float32[np.ndarray, " d"]] = {}
    seen = group.begin()
    with stop_together(group) as until_stopped, bar(f"Reference features of {source.name}", len(source)) as shown:
        workers = default_workers(source, len(share), CHUNKS_PER_WORKER)
        for batch in until_stopped(load_batches(source, share, resolution, exif, workers)):
            if batch.bad:
                raise BadImageError(batch.bad[0].image, batch.bad[0].reason)
            features = extractor(torch.from_numpy(batch.pixels))
            pooled.update(features.pooled)
            if features.spatial is not None:
                spatial.update(features.spatial)
            low, high = np.searchsorted(selection, (batch.rows.start, batch.rows.stop))
            chosen = selection[low:high]
            rows |= zip(chosen.tolist(), features.pooled.float().cpu().numpy()[chosen - batch.rows.start], strict=True)
            shown.show(group.add(seen, len(batch.rows)))
    parts = group.gather((pooled, spatial, rows))

    def merged() -> Reference:
        # In the order of ranks.
        (pooled, spatial, rows), *others = parts
        for part_pooled, part_spatial, part_rows in others:
            pooled.merge(part_pooled)
            spatial.merge(part_spatial)
            rows |= part_rows
        kept = torch.from_numpy(np.stack([rows[number] for number in sorted(rows)])) if rows else None
        return Reference(pooled, spatial if extractor.spatial_dimension else None, kept, protocol)

    return group.on_rank0(merged)


def features_for(name: str, real_images: Callable[[], str | ImageSource]) -> str:
    """Return the extractor to measure real images with: `name`, that of a file of statistics, or `digits` for digits.

    Without a name the images are opened. UsageError for images that need one, JLTError for those that cannot be opened.
    """
    if name:
        return name
    images = real_images()
    if isinstance(images, str) and images.endswith(STATISTICS_SUFFIXES):
        name = Reference.load(Path(images)).protocol.get("extractor", {}).get("name", "")
    elif shows_digits(open_source(images) if isinstance(images, str) else images):
        name = "digits"
    if not name:
        raise UsageError("These images need features that fit them: name some with --features, " + OTHERS)
    return name


OTHERS = "such as inception (on which FID is defined), squeezenet or dinov2."


def reference_protocol(
    source: ImageSource, extractor: FeatureExtractor, resolution: int, exif: Exif = "ignore"
) -> dict[str, Any]:
    """Return the protocol of a reference: its extractor, its images and their size.

    UsageError for the features of digits of any other images.
    """
    if extractor.name == "digits" and not shows_digits(source):
        raise UsageError(f"The features of digits say nothing about {source.name}: name others, {OTHERS}")
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
    if isinstance(images, str) and images.endswith(STATISTICS_SUFFIXES):
        reference = Reference.load(Path(images))
        if not reference.protocol:
            inform(f"{images} does not record the extractor and the image size of its statistics: they are unchecked.")
    else:
        source = open_source(images) if isinstance(images, str) else images
        reference = reference_statistics(source, extractor, resolution, exif, group=group)
    check_reference(reference, extractor, resolution)
    return reference
