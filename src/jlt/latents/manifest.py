"""The manifest of a latent store: its origin, its content, moments, and the hash of each file and of itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float

from jlt.config import LatentShape
from jlt.errors import JLTError
from jlt.images.source import SkippedImage
from jlt.ranges import Range
from jlt.storage.codec import NonNegative, Size, from_json, to_json
from jlt.storage.files import read_sealed_json, sealed_sha256, sealed_text, sha256_file, write_text
from jlt.storage.folders import stays_inside

SCHEMA = 1
MANIFEST_NAME = "manifest.json"


Side = Annotated[int, Range(1, 2**16)]
"""Channels, and positions along a side of a latent."""
Pixels = Annotated[int, Range(1, 2**17)]


@dataclass(frozen=True)
class ShardRecord:
    """One shard file: its name in the store, its number of latents, its size in bytes and its SHA-256."""

    file: str
    count: Size
    bytes: Size
    sha256: str

    @classmethod
    def of(cls, path: Path, count: int) -> ShardRecord:
        """Return the record of a finished shard of `count` latents."""
        return cls(path.name, count, path.stat().st_size, sha256_file(path))


@dataclass(frozen=True)
class StoreManifest:
    """The facts about a latent store that its readers need.

    `autoencoder` and `source` are identities. `encoding` holds the other settings that decide the latents (crop, exif,
    precision, batch_size, shard_size, threads); it is None for latents that another program wrote. `made_with` lists
    the devices and versions that wrote the shards: one, unless an encoding was resumed on another machine. Moments and
    extremes are those of the stored latents, both orientations together; `mean` and `std` are over all values.
    """

    autoencoder: dict[str, Any]
    source: dict[str, Any]
    encoding: dict[str, Any] | None
    resolution: Pixels
    flips: bool
    dtype: Literal["float16", "float32"]
    channels: Side
    height: Side
    width: Side
    class_names: tuple[str, ...]
    count: Size
    skipped: tuple[SkippedImage, ...]
    made_with: tuple[dict[str, str], ...]
    mean: float
    std: NonNegative
    minimum: float
    maximum: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[NonNegative, ...]
    shards: tuple[ShardRecord, ...]

    @property
    def shape(self) -> LatentShape:
        """The latents' shape and number of classes."""
        return LatentShape(self.channels, self.height, self.width, len(self.class_names))

    def latents_shape(self, count: int) -> tuple[int, int, int, int]:
        """Return the shape of a tensor of `count` latents."""
        return count, self.channels, self.height, self.width

    @property
    def orientations(self) -> tuple[str, ...]:
        """The names of the tensors of latents in each shard."""
        return ("latents", "latents_flip") if self.flips else ("latents",)

    def content(self) -> dict[str, Any]:
        """Return the manifest as JSON values, without its own hash."""
        return {"schema": SCHEMA, **to_json(self)}

    def sha256(self) -> str:
        """Return the hash of the content, which is the last field of the file."""
        return sealed_sha256(self.content())


def write_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Write the manifest atomically. It is written last, so a folder with a manifest is complete."""
    write_text(folder / MANIFEST_NAME, sealed_text(manifest.content()))


def no_store(folder: Path) -> JLTError:
    """Return the error for a folder without a manifest."""
    what = "is not a latent store" if folder.exists() else "does not exist"
    return JLTError(f"{folder} {what}: make a latent store of your images with jlt encode.")


def read_manifest(folder: Path) -> StoreManifest:
    """Read a manifest; JLTError if it is missing, damaged, edited, inconsistent or of another schema version."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise no_store(folder)
    content = read_sealed_json(path)
    schema = content.pop("schema", None)
    if schema != SCHEMA:
        raise JLTError(f"{path} has schema version {schema}, and this version of jlt reads {SCHEMA}.")
    try:
        manifest = from_json(StoreManifest, content)
    except JLTError as error:
        raise JLTError(f"{path} is not the manifest of a latent store: {error}") from error
    if fault := _inconsistency(manifest):
        raise JLTError(f"{path} is inconsistent: {fault}.")
    return manifest


def _inconsistency(manifest: StoreManifest) -> str | None:
    """Return the first contradiction in a manifest, which may be sealed all the same."""
    shards = manifest.shards
    for record in shards:
        if not stays_inside(record.file):
            return f"it names the shard {record.file!r}, which is not in the folder of the manifest"
    width = 2 if manifest.dtype == "float16" else 4
    latent = width * math.prod(manifest.latents_shape(1)) * len(manifest.orientations)
    # A mean of equal values may differ from them by its rounding.
    slack = 1e-6 * max(abs(manifest.minimum), abs(manifest.maximum))
    means = (manifest.mean, *manifest.channel_mean)
    valid = {
        "its count differs from the sum over its shards": manifest.count == sum(record.count for record in shards),
        "it names a shard twice": len({record.file for record in shards}) == len(shards),
        "a shard has fewer bytes than its latents": all(record.bytes >= record.count * latent for record in shards),
        "its moments are of another number of channels": {manifest.channels}
        == {len(manifest.channel_mean), len(manifest.channel_std)},
        "its minimum is above its maximum": manifest.minimum <= manifest.maximum,
        "its means are not between its minimum and its maximum": all(
            manifest.minimum - slack <= mean <= manifest.maximum + slack for mean in means
        ),
        "it names no classes": len(manifest.class_names) > 0,
    }
    return next((fault for fault, holds in valid.items() if not holds), None)


STD_RANGE = (0.5, 1.5)
"""Standard deviation of all values of normalised latents; FLUX.2's is near 1.77 without normalisation."""
MAX_MEAN = 1.0
"""Largest absolute mean of all values of normalised latents."""
MAX_VALUE = 100.0
"""Largest absolute value of normalised latents; a Gaussian's would stay below 10."""


@dataclass(frozen=True)
class LatentSums:
    """Float64 sums of values and squares per channel over `values` positions, and the extremes of all values."""

    values: int
    total: tuple[float, ...]
    squares: tuple[float, ...]
    minimum: float
    maximum: float

    @classmethod
    def zero(cls, channels: int) -> LatentSums:
        """Return the sums over no latents."""
        return cls(0, (0.0,) * channels, (0.0,) * channels, np.inf, -np.inf)

    def add(self, latents: Float[np.ndarray, "n c h w"]) -> LatentSums:
        """Return the sums with a batch of latents added."""
        if not len(latents):
            return self
        wide = latents.astype(np.float64)
        total, squares = (tuple(array.sum((0, 2, 3)).tolist()) for array in (wide, np.square(wide)))
        positions = latents.size // latents.shape[1]
        return self.merge(LatentSums(positions, total, squares, float(wide.min()), float(wide.max())))

    def merge(self, other: LatentSums) -> LatentSums:
        """Return the sums over both; another order of merging may change the last bit."""
        return LatentSums(
            self.values + other.values,
            tuple(map(operator.add, self.total, other.total)),
            tuple(map(operator.add, self.squares, other.squares)),
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    def moments(self) -> dict[str, Any]:
        """Return moments and extremes as fields of a store's manifest; `mean` and `std` are over all values."""
        channel_mean = np.array(self.total) / self.values
        channel_std = np.sqrt(np.maximum(np.array(self.squares) / self.values - channel_mean**2, 0))
        mean = float(channel_mean.mean())
        return {
            "mean": mean,
            "std": math.sqrt(max(float(np.mean(self.squares)) / self.values - mean**2, 0.0)),
            "minimum": self.minimum,
            "maximum": self.maximum,
            "channel_mean": tuple(channel_mean.tolist()),
            "channel_std": tuple(channel_std.tolist()),
        }

    def require_normalised(self, autoencoder: Mapping[str, Any], advice: str = "") -> None:
        """Raise a JLTError with the measured values if noise of unit variance does not suit the latents' scale.

        `autoencoder` is an identity; one without normalisation, such as pixels, is not checked. `advice` ends the
        message.
        """
        if autoencoder["normalisation"]["kind"] == "none":
            return
        low, high = STD_RANGE
        largest, moments = max(-self.minimum, self.maximum), self.moments()
        mean, std, stds = moments["mean"], moments["std"], moments["channel_std"]
        if low <= std <= high and abs(mean) <= MAX_MEAN and largest <= MAX_VALUE:
            return
        ending = f" {advice}" if advice else ""
        raise JLTError(
            f"The latents of {autoencoder['name']!r} are not normalised. Their standard deviation is {std:.3g} "
            f"(per channel {min(stds):.3g} to {max(stds):.3g}; expected {low} to {high}), their mean {mean:.3g} "
            f"(expected within {MAX_MEAN:g}), their values go from {self.minimum:.3g} to {self.maximum:.3g} "
            f"(expected within {MAX_VALUE:g}). Check the autoencoder's weights, statistics and scaling factor.{ending}"
        )
