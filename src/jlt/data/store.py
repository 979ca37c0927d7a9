"""The latent store: random and sequential reading of encoded images, and the check of all that is stored.

Rows are read with `preadv` straight into the result. Next to a memory map that is as fast (faster on pages not mapped
before, slower on those that were), reads a latent from disk in one request, keeps the resident memory independent of
the store's size, and makes of a file that got shorter an error with its name instead of a SIGBUS.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from jlt.data.manifest import MANIFEST_NAME, ShardRecord, StoreManifest, read_manifest
from jlt.data.shape import LatentShape
from jlt.data.shards import ShardFile, TensorEntry
from jlt.errors import JLTError
from jlt.files import sha256_file

STATE_FOLDER = ".encoding"
STORED_DTYPES = {"float16": ("F16", torch.float16), "float32": ("F32", torch.float32)}
MAX_OPEN_SHARDS = 256
VERIFY_THREADS = 8


class LatentStore:
    """A finished store, opened for reading; safe to read from several threads.

    Opening checks the manifest, the presence and size of every shard, every shard's header and every label; hashes are
    checked by `verify_store`.
    """

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        # The least recently used file is closed as soon as nobody reads from it.
        self._file = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(lambda name: ShardFile(folder / name))
        self._starts = np.cumsum([0, *(record.count for record in manifest.shards)])
        self._labels = np.empty(manifest.count, dtype=np.int64)
        # Where latents, and latents_flip if there are any, start in each shard's file.
        names = ("latents", "latents_flip") if manifest.flips else ("latents",)
        self._offsets = np.empty((len(names), len(manifest.shards)), dtype=np.int64)
        for shard, record in enumerate(manifest.shards):
            file = self._file(record.file)
            header = _checked_header(file, record, manifest)
            self._offsets[:, shard] = [header[name].offset for name in names]
            self._labels[self._starts[shard] : self._starts[shard + 1]] = _checked_labels(file, header, manifest)
        self._row_bytes = header["latents"].row_bytes

    @classmethod
    def open(cls, path: str | Path) -> LatentStore:
        """Open the store in a folder; JLTError names what is wrong with one that is unfinished or damaged."""
        folder = Path(path)
        _require_finished(folder)
        manifest = read_manifest(folder)
        problems = _file_problems(folder, manifest)
        if problems:
            more = f" (and {len(problems) - 3} more problems)" if len(problems) > 3 else ""
            raise JLTError(f"The latent store {folder} is damaged: {' '.join(problems[:3])}{more}")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def shape(self) -> LatentShape:
        """The latents' shape and number of classes."""
        return self.manifest.shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that labels index."""
        return self.manifest.class_names

    @property
    def labels(self) -> Int64[np.ndarray, " n"]:
        """The labels of all latents in store order; do not write to it."""
        return self._labels

    def identity(self) -> dict[str, Any]:
        """Return what a result file says about the latents it came from."""
        manifest = self.manifest
        return {
            "autoencoder": manifest.autoencoder,
            "source": manifest.source,
            "count": manifest.count,
            "resolution": manifest.resolution,
            "manifest_sha256": manifest.sha256(),
        }

    def gather(
        self, indices: Int64[np.ndarray, " n"], flips: Bool[np.ndarray, " n"] | None = None
    ) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """Return the latents, in the stored dtype, and labels at the given indices, 0..len-1, in that order.

        `flips` asks per latent for the flipped orientation. IndexError for an index out of range, JLTError if flips are
        asked for and not stored, or if a file cannot be read.
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"indices from {indices.min()} to {indices.max()} in a store of {len(self)} latents")
        if flips is not None and flips.any() and not self.manifest.flips:
            raise JLTError(
                f"The latent store {self.folder} holds no flipped latents: encode with flips, or train without."
            )
        shape = self.shape
        dtype = STORED_DTYPES[self.manifest.dtype][1]
        latents = torch.empty((len(indices), shape.channels, shape.height, shape.width), dtype=dtype)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        orientation = 0 if flips is None else flips.astype(np.int64)
        offsets = self._offsets[orientation, shards] + (indices - self._starts[shards]) * self._row_bytes
        self._read_rows(latents, shards, offsets)
        return latents, torch.from_numpy(self._labels[indices])

    def batches(self, batch_size: int) -> Iterator[tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]]:
        """Yield all latents, unflipped, with their labels in store order; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.gather(np.arange(start, min(start + batch_size, len(self))))

    def _read_rows(self, latents: Tensor, shards: np.ndarray, offsets: np.ndarray) -> None:
        # Rows that follow each other both in the file and in the result are one read; reads go forward in each file.
        if len(offsets) == 0:
            return
        buffer = latents.view(torch.uint8).numpy().data.cast("B")
        breaks = (np.diff(offsets) != self._row_bytes) | (np.diff(shards) != 0)
        begins = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        ends = np.concatenate([begins[1:], [len(offsets)]])
        order = np.lexsort((offsets[begins], shards[begins]))
        begins, ends = begins[order], ends[order]
        runs = (shards[begins], offsets[begins], begins * self._row_bytes, ends * self._row_bytes)
        for shard, offset, begin, end in zip(*(column.tolist() for column in runs), strict=True):
            self._file(self.manifest.shards[shard].file).read_into(buffer[begin:end], offset)


def verify_store(path: str | Path) -> list[str]:
    """Read a whole store and return every problem found, each naming its file; an empty list means it is sound."""
    folder = Path(path)
    try:
        _require_finished(folder)
        manifest = read_manifest(folder)
    except JLTError as error:
        return [str(error)]
    problems = _file_problems(folder, manifest)
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        problems += filter(None, pool.map(functools.partial(_hash_problem, folder), manifest.shards))
    if not problems:
        try:
            LatentStore(folder, manifest)
        except JLTError as error:
            problems.append(str(error))
    return problems


def _require_finished(folder: Path) -> None:
    if (folder / MANIFEST_NAME).exists():
        return
    if (folder / STATE_FOLDER).is_dir():
        raise JLTError(f"The latent store {folder} is unfinished: run the same encode command again to complete it.")
    raise JLTError(f"{folder} is not a latent store: it has no {MANIFEST_NAME}.")


def _file_problems(folder: Path, manifest: StoreManifest) -> list[str]:
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    problems = []
    for record in manifest.shards:
        size = sizes.pop(record.file, None)
        if size is None:
            problems.append(f"{folder / record.file} is missing.")
        elif size != record.bytes:
            wrong = "truncated" if size < record.bytes else "too long"
            problems.append(f"{folder / record.file} is {wrong}: {size} bytes, and the manifest says {record.bytes}.")
    return problems + [f"{folder / name} is not in the manifest." for name in sorted(sizes)]


def _hash_problem(folder: Path, record: ShardRecord) -> str | None:
    path = folder / record.file
    if not path.exists() or path.stat().st_size != record.bytes:
        return None  # named already
    return None if sha256_file(path) == record.sha256 else f"{path} is damaged: its SHA-256 is not the manifest's."


def _checked_header(file: ShardFile, record: ShardRecord, manifest: StoreManifest) -> dict[str, TensorEntry]:
    entries = file.read_entries()
    latents = (STORED_DTYPES[manifest.dtype][0], (record.count, manifest.channels, manifest.height, manifest.width))
    expected = {"latents": latents, "labels": ("I64", (record.count,))}
    if manifest.flips:
        expected["latents_flip"] = latents
    for name, (dtype, shape) in expected.items():
        if name not in entries:
            raise JLTError(f"{file.path} holds no {name}.")
        found = entries[name]
        if (found.dtype, found.shape) != (dtype, shape):
            raise JLTError(
                f"{file.path} holds {name} as {found.dtype} {found.shape}, and the manifest says {dtype} {shape}."
            )
    return entries


def _checked_labels(file: ShardFile, header: dict[str, TensorEntry], manifest: StoreManifest) -> np.ndarray:
    labels = file.read_array(header["labels"])
    classes = len(manifest.class_names)
    if labels.min() < 0 or labels.max() >= classes:
        found = f"{labels.min()} to {labels.max()}"
        raise JLTError(f"{file.path} holds labels from {found}, and the manifest names {classes} classes.")
    return labels
