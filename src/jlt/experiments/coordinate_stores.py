"""A latent store in other coordinates: the same latents with their anisotropy raised to a power."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np

from jlt.autoencoders.coordinates import CoordinateAutoencoder, Coordinates
from jlt.geometry.covariance import TokenCovariance
from jlt.latents.manifest import LatentSums, ShardRecord, write_manifest
from jlt.latents.shards import ShardWriter
from jlt.latents.store import LatentStore, ShardCheck
from jlt.runtime.progress import track
from jlt.sampling.sampler import matching_autoencoder
from jlt.storage.folders import whole_folder
from jlt.storage.rows import require_space

NAME = "coordinates/map.safetensors"
BATCH_SIZE = 256


def store_in_coordinates(store: LatentStore, folder: Path, patch_size: int, anisotropy: float) -> LatentStore:
    """Write the latents with their tokens' eigenvalues raised to a power, or open the store if it exists.

    The store's autoencoder decodes them, since it undoes the coordinates. JLTError for a disk without room.
    """
    if not folder.exists():
        manifest = store.manifest
        size = 4 * manifest.channels * manifest.height * manifest.width * manifest.count * (1 + manifest.flips)
        with whole_folder(folder) as begun, ShardCheck(store):
            require_space(begun, size, f"The latents with anisotropy {anisotropy:g}")
            _write(store, measure_coordinates(store, patch_size, anisotropy), begun)
    return LatentStore.open(folder)


def measure_coordinates(store: LatentStore, patch_size: int, anisotropy: float) -> Coordinates:
    """Return the coordinates in which the tokens of a store have their eigenvalues raised to a power."""
    tokens = TokenCovariance(store.shape.channels, patch_size)
    for latents, _ in store.batches(BATCH_SIZE):
        tokens.update(latents)
    return Coordinates.raised(tokens.covariance, tokens.mean, patch_size, anisotropy)


def _write(store: LatentStore, coordinates: Coordinates, begun: Path) -> None:
    """Write everything into the folder `begun`."""
    coordinates.save(begun / NAME)
    manifest, sums, records, first = store.manifest, LatentSums.zero(store.shape.channels), [], 0
    for shard in track(manifest.shards, f"latents with anisotropy {coordinates.anisotropy:g}", len(manifest.shards)):
        numbers = np.arange(first, first + shard.count)
        path, first = begun / shard.file, first + shard.count
        kinds = {"latents": False, **({"latents_flip": True} if manifest.flips else {})}
        latents = ("float32", manifest.latents_shape(shard.count))
        sizes = {"labels": ("int64", (shard.count,)), **dict.fromkeys(kinds, latents)}
        with ShardWriter(path, sizes) as writer:
            writer.write("labels", 0, store.labels[numbers])
            for (name, flipped), row in itertools.product(kinds.items(), range(0, shard.count, BATCH_SIZE)):
                chosen = numbers[row : row + BATCH_SIZE]
                mapped = coordinates.apply(store.gather(chosen, np.full(len(chosen), flipped))[0]).numpy()
                writer.write(name, row, mapped)
                sums = sums.add(mapped)
        records.append(ShardRecord.of(path, shard.count))
    autoencoder = matching_autoencoder(manifest.autoencoder, None, "cpu", folder=store.folder)
    identity = CoordinateAutoencoder(autoencoder, begun, NAME).identity()
    shards, moments = tuple(records), sums.moments()
    write_manifest(
        begun, replace(manifest, autoencoder=identity, encoding=None, dtype="float32", shards=shards, **moments)
    )
