"""The manifest of a latent store: its origin, its content, and the hash of each of its files and of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlt.config import LatentShape
from jlt.errors import JLTError
from jlt.images.source import SkippedImage
from jlt.storage.codec import from_json, to_json
from jlt.storage.files import read_sealed_json, sealed_sha256, sealed_text, sha256_file, write_text

SCHEMA = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardRecord:
    """One shard file: its name in the store, its number of latents, its size in bytes and its SHA-256."""

    file: str
    count: int
    bytes: int
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
    resolution: int
    flips: bool
    dtype: str
    channels: int
    height: int
    width: int
    class_names: tuple[str, ...]
    count: int
    skipped: tuple[SkippedImage, ...]
    made_with: tuple[dict[str, str], ...]
    mean: float
    std: float
    minimum: float
    maximum: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    shards: tuple[ShardRecord, ...]

    @property
    def shape(self) -> LatentShape:
        """The latents' shape and number of classes."""
        return LatentShape(self.channels, self.height, self.width, len(self.class_names))

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


def read_manifest(folder: Path) -> StoreManifest:
    """Read a manifest; JLTError if it is missing, damaged, edited, inconsistent or of another schema version."""
    path = folder / MANIFEST_NAME
    if path.exists() and not path.is_file():
        raise JLTError(f"{path} is not a file.")
    try:
        content = read_sealed_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise JLTError(f"{path} cannot be read: it was edited or damaged ({error}).") from error
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
    sizes = [manifest.resolution, manifest.channels, manifest.height, manifest.width, manifest.count]
    sizes += [size for record in shards for size in (record.count, record.bytes)]
    for record in shards:
        if Path(record.file).name != record.file:
            return f"it names the shard {record.file!r}, which is not in the folder of the manifest"
    valid = {
        "its sizes and counts are not all at least 1": all(size > 0 for size in sizes),
        "its count differs from the sum over its shards": manifest.count == sum(record.count for record in shards),
        "it names a shard twice": len({record.file for record in shards}) == len(shards),
        "its dtype is unknown": manifest.dtype in ("float16", "float32"),
        "its moments are of another number of channels": {manifest.channels}
        == {len(manifest.channel_mean), len(manifest.channel_std)},
        "its minimum is above its maximum": manifest.minimum <= manifest.maximum,
        "it names no classes": len(manifest.class_names) > 0,
    }
    return next((fault for fault, holds in valid.items() if not holds), None)
