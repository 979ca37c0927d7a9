"""The latent store: reading of encoded images, verification of everything stored, and writing of arrays.

A few threads read rows with `preadv` straight into the result. Unlike with a memory map, a latent is one request to the
disk, memory does not grow with the store, and a file that shrinks is a named error instead of a SIGBUS.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from jlt.errors import JLTError
from jlt.latents.manifest import (
    MANIFEST_NAME,
    LatentSums,
    ShardRecord,
    StoreManifest,
    no_store,
    read_manifest,
    write_manifest,
)
from jlt.latents.shards import SAFETENSORS_NAMES, ShardFile, ShardWriter, TensorEntry
from jlt.runtime.environment import cores
from jlt.runtime.progress import track

STATE_FOLDER = ".encoding"
STORED_DTYPES = {"float16": torch.float16, "float32": torch.float32}
MAX_OPEN_SHARDS = 256
VERIFY_THREADS = 8
READING_THREADS = min(8, cores())
HASHED_BYTES = 2**20
"""Read and hashed at a time."""
LOWEST_PRIORITY = 19
BYTES_PER_THREAD = 2**22
"""With fewer bytes, it takes longer to start another thread than to read them."""


class LatentStore:
    """A finished store, opened for reading; several threads may read from it at once.

    `open` checks the manifest, the presence and size of every shard, every shard's header and every label;
    `open_verified` and `verify_store` also read everything and check the hashes. `shape` is the latents' shape and
    number of classes, `class_names` are the names that labels index, and `labels` those of all latents in store order.
    Do not write to `labels`.
    """

    labels: Int64[np.ndarray, " n"]

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shape, self.class_names = manifest.shape, manifest.class_names
        # The least recently used file is closed when no thread reads from it any more.
        self._file = functools.lru_cache(maxsize=_most_open_shards())(lambda name: ShardFile(folder / name))
        self._starts = np.cumsum([0, *(record.count for record in manifest.shards)])
        self.labels = np.empty(manifest.count, dtype=np.int64)
        # The offset of each orientation's latents in each shard's file.
        self._offsets = np.empty((len(manifest.orientations), len(manifest.shards)), dtype=np.int64)
        for shard, record in enumerate(manifest.shards):
            file = self._file(record.file)
            header = _checked_header(file, record, manifest)
            self._offsets[:, shard] = [header[name].offset for name in manifest.orientations]
            self.labels[self._starts[shard] : self._starts[shard + 1]] = _checked_labels(file, header, manifest)
        self._row_bytes = header["latents"].row_bytes
        self._readers = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="jlt-store")

    @classmethod
    def open(cls, path: str | Path) -> LatentStore:
        """Open the store in a folder; JLTError if it is unfinished or damaged."""
        folder = Path(path)
        _require_finished(folder)
        manifest = read_manifest(folder)
        problems = [problem for record in manifest.shards if (problem := _file_problem(folder, record))]
        _require_undamaged(folder, problems or _stray_problems(folder, manifest))
        return cls(folder, manifest)

    @classmethod
    def open_verified(cls, path: str | Path) -> LatentStore:
        """Open a store after reading all of it, as `verify_store` does; JLTError names the damaged files."""
        store = cls.open(path)
        _require_undamaged(store.folder, verify_store(path))
        return store

    def __len__(self) -> int:
        return self.manifest.count

    def identity(self) -> dict[str, Any]:
        """Return the fields by which result files identify the latents."""
        manifest = self.manifest
        exif, skipped = (manifest.encoding or {}).get("exif", "ignore"), [image.index for image in manifest.skipped]
        # What tells the encoded images from those of the source, where they differ.
        encoded = {**({"exif": exif} if exif != "ignore" else {}), **({"skipped": skipped} if skipped else {})}
        return {
            **encoded,
            "autoencoder": manifest.autoencoder,
            "source": manifest.source,
            "count": manifest.count,
            "resolution": manifest.resolution,
            "class_names": list(manifest.class_names),
            "manifest_sha256": manifest.sha256(),
        }

    def empty(self, count: int) -> Float[Tensor, "{count} c h w"]:
        """Return uninitialised memory for `count` latents in the stored dtype."""
        return torch.empty(self.manifest.latents_shape(count), dtype=STORED_DTYPES[self.manifest.dtype])

    def gather(
        self,
        indices: Int64[np.ndarray, " n"],
        flips: Bool[np.ndarray, " n"] | None = None,
        out: Float[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """Return the latents, in the stored dtype, and labels at the given indices, 0..len-1, in that order.

        `flips` selects the flipped orientation per latent. `out`, as `empty(n)` returns it, receives the latents; new
        memory instead costs up to half the time again. IndexError for an index out of range, ValueError for an
        unsuitable `out`, JLTError for flips that are not stored or a file that cannot be read.
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"indices from {indices.min()} to {indices.max()} in a store of {len(self)} latents")
        if flips is not None and flips.any() and not self.manifest.flips:
            raise JLTError(
                f"The latent store {self.folder} holds no flipped latents: encode with flips, or train without."
            )
        latents = self.empty(len(indices)) if out is None else self._require_like_empty(out, len(indices))
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        orientation = 0 if flips is None else flips.astype(np.int64)
        offsets = self._offsets[orientation, shards] + (indices - self._starts[shards]) * self._row_bytes
        self._read_rows(latents, shards, offsets)
        return latents, torch.from_numpy(self.labels[indices])

    def batches(self, batch_size: int) -> Iterator[tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]]:
        """Yield all latents, unflipped, with their labels in store order; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.gather(np.arange(start, min(start + batch_size, len(self))))

    def _require_like_empty(self, out: Tensor, count: int) -> Tensor:
        shape, dtype = self.manifest.latents_shape(count), STORED_DTYPES[self.manifest.dtype]
        if (out.shape, out.dtype, out.device.type) != (shape, dtype, "cpu") or not out.is_contiguous():
            got = f"{out.dtype} of {tuple(out.shape)} on {out.device}"
            raise ValueError(f"out has to be contiguous {dtype} of {shape} in host memory, got {got}")
        return out

    def _read_rows(self, latents: Tensor, shards: np.ndarray, offsets: np.ndarray) -> None:
        # Rows that are consecutive in the file and in the result are one read; reads go forward in each file.
        if len(offsets) == 0:
            return
        buffer = latents.view(torch.uint8).numpy().data.cast("B")
        breaks = (np.diff(offsets) != self._row_bytes) | (np.diff(shards) != 0)
        begins = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        ends = np.concatenate([begins[1:], [len(offsets)]])
        order = np.lexsort((offsets[begins], shards[begins]))
        begins, ends = begins[order], ends[order]
        runs = [shards[begins], offsets[begins], begins * self._row_bytes, ends * self._row_bytes]
        pieces = min(READING_THREADS, len(begins), -(-len(buffer) // BYTES_PER_THREAD))
        columns = [[part.tolist() for part in np.array_split(run, pieces)] for run in runs]
        first, *others = zip(*columns, strict=True)
        elsewhere = [self._readers.submit(self._read_runs, buffer, *share) for share in others]
        self._read_runs(buffer, *first)
        for reading in elsewhere:
            reading.result()

    def _read_runs(
        self, buffer: memoryview, shards: list[int], offsets: list[int], begins: list[int], ends: list[int]
    ) -> None:
        current = -1
        for shard, offset, begin, end in zip(shards, offsets, begins, ends, strict=True):
            if shard != current:
                current, file = shard, self._file(self.manifest.shards[shard].file)
            file.read_into(buffer[begin:end], offset)


def _most_open_shards() -> int:
    """Return how many shards are open at a time: a quarter of the files that this process may open, at most."""
    permitted = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN_SHARDS if permitted < 0 else max(1, min(MAX_OPEN_SHARDS, permitted // 4))


def verify_store(path: str | Path) -> list[str]:
    """Read a whole store and return every problem found, each naming its file; an empty list means it is intact.

    It finds missing, additional, longer and shorter files, every changed byte of a shard or of the manifest, and a
    manifest that does not fit its shards. It cannot find changes by a person who also updated the hashes, if sizes,
    labels and positions remain consistent. Hidden files are ignored.
    """
    folder = Path(path)
    try:
        _require_finished(folder)
        manifest = read_manifest(folder)
    except JLTError as error:
        return [str(error)]
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        damages = pool.map(functools.partial(shard_problem, folder), manifest.shards)
        problems = [*filter(None, track(damages, f"verifying {folder}", total=len(manifest.shards)))]
    problems += _stray_problems(folder, manifest)
    if not problems:
        try:
            LatentStore(folder, manifest)
            _check_positions(folder, manifest)
        except JLTError as error:
            problems.append(str(error))
    return problems


def _require_finished(folder: Path) -> None:
    if (folder / MANIFEST_NAME).exists():
        return
    if (folder / STATE_FOLDER).is_dir():
        raise JLTError(f"The latent store {folder} is unfinished: run the same encode command again to complete it.")
    raise no_store(folder)


def _require_undamaged(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 3} more problems)" if len(problems) > 3 else ""
        raise JLTError(f"The latent store {folder} is damaged: {' '.join(problems[:3])}{more}")


def _file_problem(folder: Path, record: ShardRecord) -> str | None:
    path = folder / record.file
    try:
        status = path.stat()
    except FileNotFoundError:
        return f"{path} is missing."
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})."
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is not a file."
    if status.st_size != record.bytes:
        wrong = "truncated" if status.st_size < record.bytes else "too long"
        return f"{path} is {wrong}: {status.st_size} bytes, and the manifest says {record.bytes}."
    return None


def _stray_problems(folder: Path, manifest: StoreManifest) -> list[str]:
    found = {entry.name for entry in folder.glob("*.safetensors") if not entry.name.startswith(".")}
    strays = found - {record.file for record in manifest.shards}
    return [f"{folder / name} is not in the manifest." for name in sorted(strays)]


def shard_problem(folder: Path, record: ShardRecord, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """Return the fault of a shard of a store, after reading all of it; None if it is intact, or `stopped` is true."""
    path = folder / record.file
    if problem := _file_problem(folder, record):
        return problem
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(HASHED_BYTES):
                if stopped():
                    return None
                digest.update(block)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})."
    return None if digest.hexdigest() == record.sha256 else f"{path} is damaged: its SHA-256 is not the manifest's."


class ShardCheck(contextlib.AbstractContextManager["ShardCheck"]):
    """Compares shards with their hashes in a thread, while the store is in use; a context manager.

    Of several processes, each takes its share of the shards. Leaving it waits for the rest, and raises a JLTError that
    names a damaged shard; leaving it by an exception ends the thread.
    """

    def __init__(self, store: LatentStore, rank: int = 0, processes: int = 1) -> None:
        self._folder, self._records = store.folder, store.manifest.shards[rank::processes]
        self._left = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jlt-check")
        self._checking = self._pool.submit(self._check)

    def _check(self) -> str | None:
        if hasattr(os, "setpriority"):
            # Of this thread alone: it gets the time that the work leaves.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        for record in self._records:
            if problem := shard_problem(self._folder, record, self._left.is_set):
                return problem
        return None

    def raise_found(self) -> None:
        """Raise JLTError if a damaged shard was found until now."""
        if self._checking.done() and (problem := self._checking.result()):
            raise JLTError(
                f"{problem} Results of this command so far may be of damaged latents: repair the store with "
                "jlt encode --repair, and start again."
            )

    def wait(self) -> None:
        """Wait until all shards are checked; JLTError names one that is damaged."""
        wait([self._checking])
        self.raise_found()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self._left.set()
        self._pool.shutdown(wait=True)
        if error is None:
            self.raise_found()


def _check_positions(folder: Path, manifest: StoreManifest) -> None:
    """Raise JLTError unless every image of the source is stored, in order, or listed as skipped."""
    if manifest.encoding is None:
        return  # The positions of adopted latents are unknown.
    skipped, images = [image.index for image in manifest.skipped], manifest.source.get("count")
    if manifest.count + len(skipped) != images:
        raise JLTError(
            f"{folder / MANIFEST_NAME} counts {manifest.count} latents and {len(skipped)} skipped images, "
            f"and {images} images in the source."
        )
    expected = np.setdiff1d(np.arange(images), np.array(skipped, dtype=np.int64))
    for record in manifest.shards:
        file = ShardFile(folder / record.file)
        entry = file.read_entries().get("index")
        if entry is None or (entry.dtype, entry.shape) != ("I64", (record.count,)):
            raise JLTError(f"{file.path} does not hold the position in the source of each of its latents.")
        if not np.array_equal(file.read_array(entry), expected[: record.count]):
            raise JLTError(f"{file.path} holds latents of the wrong images, or in the wrong order.")
        expected = expected[record.count :]


def _checked_header(file: ShardFile, record: ShardRecord, manifest: StoreManifest) -> dict[str, TensorEntry]:
    entries = file.read_entries()
    # Adopted shards may hold labels of either integer type.
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {"labels": (("I64", "I32"), (record.count,))}
    latents = (SAFETENSORS_NAMES[manifest.dtype],), manifest.latents_shape(record.count)
    expected |= dict.fromkeys(manifest.orientations, latents)
    for name, (dtypes, shape) in expected.items():
        if name not in entries:
            raise JLTError(f"{file.path} holds no {name}.")
        found = entries[name]
        if found.dtype not in dtypes or found.shape != shape:
            raise JLTError(
                f"{file.path} holds {name} as {found.dtype} {found.shape}, and the manifest says {dtypes[0]} {shape}."
            )
    return entries


def _checked_labels(file: ShardFile, header: dict[str, TensorEntry], manifest: StoreManifest) -> np.ndarray:
    labels = file.read_array(header["labels"])
    classes = len(manifest.class_names)
    if labels.min() < 0 or labels.max() >= classes:
        found = f"{labels.min()} to {labels.max()}"
        raise JLTError(f"{file.path} holds labels from {found}, and the manifest names {classes} classes.")
    return labels


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
        with ShardWriter(path, {name: (values.dtype.name, values.shape) for name, values in arrays.items()}) as writer:
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
        dtype=latents.dtype.name,  # type: ignore[arg-type]
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
