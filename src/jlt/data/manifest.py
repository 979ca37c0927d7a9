"""The manifest of a latent store: what made it, what is in it, and the hash of each of its files and of itself."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlt.data.shape import LatentShape
from jlt.errors import JLTError
from jlt.files import read_sealed_json, sealed_sha256, sealed_text, write_text

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

    `autoencoder` and `source` are the identities of what made the latents. `channel_mean`, `channel_std` and `std` (of
    all values) are measured on the latents as stored, both orientations together.
    """

    autoencoder: dict[str, Any]
    source: dict[str, Any]
    resolution: int
    crop: str
    flips: bool
    dtype: str
    batch_size: int
    shard_size: int
    channels: int
    height: int
    width: int
    class_names: tuple[str, ...]
    count: int
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    std: float
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
    """Read a manifest; JLTError if it is missing, damaged, edited, or of another schema version."""
    path = folder / MANIFEST_NAME
    content = read_sealed_json(path)
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
        manifest = StoreManifest(**fields)
    except (KeyError, TypeError) as error:
        raise JLTError(f"{path} lacks fields of a latent store's manifest or has unknown ones ({error}).") from error
    for record in manifest.shards:
        if Path(record.file).name != record.file:
            raise JLTError(f"{path} names {record.file!r} as a shard: shards lie in the folder of their manifest.")
    return manifest
