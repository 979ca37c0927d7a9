"""Adoption: another program's shards become a latent store in their own folder; none of their bytes change.

The format is LightningDiT's (Yao et al. 2025, arXiv 2501.01423), which JLT's authors use too: every process writes
`latents_rank{R}_shard{S}.safetensors`, numbered from 0, with `latents` (N, C, H, W), `labels` (N,) and, for flips,
`latents_flip` shaped like `latents`. Other tensors, metadata and other kinds of files are ignored.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt64

from jlt.autoencoders.load import USUAL_PLACES
from jlt.errors import JLTError, UsageError, unknown_name
from jlt.images.sharded import MOST_CLASSES
from jlt.latents.manifest import MANIFEST_NAME, LatentSums, ShardRecord, StoreManifest, write_manifest
from jlt.latents.shards import DTYPES, ShardFile, TensorEntry
from jlt.latents.store import STORED_DTYPES, VERIFY_THREADS, LatentStore
from jlt.runtime.progress import inform, track
from jlt.storage.codec import to_json
from jlt.storage.files import difference, format_difference
from jlt.storage.folders import remove_leftovers

SHARD_NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
ADVICE = (
    "Adoption does not change latents. LightningDiT's own (VA-VAE) are stored without their statistics: apply these "
    "and save the result first."
)
BLOCK_BYTES = 1 << 20
"""Bytes that each thread reads at a time; their sums in float64 take ten times this memory."""


@dataclass(frozen=True)
class _Usual:
    """Class, channels (None: any) and downsampling of the autoencoder that a name alone means, and its source."""

    class_name: str
    channels: int | None
    downsampling: int
    source: str | None


USUAL = {
    "flux2": _Usual("AutoencoderKLFlux2", 128, 16, USUAL_PLACES["flux2"]),
    "taef2": _Usual("TAEF2", 128, 16, USUAL_PLACES["taef2"]),
    "kl": _Usual("AutoencoderKL", None, 8, None),
    "tiny": _Usual("AutoencoderKLFlux2", 16, 8, "bundled"),
    "pixels": _Usual("PixelAutoencoder", 3, 1, "built in"),
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

    Every file is read once. `autoencoder` and `autoencoder_path` name the decoder of the latents; its weights are not
    loaded. `resolution` of the images is by default the latents' height times the autoencoder's usual downsampling, and
    the default class names are the numbers. A folder that was adopted with the same arguments is only opened.

    JLTError if a shard is missing in the numbering, is damaged, or differs from the others in shape, number format or
    flips; if latents are not finite or not normalised; if labels do not fit the class names; if the folder holds other
    .safetensors files that are not hidden, or was adopted with different arguments.
    """
    shards = [_inspect(path, rank) for path, rank in _numbered_shards(folder)]
    first = shards[0]
    for shard in shards:
        if shard.form != first.form:
            raise JLTError(f"{shard.path} holds {shard.form}, but {first.path.name} {first.form}: keep one kind here.")
    fields = _known_fields(shards, autoencoder, autoencoder_path, resolution)
    fields["class_names"] = _class_names(shards, class_names)
    if (folder / MANIFEST_NAME).exists():
        return _adopted_before(folder, fields)
    if not os.access(folder, os.W_OK):
        raise JLTError(f"{folder} cannot be written to, but its {MANIFEST_NAME} must be written there.")
    _report_unequal_ranks(shards)
    records, sums = _read_all(folder, shards, fields, threads)
    remove_leftovers(folder, MANIFEST_NAME)
    manifest = StoreManifest(**fields, **sums.moments(), shards=records)
    write_manifest(folder, manifest)
    return manifest


@dataclass(frozen=True)
class _Shard:
    """The facts about a shard before its latents are read: its writer's rank, its tensors of latents, its labels."""

    path: Path
    rank: int
    latents: dict[str, TensorEntry]
    labels: Int64[np.ndarray, " n"]

    @property
    def form(self) -> str:
        """The properties that all shards of a store share, as text."""
        entry = self.latents["latents"]
        flips = "with" if "latents_flip" in self.latents else "without"
        return f"{DTYPES[entry.dtype]} latents of {'x'.join(map(str, entry.shape[1:]))} {flips} flips"


def _numbered_shards(folder: Path) -> list[tuple[Path, int]]:
    """Return the shards' files with the rank in their names, by rank and number; JLTError if one is missing."""
    if not folder.is_dir():
        raise JLTError(f"{folder} is not a folder.")
    numbered: dict[tuple[int, int], Path] = {}
    others = []
    for path in sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(".")):
        name = SHARD_NAME.fullmatch(path.name)
        if name is None:
            others.append(path.name)
        elif (numbers := (int(name[1]), int(name[2]))) in numbered:
            raise JLTError(f"{numbered[numbers]} and {path.name} have the same number: remove one of them.")
        else:
            numbered[numbers] = path
    if not numbered:
        raise JLTError(f"{folder} holds no files named latents_rank0_shard0.safetensors etc., so it cannot be adopted.")
    if others:
        raise JLTError(f"{folder} holds {others[0]}, which is not a shard to be adopted: move it to another folder.")
    if missing := _gaps_in_numbering(numbered):
        more = " and more" if len(missing) > 3 else ""
        raise JLTError(f"In {folder} the numbering from 0 has gaps: {', '.join(missing[:3])}{more} missing.")
    return [(numbered[numbers], numbers[0]) for numbers in sorted(numbered)]


def _gaps_in_numbering(numbered: Collection[tuple[int, int]]) -> list[str]:
    """Return the missing ranks and shards; of each list of numbers at most four, since a number may be huge."""

    def gaps(numbers: Collection[int]) -> Iterator[int]:
        return itertools.islice((number for number in range(max(numbers)) if number not in numbers), 4)

    ranks = {rank for rank, _ in numbered}
    missing = [f"rank {rank}" for rank in gaps(ranks)]
    for rank in sorted(ranks):
        missing += [f"rank {rank} shard {shard}" for shard in gaps({shard for r, shard in numbered if r == rank})]
    return missing


def _inspect(path: Path, rank: int) -> _Shard:
    """Read a shard's header and labels; JLTError if it is not a shard."""
    file = ShardFile(path)
    entries = file.read_entries()
    for name in ("latents", "labels"):
        if name not in entries:
            raise JLTError(f"{path} holds no {name}.")
    latents = {name: entry for name, entry in entries.items() if name in ("latents", "latents_flip")}
    for name, entry in latents.items():
        if DTYPES.get(entry.dtype) not in STORED_DTYPES:
            dtype = "bfloat16" if entry.dtype == "BF16" else entry.dtype
            raise JLTError(f"{path} holds {name} in {dtype}: convert it first, to float16 or float32.")
        if len(entry.shape) != 4 or 0 in entry.shape:
            raise JLTError(f"{path} holds {name} of shape {entry.shape}: (N, C, H, W) is expected, none of them 0.")
        if (entry.dtype, entry.shape) != (latents["latents"].dtype, latents["latents"].shape):
            raise JLTError(f"{path} holds latents and latents_flip of different shapes or number formats.")
    count, labels = latents["latents"].shape[0], entries["labels"]
    if labels.dtype not in ("I32", "I64") or labels.shape != (count,):
        raise JLTError(f"{path} holds labels as {labels.dtype} {labels.shape}: I64 or I32 {(count,)} is expected.")
    return _Shard(path, rank, latents, file.read_array(labels))


def _report_unequal_ranks(shards: Sequence[_Shard]) -> None:
    counts: Counter[int] = Counter()
    for shard in shards:
        counts[shard.rank] += len(shard.labels)
    fewest = min(counts, key=lambda rank: counts[rank])
    if counts[fewest] < max(counts.values()):
        inform(
            f"The processes wrote different numbers of latents, from {counts[fewest]} (rank {fewest}) to "
            f"{max(counts.values())}. If the images were shared evenly, the last shards are missing."
        )


def _known_fields(
    shards: Sequence[_Shard], autoencoder: str, path: str | None, resolution: int | None
) -> dict[str, Any]:
    """Return the fields of the manifest that follow from the shards' form and from the autoencoder.

    UsageError for an unknown autoencoder and for a path that is missing or has no use.
    """
    if autoencoder not in USUAL:
        raise unknown_name("autoencoder", autoencoder, USUAL)
    if autoencoder == "pixels" and path is not None:
        raise UsageError(f"The autoencoder 'pixels' has no weights: leave out the path {path}.")
    usual = USUAL[autoencoder]
    source = path or usual.source
    if source is None:
        raise UsageError(
            f"The autoencoder {autoencoder!r} is any {usual.class_name}: name the one that made the latents with "
            "--autoencoder-path."
        )
    entry, count = shards[0].latents["latents"], sum(len(shard.labels) for shard in shards)
    _, channels, height, width = entry.shape
    resolution = height * usual.downsampling if resolution is None else resolution
    downsampling = resolution // height
    unusual = (channels, downsampling) != (usual.channels, usual.downsampling)
    if resolution % height or downsampling < 1 or (path is None and unusual):
        raise JLTError(
            f"{shards[0].path} holds {shards[0].form}, which the autoencoder {autoencoder!r} does not make of "
            f"{resolution} pixels: name its origin with --autoencoder, --autoencoder-path and --resolution."
        )
    return {
        "autoencoder": adopted_identity(autoencoder, source, channels, downsampling),
        "source": {"kind": "adopted", "count": count},
        "encoding": None,
        "skipped": (),
        "made_with": (),
        "resolution": resolution,
        "channels": channels,
        "height": height,
        "width": width,
        "count": count,
        "flips": "latents_flip" in shards[0].latents,
        "dtype": DTYPES[entry.dtype],
    }


def adopted_identity(autoencoder: str, source: str, channels: int, downsampling: int) -> dict[str, Any]:
    """Return the identity of the autoencoder of latents that another program made: its weights are unknown."""
    return {
        "name": autoencoder,
        "source": source,
        "class": USUAL[autoencoder].class_name,
        "weights_sha256": None,
        "normalisation": {"kind": "none" if autoencoder == "pixels" else "as adopted"},
        "channels": channels,
        "downsampling": downsampling,
        "posterior": "mode",
    }


def _class_names(shards: Sequence[_Shard], names: Sequence[str] | None) -> tuple[str, ...]:
    largest = 0
    for shard in shards:
        low, high = int(shard.labels.min()), int(shard.labels.max())
        if low < 0 or (names is not None and high >= len(names)):
            classes = f"there are {len(names)} class names" if names is not None else "classes count from 0"
            raise JLTError(f"{shard.path} holds labels from {low} to {high}, and {classes}.")
        largest = max(largest, high)
    if names is None and largest > MOST_CLASSES:
        raise JLTError(f"The largest label is {largest}: name the classes with --class-names.")
    return tuple(names) if names is not None else tuple(map(str, range(largest + 1)))


def _adopted_before(folder: Path, fields: Mapping[str, Any]) -> StoreManifest:
    """Return the manifest of an adopted store; JLTError if it was adopted with different arguments."""
    manifest = LatentStore.open(folder).manifest
    differences = difference({name: to_json(getattr(manifest, name)) for name in fields}, to_json(fields))
    if differences:
        raise JLTError(
            f"{folder} was adopted with different arguments ({format_difference(differences)}): "
            f"use those, or remove its {MANIFEST_NAME} to adopt it again."
        )
    return manifest


def _read_all(
    folder: Path, shards: Sequence[_Shard], fields: Mapping[str, Any], threads: int
) -> tuple[tuple[ShardRecord, ...], LatentSums]:
    """Read every file once and return their records and the sums over all, added in the shards' order."""
    records: list[ShardRecord] = []
    fingerprints: list[np.ndarray] = []
    sums = LatentSums.zero(fields["channels"])
    pool = ThreadPoolExecutor(threads)
    try:
        for record, added, hashes in track(pool.map(_read, shards), f"adopting {folder}", total=len(shards)):
            records.append(record)
            fingerprints.append(hashes)
            sums = sums.merge(added)
            # After the first shard, and again after the last.
            if len(records) in (1, len(shards)):
                sums.require_normalised(fields["autoencoder"], ADVICE)
    finally:
        pool.shutdown(cancel_futures=True)
    repeated = fields["count"] - len(np.unique(np.concatenate(fingerprints)))
    if repeated:
        inform(
            f"{repeated} of {fields['count']} latents are exact copies of others, as a DistributedSampler adds to fill "
            "its last batches. They are kept."
        )
    return tuple(records), sums


def _read(shard: _Shard) -> tuple[ShardRecord, LatentSums, UInt64[np.ndarray, " n"]]:
    """Read a shard once, in the order of its bytes, and return 64 bits of each latent's hash as the third result.

    JLTError names the first latent that is not finite.
    """
    file = ShardFile(shard.path)
    digest, size, place = hashlib.sha256(), file.size, 0
    sums, fingerprints = LatentSums.zero(shard.latents["latents"].shape[1]), []
    for name, entry in sorted(shard.latents.items(), key=lambda item: item[1].offset):
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
    return record, sums, np.frombuffer(b"".join(fingerprints), np.uint64)


def _blocks(file: ShardFile, start: int, stop: int, step: int) -> Iterator[memoryview]:
    """Yield the bytes from `start` to `stop`, `step` at a time; each block overwrites the one before."""
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
