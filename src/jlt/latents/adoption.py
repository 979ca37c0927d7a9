"""Adoption: shards that another program wrote become a latent store where they lie; not a byte of them is changed.

The format is LightningDiT's (Yao et al. 2025, arXiv 2501.01423), which JLT's authors use too: every process writes
`latents_rank{R}_shard{S}.safetensors`, numbered from 0, with `latents` (N, C, H, W), `labels` (N,) and, where there are
flips, `latents_flip` like `latents`. Other tensors, metadata and other kinds of files are left alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt64

from jlt.autoencoders.load import USUAL_PLACES
from jlt.errors import JLTError, UsageError, unknown_name
from jlt.images.labels import MOST_CLASSES
from jlt.latents.manifest import MANIFEST_NAME, ShardRecord, StoreManifest, write_manifest
from jlt.latents.shards import ShardFile, TensorEntry
from jlt.latents.statistics import LatentSums
from jlt.latents.store import VERIFY_THREADS, LatentStore
from jlt.runtime.progress import inform, track
from jlt.storage.files import difference, format_difference

SHARD_NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
DTYPES = {"F16": "float16", "F32": "float32"}
BLOCK_BYTES = 1 << 20
"""Bytes that each thread reads at a time; summing them in float64 takes ten times their memory."""


@dataclass(frozen=True)
class _Usual:
    """Class, channels (None: any) and downsampling of an autoencoder at its usual place."""

    class_name: str
    channels: int | None
    downsampling: int


USUAL = {
    "flux2": _Usual("AutoencoderKLFlux2", 128, 16),
    "kl": _Usual("AutoencoderKL", None, 8),
    "tiny": _Usual("AutoencoderKLFlux2", 16, 8),
    "pixels": _Usual("PixelAutoencoder", 3, 1),
}


def adopt(
    folder: Path,
    autoencoder: str = "flux2",
    autoencoder_path: str | None = None,
    resolution: int | None = None,
    class_names: Sequence[str] | None = None,
    threads: int = VERIFY_THREADS,
) -> StoreManifest:
    """Write the manifest that makes a latent store of a folder of shards, and return it.

    Every file is read once. `autoencoder` and `autoencoder_path` say what decodes the latents; its weights are not
    loaded. `resolution` of the images is by default the latents' height times the autoencoder's usual downsampling,
    and classes are called by their numbers. A folder that was adopted with the same words is only opened.

    JLTError if a shard is missing in the numbering, is damaged, or differs from the others in shape, number format or
    flips; if latents are not finite or not normalised; if labels do not fit the class names; if the folder holds other
    .safetensors files (hidden ones do not count) or was adopted with other words.
    """
    shards = [_inspect(path, rank) for path, rank in _numbered_shards(folder)]
    _require_alike(shards)
    words = {
        **_shape_words(shards, autoencoder, autoencoder_path, resolution),
        "class_names": _class_names(shards, class_names),
    }
    if (folder / MANIFEST_NAME).exists():
        return _adopted_before(folder, words)
    if not os.access(folder, os.W_OK):
        raise JLTError(f"{folder} cannot be written to, and its {MANIFEST_NAME} belongs there.")
    _say_unequal_ranks(shards)
    records, sums = _read_all(folder, shards, words, threads)
    manifest = StoreManifest(
        **words,
        **sums.moments(),
        shards=records,
    )
    write_manifest(folder, manifest)
    return manifest


@dataclass(frozen=True)
class _Shard:
    """What is known of a shard before its latents are read: the process that wrote it, its latents' places, labels."""

    path: Path
    rank: int
    latents: dict[str, TensorEntry]
    labels: Int64[np.ndarray, " n"]

    @property
    def form(self) -> str:
        """What all shards of a store have in common, for comparison and for people."""
        entry = self.latents["latents"]
        flips = "with" if "latents_flip" in self.latents else "without"
        return f"{DTYPES[entry.dtype]} latents of {'x'.join(map(str, entry.shape[1:]))} {flips} flips"


def _numbered_shards(folder: Path) -> list[tuple[Path, int]]:
    """Return the shards' files with the rank in their names, by rank and number; JLTError if one is missing."""
    if not folder.is_dir():
        raise JLTError(f"{folder} is not a folder.")
    numbered: dict[tuple[int, int], Path] = {}
    others = []
    for path in sorted(folder.glob("*.safetensors")):
        name = SHARD_NAME.fullmatch(path.name)
        if path.name.startswith("."):
            continue
        if name is None:
            others.append(path.name)
            continue
        numbers = int(name[1]), int(name[2])
        if numbers in numbered:
            raise JLTError(f"{numbered[numbers]} and {path.name} have the same number: take one of them out.")
        numbered[numbers] = path
    if not numbered:
        raise JLTError(f"{folder} has nothing to adopt: it holds no files named latents_rank0_shard0.safetensors etc.")
    if others:
        raise JLTError(f"{folder} holds {others[0]}, which is not a shard to be adopted: move it to another folder.")
    _require_no_gaps(folder, numbered)
    return [(numbered[numbers], numbers[0]) for numbers in sorted(numbered)]


def _require_no_gaps(folder: Path, numbered: Collection[tuple[int, int]]) -> None:
    ranks = {rank for rank, _ in numbered}
    missing = [f"rank {rank}" for rank in _gaps(ranks)]
    for rank in sorted(ranks):
        missing += [f"rank {rank} shard {shard}" for shard in _gaps({shard for r, shard in numbered if r == rank})]
    if missing:
        more = " and more" if len(missing) > 3 else ""
        raise JLTError(f"In {folder} the numbering from 0 has gaps: {', '.join(missing[:3])}{more} missing.")


def _gaps(numbers: Collection[int]) -> list[int]:
    """Return the first numbers missing below the largest, four at most: a stray name may carry any number."""
    below = (number for number in range(max(numbers)) if number not in numbers)
    return list(itertools.islice(below, 4))


def _inspect(path: Path, rank: int) -> _Shard:
    """Read a shard's header and labels; JLTError if it is not a shard."""
    file = ShardFile(path)
    entries = file.read_entries()
    for name in ("latents", "labels"):
        if name not in entries:
            raise JLTError(f"{path} holds no {name}.")
    latents = {name: entry for name, entry in entries.items() if name in ("latents", "latents_flip")}
    for name, entry in latents.items():
        if entry.dtype not in DTYPES:
            dtype = "bfloat16" if entry.dtype == "BF16" else entry.dtype
            raise JLTError(f"{path} holds {name} in {dtype}: float16 and float32 can be adopted, so convert it first.")
        if len(entry.shape) != 4 or 0 in entry.shape:
            raise JLTError(f"{path} holds {name} of shape {entry.shape}: (N, C, H, W) is expected, none of them 0.")
        if (entry.dtype, entry.shape) != (latents["latents"].dtype, latents["latents"].shape):
            raise JLTError(f"{path} holds latents and latents_flip of different shapes or number formats.")
    count, labels = latents["latents"].shape[0], entries["labels"]
    if labels.dtype not in ("I32", "I64") or labels.shape != (count,):
        raise JLTError(f"{path} holds labels as {labels.dtype} {labels.shape}: I64 or I32 {(count,)} is expected.")
    return _Shard(path, rank, latents, file.read_array(labels))


def _require_alike(shards: Sequence[_Shard]) -> None:
    first = shards[0]
    for shard in shards:
        if shard.form != first.form:
            raise JLTError(f"{shard.path} holds {shard.form}, and {first.path.name} {first.form}: they are no one set.")


def _say_unequal_ranks(shards: Sequence[_Shard]) -> None:
    counts: dict[int, int] = {}
    for shard in shards:
        counts[shard.rank] = counts.get(shard.rank, 0) + len(shard.labels)
    fewest = min(counts, key=lambda rank: counts[rank])
    if counts[fewest] < max(counts.values()):
        inform(
            f"The processes wrote different numbers of latents, rank {fewest} {counts[fewest]} and another "
            f"{max(counts.values())}: where images are shared out evenly, that is a sign of missing last shards."
        )


def _shape_words(
    shards: Sequence[_Shard], autoencoder: str, path: str | None, resolution: int | None
) -> dict[str, Any]:
    """Return the fields of the manifest that follow from the shards' form and from the autoencoder."""
    entry, count = shards[0].latents["latents"], sum(len(shard.labels) for shard in shards)
    _, channels, height, width = entry.shape
    usual, source = _usual(autoencoder, path)
    resolution = height * usual.downsampling if resolution is None else resolution
    downsampling = resolution // height
    unusual = (channels, downsampling) != (usual.channels, usual.downsampling)
    if resolution % height or downsampling < 1 or (path is None and unusual):
        raise JLTError(
            f"{shards[0].path} holds {shards[0].form}, which the autoencoder {autoencoder!r} does not make of "
            f"{resolution} pixels: say what made them with --autoencoder, --autoencoder-path and --resolution."
        )
    identity = {
        "name": autoencoder,
        "source": source,
        "class": usual.class_name,
        "weights_sha256": None,
        "normalisation": {"kind": "none" if autoencoder == "pixels" else "as adopted"},
        "channels": channels,
        "downsampling": downsampling,
        "posterior": "mode",
    }
    form = {"flips": "latents_flip" in shards[0].latents, "dtype": DTYPES[entry.dtype]}
    sizes = {"resolution": resolution, "channels": channels, "height": height, "width": width, "count": count}
    adopted = {"source": {"kind": "adopted", "count": count}, "encoding": None, "skipped": (), "made_with": ()}
    return {"autoencoder": identity, **adopted, **sizes, **form}


def _usual(name: str, path: str | None) -> tuple[_Usual, str]:
    """Return what is known of an autoencoder, and where it lies; UsageError for words that do not go together."""
    if name not in USUAL:
        raise unknown_name("autoencoder", name, USUAL)
    if name == "pixels" and path is not None:
        raise UsageError(f"The autoencoder 'pixels' has no weights: leave the path {path} away.")
    if name == "kl" and path is None:
        raise UsageError(
            "The autoencoder 'kl' is any AutoencoderKL: say which made the latents with --autoencoder-path."
        )
    in_package = {"tiny": "bundled", "pixels": "built in"}
    return USUAL[name], path or in_package.get(name) or USUAL_PLACES[name]


def _class_names(shards: Sequence[_Shard], names: Sequence[str] | None) -> tuple[str, ...]:
    largest = 0
    for shard in shards:
        low, high = int(shard.labels.min()), int(shard.labels.max())
        if low < 0 or (names is not None and high >= len(names)):
            classes = f"there are {len(names)} class names" if names is not None else "classes count from 0"
            raise JLTError(f"{shard.path} holds labels from {low} to {high}, and {classes}.")
        largest = max(largest, high)
    if names is None and largest > MOST_CLASSES:
        raise JLTError(f"{largest} is a label: so many classes have to be named, with --class-names.")
    return tuple(names) if names is not None else tuple(map(str, range(largest + 1)))


def _adopted_before(folder: Path, words: dict[str, Any]) -> StoreManifest:
    """Return the manifest of a store that is there already; JLTError if other words made it."""
    manifest = LatentStore.open(folder).manifest
    before = {name: getattr(manifest, name) for name in words}
    lines = difference(*(json.loads(json.dumps(side)) for side in (before, words)))
    if lines:
        raise JLTError(
            f"{folder} was adopted with other words ({format_difference(lines)}): use those, or remove its "
            f"{MANIFEST_NAME} to adopt it anew."
        )
    return manifest


def _read_all(
    folder: Path, shards: Sequence[_Shard], words: dict[str, Any], threads: int
) -> tuple[tuple[ShardRecord, ...], LatentSums]:
    """Read every file once and return their records and the sums over all, added in the shards' order."""
    records: list[ShardRecord] = []
    fingerprints: list[np.ndarray] = []
    sums = LatentSums.zero(words["channels"])
    pool = ThreadPoolExecutor(threads)
    try:
        for read in track(pool.map(_read, shards), f"adopting {folder}", total=len(shards)):
            if not records:
                # Rather after the first shard than after all.
                _require_normalised(read.sums, words["autoencoder"])
            records.append(read.record)
            fingerprints.append(read.fingerprints)
            sums = sums.merge(read.sums)
    finally:
        pool.shutdown(cancel_futures=True)
    _require_normalised(sums, words["autoencoder"])
    repeated = words["count"] - len(np.unique(np.concatenate(fingerprints)))
    if repeated:
        inform(
            f"{repeated} of {words['count']} latents repeat others exactly, as where a DistributedSampler fills up its "
            "last batches: they stay."
        )
    return tuple(records), sums


def _require_normalised(sums: LatentSums, autoencoder: dict[str, Any]) -> None:
    if autoencoder["normalisation"]["kind"] == "none":
        return
    try:
        sums.require_normalised(autoencoder["name"])
    except JLTError as error:
        raise JLTError(
            f"{error} Shards are adopted as they are: LightningDiT's own (VA-VAE) are stored without their statistics, "
            "which have to be applied and the result saved first."
        ) from error


@dataclass(frozen=True)
class _Read:
    """What reading a shard whole gave; `fingerprints` are 64 bits of each latent's hash."""

    record: ShardRecord
    sums: LatentSums
    fingerprints: UInt64[np.ndarray, " n"]


def _read(shard: _Shard) -> _Read:
    """Read a shard once, in the order of its bytes; JLTError names the first latent that is not finite."""
    file = ShardFile(shard.path)
    digest, size, place = hashlib.sha256(), file.size, 0
    sums, fingerprints = LatentSums.zero(shard.latents["latents"].shape[1]), []
    for name, entry in sorted(shard.latents.items(), key=lambda named: named[1].offset):
        for block in _blocks(file, place, entry.offset, BLOCK_BYTES):
            digest.update(block)
        place = entry.offset + entry.shape[0] * entry.row_bytes
        row = 0
        for block in _blocks(file, entry.offset, place, max(1, BLOCK_BYTES // entry.row_bytes) * entry.row_bytes):
            digest.update(block)
            latents = np.frombuffer(block, DTYPES[entry.dtype]).reshape(-1, *entry.shape[1:])
            sums = _add_finite(sums, latents, f"{shard.path} holds {name}", row)
            row += len(latents)
            if name == "latents":
                fingerprints += [hashlib.sha256(latent).digest()[:8] for latent in latents]
    for block in _blocks(file, place, size, BLOCK_BYTES):
        digest.update(block)
    record = ShardRecord(shard.path.name, len(shard.labels), size, digest.hexdigest())
    return _Read(record, sums, np.frombuffer(b"".join(fingerprints), np.uint64))


def _blocks(file: ShardFile, start: int, stop: int, step: int) -> Iterator[memoryview]:
    """Yield the bytes from `start` to `stop`, `step` at a time, each block in the memory of the one before."""
    buffer = memoryview(bytearray(min(step, stop - start)))
    for place in range(start, stop, step):
        block = buffer[: min(step, stop - place)]
        file.read_into(block, place)
        yield block


def _add_finite(sums: LatentSums, latents: Float[np.ndarray, "n c h w"], holder: str, row: int) -> LatentSums:
    """Add a block whose first latent is number `row` of its tensor; JLTError if it is not finite."""
    with np.errstate(invalid="ignore"):
        added = sums.add(latents)
    # A float64 sum of finite float32 values is finite.
    if not np.isfinite(added.total).all():
        finite = np.isfinite(latents).all((1, 2, 3))
        raise JLTError(f"{holder} that are not finite, row {row + int(finite.argmin())} first: encode it again.")
    return added
