"""What samples are compared with: the features of real images, measured once, on disk as other programs have them."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jlt.errors import JLTError
from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.feature_statistics import FeatureStatistics
from jlt.evaluation.metrics import Gaussian
from jlt.storage.files import UNREADABLE_ARRAYS, atomic_path, read_json, why_unreadable, write_json

SCHEMA = 2
SUFFIXES = (".npz", ".pt")
"""Files of statistics: numpy's, as pytorch-fid and ADM write them too, and torch's, as torch-fidelity does."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of pooled features, of spatial ones (sFID) where there are some, and some images' features themselves.

    `kept` are the pooled features of a fixed selection of images, by which precision, recall and the like are measured;
    None where a file does not have them. `protocol` holds what the features are of, as JSON values; it is empty for
    statistics that another program wrote.
    """

    pooled: FeatureStatistics
    spatial: FeatureStatistics | None = None
    kept: Float[Tensor, "m d"] | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def gaussian(self) -> Gaussian:
        """The Gaussian of the pooled features, factored once for all that is compared with it."""
        return self.pooled.gaussian

    @property
    def count(self) -> int | None:
        """Images that were measured; None where a file does not say."""
        return self.pooled.count

    def identity(self) -> dict[str, Any]:
        """Return the SHA-256 of all arrays, the count, and the protocol."""
        digest = hashlib.sha256()
        for array in self._arrays().values():
            digest.update(np.ascontiguousarray(array).data)
        return {"sha256": digest.hexdigest(), "count": self.count, **self.protocol}

    def save(self, path: Path) -> None:
        """Write `mu`, `sigma`, `mu_s`, `sigma_s` and `features` to an .npz, and the identity to a .json beside it."""
        require_npz(path)
        # The identity first: statistics that nobody can place would be taken for a foreign program's.
        write_json(path.with_suffix(".json"), {"schema": SCHEMA, **self.identity()})
        with atomic_path(path) as temporary:
            np.savez(temporary, **self._arrays())  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read an .npz, or a .pt of torch-fidelity's, with the protocol if it lies beside.

        No pickled code is ever run. JLTError for a file that is damaged, holds objects or misses an array, for values
        that are not finite or do not fit together, and for a protocol of other statistics.
        """
        arrays = _read_arrays(path)
        pooled = _moments(path, arrays, "mu", "sigma")
        spatial = _moments(path, arrays, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} & set(arrays) else None
        reference = cls(pooled, spatial, _kept(path, arrays, pooled.dimension))
        beside = path.with_suffix(".json")
        if not beside.is_file():
            return reference
        stored = read_json(beside)
        if stored.get("sha256") != reference.identity()["sha256"]:
            raise JLTError(f"{beside} describes other statistics than {path} holds: one of the two was replaced.")
        pooled.count = stored["count"]
        if spatial:
            spatial.count = stored["count"]
        protocol = {key: value for key, value in stored.items() if key not in ("schema", "sha256", "count")}
        return cls(pooled, spatial, reference.kept, protocol)

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"mu": self.pooled.mean, "sigma": self.pooled.covariance}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        if self.kept is not None:
            arrays["features"] = self.kept
        return {name: tensor.numpy() for name, tensor in arrays.items()}


def require_npz(path: Path) -> None:
    """Raise JLTError for a path that statistics are not written to."""
    if path.suffix != ".npz":
        raise JLTError(f"{path}: statistics are written to a file that ends in .npz.")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise JLTError(f"{path} does not exist: write reference statistics first (jlt reference).")
    names = ("mu", "sigma", "mu_s", "sigma_s", "features")
    try:
        # numpy leaves a damaged file open if it opened it itself.
        with path.open("rb") as stream:
            if path.suffix == ".pt":
                found = _torch_arrays(stream.read())
                return {name: np.asarray(found[name]) for name in names if name in found}
            with np.load(stream, allow_pickle=False) as file:
                if "mu" not in file and "arr_0" in file:
                    raise JLTError(
                        f"{path} holds images (arr_0), not statistics (mu and sigma): jlt evaluate --samples measures "
                        "such images, jlt reference makes statistics of a collection."
                    )
                return {name: file[name] for name in names if name in file}
    except UNREADABLE_ARRAYS as error:
        # numpy refuses object arrays and bare pickles with a ValueError; an .npy has no context to enter.
        why = why_unreadable(error)
        raise JLTError(f"{path} does not hold statistics, arrays of numbers named mu and sigma ({why}).") from error


def _torch_arrays(content: bytes) -> Mapping[str, Any]:
    """Return what torch.save wrote of numpy arrays, by torch's reader that makes nothing but what is named here."""
    if not content.startswith(b"PK"):
        raise ValueError("it is no archive that torch.save wrote")
    import _codecs
    import pickle

    from numpy._core import multiarray

    # Files name these as the numpy that wrote them did.
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
    if mu not in arrays or sigma not in arrays:
        raise JLTError(f"{path} does not hold statistics, arrays of numbers named {mu} and {sigma}.")
    mean, covariance = (_numbers(path, name, arrays[name], np.float64) for name in (mu, sigma))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise JLTError(f"{path} does not hold statistics: {mu} is {mean.shape}, {sigma} is {covariance.shape}.")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max(initial=0)):
        raise JLTError(f"{path} does not hold statistics: {sigma} is not symmetric, so it is no covariance.")
    return FeatureStatistics.of(torch.from_numpy(mean), torch.from_numpy(covariance), None)


def _kept(path: Path, arrays: Mapping[str, np.ndarray], dimension: int) -> Float[Tensor, "m d"] | None:
    if "features" not in arrays:
        return None
    kept = _numbers(path, "features", arrays["features"], np.float32)
    if kept.ndim != 2 or kept.shape[1] != dimension:
        raise JLTError(f"{path} holds features {kept.shape} beside statistics of dimension {dimension}.")
    return torch.from_numpy(kept)


def _numbers(path: Path, name: str, array: np.ndarray, dtype: type) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating) and not np.issubdtype(array.dtype, np.integer):
        raise JLTError(f"{path} does not hold statistics: {name} is of {array.dtype}, not of numbers.")
    numbers: np.ndarray = np.ascontiguousarray(array, dtype=dtype)
    if not np.isfinite(numbers).all():
        raise JLTError(f"{path} holds statistics that are not finite, in {name}.")
    return numbers


def check_reference(reference: Reference, extractor: FeatureExtractor, resolution: int | None = None) -> None:
    """Raise JLTError if a reference is of another extractor or another image size, as far as it says of which it is."""
    mine, theirs = extractor.identity(), reference.protocol.get("extractor")
    _check_dimension("features", reference.pooled.dimension, extractor.dimension, extractor.name)
    if theirs is not None and theirs != mine:
        keys = [key for key in mine if theirs.get(key) != mine[key]]
        keys += [key for key in theirs if key not in mine]
        differing = [f"{key} {theirs.get(key)!r} against {mine.get(key)!r}" for key in keys]
        raise JLTError(f"The reference was made by another extractor ({'; '.join(differing)}): make it anew.")
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
