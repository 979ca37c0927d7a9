"""The manifest of a latent store: what made it, what is in it, and the hash of each of its files and of itself."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlt.config import LatentShape
from jlt.errors import JLTError
from jlt.images.source import SkippedImage
from jlt.storage.files import read_sealed_json, sealed_sha256, sealed_text, write_text

SCHEMA = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardRecord:
    """One shard file: its name in the store, its number of latents, its size in bytes and its SHA-256."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreManifest:
    """Everything a reader must know about a latent store.

    `autoencoder` and `source` are the identities of what made the latents, `encoding` the other words that decided them
    (crop, exif, precision, batch_size, shard_size, threads), None where latents that something else made were adopted.
    `made_with` lists the devices and versions that made the shards: one, unless an encoding was continued elsewhere.
    The moments and extremes are measured on the latents as stored, both orientations together; `mean` and `std` are of
    all values.
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

    def content(self) -> dict[str, Any]:
        """Return the manifest as JSON values, without its own hash."""
        return json.loads(json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}))

    def sha256(self) -> str:
        """Return the hash of the content, which the file carries as its last field."""
        return sealed_sha256(self.content())


def write_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Write the manifest atomically; it comes last, so a folder that has one is complete."""
    write_text(folder / MANIFEST_NAME, sealed_text(manifest.content()))


def read_manifest(folder: Path) -> StoreManifest:
    """Read a manifest; JLTError if it is missing, damaged, edited, of another schema version, or contradicts itself."""
    path = folder / MANIFEST_NAME
    if path.exists() and not path.is_file():
        raise JLTError(f"{path} is not a file.")
    try:
        content = read_sealed_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise JLTError(f"{path} cannot be read, or was edited or damaged ({error}).") from error
    if content.get("schema") != SCHEMA:
        raise JLTError(f"{path} has schema version {content.get('schema')}, this version of jlt reads {SCHEMA}.")
    return _from_content(path, content)


def _from_content(path: Path, content: dict[str, Any]) -> StoreManifest:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    del fields["schema"]
    try:
        fields["shards"] = tuple(ShardRecord(**record) for record in fields["shards"])
        fields["skipped"] = tuple(SkippedImage(**image) for image in fields["skipped"])
        manifest = StoreManifest(**fields)
        fault = _fault(manifest)
    except (KeyError, TypeError) as error:
        raise JLTError(f"{path} lacks fields of a latent store's manifest or has unknown ones ({error}).") from error
    if fault:
        raise JLTError(f"{path} was not written by jlt: {fault}.")
    return manifest


def _fault(manifest: StoreManifest) -> str | None:
    """Return what contradicts itself in a manifest, whoever sealed it; TypeError where a value is of another kind."""
    shards = manifest.shards
    sizes = [manifest.resolution, manifest.channels, manifest.height, manifest.width, manifest.count]
    sizes += [size for record in shards for size in (record.count, record.bytes)]
    for record in shards:
        if Path(record.file).name != record.file:
            return f"it names {record.file!r} as a shard, and shards lie in the folder of their manifest"
    sound = {
        "its sizes and counts are not all whole numbers from 1 on": all(type(n) is int and n > 0 for n in sizes),
        "it counts other than its shards do": manifest.count == sum(record.count for record in shards),
        "it names a shard twice": len({record.file for record in shards}) == len(shards),
        "its dtype is not known": manifest.dtype in ("float16", "float32"),
        "it has moments of another number of channels": {manifest.channels}
        == {len(manifest.channel_mean), len(manifest.channel_std)},
        "its minimum is above its maximum": manifest.minimum <= manifest.maximum,
        "it names no classes": len(manifest.class_names) > 0,
    }
    return next((fault for fault, holds in sound.items() if not holds), None)
