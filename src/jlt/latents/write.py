"""A latent store from arrays in memory, without images: for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jlt.latents.manifest import ShardRecord, StoreManifest, write_manifest
from jlt.latents.shards import ShardWriter
from jlt.latents.statistics import LatentSums

SAFETENSORS_NAMES = {"float16": "F16", "float32": "F32", "int64": "I64"}
BLOCK_ROWS = 256


def write_store(folder: Path, shards: Iterable[dict[str, np.ndarray]], classes: int) -> StoreManifest:
    """Write each item as one shard into a new folder, and the manifest last; return the manifest.

    An item holds `latents` (n, channels, height, width) in float16 or float32, `labels` (n,) in int64 below `classes`,
    and `latents_flip` shaped like `latents`, in every shard or in none. ValueError if there is no item.
    """
    folder.mkdir(parents=True)
    records: list[ShardRecord] = []
    sums: LatentSums | None = None
    for arrays in shards:
        path = folder / f"shard-{len(records):05d}.safetensors"
        with ShardWriter(path, {n: (SAFETENSORS_NAMES[a.dtype.name], a.shape) for n, a in arrays.items()}) as writer:
            for name, values in arrays.items():
                writer.write(name, 0, values)
        records.append(ShardRecord.of(path, len(arrays["labels"])))
        for name in arrays.keys() - {"labels"}:
            for start in range(0, len(arrays[name]), BLOCK_ROWS):
                sums = (sums or LatentSums.zero(arrays[name].shape[1])).add(arrays[name][start : start + BLOCK_ROWS])
    if sums is None:
        raise ValueError("a store needs at least one shard")
    latents, count = arrays["latents"], sum(record.count for record in records)
    manifest = StoreManifest(
        autoencoder={"name": "none"},
        source={"kind": "arrays", "count": count},
        encoding=None,
        resolution=latents.shape[2],
        flips="latents_flip" in arrays,
        dtype=latents.dtype.name,
        channels=latents.shape[1],
        height=latents.shape[2],
        width=latents.shape[3],
        class_names=tuple(map(str, range(classes))),
        count=count,
        skipped=(),
        made_with=(),
        **sums.moments(),
        shards=tuple(records),
    )
    write_manifest(folder, manifest)
    return manifest
