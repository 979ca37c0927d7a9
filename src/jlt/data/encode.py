"""Encoding: images through a frozen autoencoder into a latent store, once, so that training never sees a pixel.

Shards are written one after the other, each whole or not at all, with a record of its hash and sums beside it. The
manifest comes last. Started again with the same words an encoding keeps the shards that match their record and makes
the others; since batches never straddle shards, the finished store does not depend on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.autoencoders.registry import load_autoencoder
from jlt.data.config import EncodeConfig
from jlt.data.crop import centre_crop
from jlt.data.manifest import MANIFEST_NAME, ShardRecord, StoreManifest, write_manifest
from jlt.data.shards import ShardWriter
from jlt.data.sources.contract import ImageSource
from jlt.data.sources.registry import open_source
from jlt.data.store import STATE_FOLDER, STORED_DTYPES, LatentStore
from jlt.errors import JLTError
from jlt.files import atomic_path, difference, lock_folder, read_json, sha256_file, write_json
from jlt.progress import say, track

CROP = "adm centre crop"
LATENTS = ("latents", "latents_flip")
STD_RANGE = (0.5, 1.5)
"""Standard deviation of all values between which latents count as normalised; FLUX.2's are near 1.77 without it."""


def encode(config: EncodeConfig, out: Path, device: str = "cpu") -> StoreManifest:
    """Encode a collection of images into the latent store `out` and return its manifest.

    Continues where an encoding with the same words was interrupted, and returns at once where it is complete. JLTError
    if the folder holds anything else or was begun with other words, if an image does not decode, and if the latents are
    not finite or not normalised.
    """
    source = open_source(config.images)
    autoencoder = load_autoencoder(config.autoencoder, config.autoencoder_path, device)
    return encode_source(source, autoencoder, config, out)


def encode_source(source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig, out: Path) -> StoreManifest:
    """Encode an opened source with a loaded autoencoder; otherwise as `encode`."""
    job = _Job(source, autoencoder, config, out)
    words = job.words()
    if (out / MANIFEST_NAME).exists():
        finished = LatentStore.open(out).manifest
        _require_same_words(out, {name: finished.content()[name] for name in words}, words)
        shutil.rmtree(out / STATE_FOLDER, ignore_errors=True)
        return finished
    with _claimed(out, words):
        missing = [shard for shard in range(job.num_shards) if not job.is_sound(shard)]
        if len(missing) < job.num_shards:
            say(f"{out}: {job.num_shards - len(missing)} of {job.num_shards} shards are there already")
        images = sum(len(job.rows(shard)) for shard in missing)
        for _ in track(job.run(missing), f"encoding {source.name}", total=images):
            pass
        manifest = job.manifest()
        write_manifest(out, manifest)
    shutil.rmtree(out / STATE_FOLDER)
    return manifest


@dataclass(frozen=True)
class _Sums:
    """Sums over the stored latents of a shard, per channel, from which its mean and standard deviation follow."""

    values: int
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def zero(cls, channels: int) -> _Sums:
        return cls(0, np.zeros(channels), np.zeros(channels))

    def add(self, latents: np.ndarray) -> _Sums:
        wide = latents.astype(np.float64)
        values = self.values + latents.size // latents.shape[1]
        return _Sums(values, self.total + wide.sum((0, 2, 3)), self.squares + np.square(wide).sum((0, 2, 3)))

    def merge(self, other: _Sums) -> _Sums:
        return _Sums(self.values + other.values, self.total + other.total, self.squares + other.squares)

    def mean(self) -> np.ndarray:
        return self.total / self.values

    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.squares / self.values - self.mean() ** 2, 0))

    def overall_std(self) -> float:
        return float(np.sqrt(max(np.mean(self.squares) / self.values - np.mean(self.mean()) ** 2, 0)))


class _Job:
    """One encoding: what goes into which shard, and the making of each."""

    def __init__(self, source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig, out: Path) -> None:
        if min(config.resolution, config.batch_size, config.shard_size) < 1:
            raise JLTError("Resolution, batch size and shard size have to be at least 1.")
        if config.resolution % autoencoder.downsampling:
            raise JLTError(
                f"A resolution of {config.resolution} is not a multiple of {autoencoder.downsampling}, "
                f"the image pixels per latent position of the autoencoder {autoencoder.name!r}."
            )
        self.source, self.autoencoder, self.config, self.out = source, autoencoder, config, out
        self.identity = autoencoder.identity()
        self.side = config.resolution // autoencoder.downsampling
        self.num_shards = -(-len(source) // config.shard_size)

    def words(self) -> dict[str, Any]:
        """Everything that decides the content of the store."""
        config = dataclasses.asdict(self.config)
        chosen = {name: config[name] for name in ("resolution", "flips", "dtype", "batch_size", "shard_size")}
        words = {"source": self.source.identity(), "autoencoder": self.identity, "crop": CROP, **chosen}
        return json.loads(json.dumps(words))

    def rows(self, shard: int) -> range:
        """The positions in the source that a shard holds."""
        size = self.config.shard_size
        return range(shard * size, min((shard + 1) * size, len(self.source)))

    def shard_path(self, shard: int) -> Path:
        return self.out / f"shard-{shard:05d}.safetensors"

    def record_path(self, shard: int) -> Path:
        return self.out / STATE_FOLDER / f"shard-{shard:05d}.json"

    def is_sound(self, shard: int) -> bool:
        """Whether an earlier run finished this shard and it still is what was written."""
        path, record_path = self.shard_path(shard), self.record_path(shard)
        if not (path.exists() and record_path.exists()):
            return False
        with contextlib.suppress(JLTError):
            if sha256_file(path) == read_json(record_path)["sha256"]:
                return True
        say(f"{path} was damaged since it was written, and is made again")
        return False

    def run(self, shards: list[int]) -> Iterator[int]:
        """Make the given shards, yielding the position of every image that is done."""
        for shard in shards:
            sums = _Sums.zero(self.autoencoder.channels)
            with atomic_path(self.shard_path(shard)) as temporary:
                with ShardWriter(temporary, self.layout(len(self.rows(shard)))) as writer:
                    for rows, stored in self.encode_rows(self.rows(shard)):
                        for name, latents in stored.items():
                            writer.write(name, rows.start - self.rows(shard).start, latents)
                        # In this order always: another order of additions could change the last bit of a sum.
                        for name in LATENTS[: 1 + self.config.flips]:
                            sums = sums.add(stored[name])
                        yield from rows
                if shard == 0:
                    # Rather after the first shard than after a day.
                    self.require_normalised(sums)
            record = {"sha256": sha256_file(self.shard_path(shard)), "values": sums.values}
            record |= {"total": sums.total.tolist(), "squares": sums.squares.tolist()}
            write_json(self.record_path(shard), record)

    def layout(self, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of a shard with their dtypes and shapes."""
        latents = (STORED_DTYPES[self.config.dtype][0], (count, self.autoencoder.channels, self.side, self.side))
        flipped = {"latents_flip": latents} if self.config.flips else {}
        return {"latents": latents, **flipped, "labels": ("I64", (count,)), "index": ("I64", (count,))}

    def encode_rows(self, rows: range) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
        """Yield batches of source positions with all that a shard stores of them."""
        for start in range(rows.start, rows.stop, self.config.batch_size):
            batch = range(start, min(start + self.config.batch_size, rows.stop))
            pixels, labels = _load(self.source, batch, self.config.resolution)
            images = (pixels.to(self.autoencoder.device).permute(0, 3, 1, 2) / 127.5 - 1).contiguous()
            stored = {"labels": labels, "index": np.arange(batch.start, batch.stop)}
            stored["latents"] = self.encode_images(images, batch)
            if self.config.flips:
                stored["latents_flip"] = self.encode_images(images.flip(3), batch)
            yield batch, stored

    def encode_images(self, images: Float[Tensor, "n 3 s s"], batch: range) -> Float[np.ndarray, "n c h w"]:
        """Encode one batch to the stored dtype; JLTError if it is not finite in it."""
        latents = self.autoencoder.encode(images).float()
        expected = (len(batch), self.autoencoder.channels, self.side, self.side)
        if latents.shape != expected:
            raise ValueError(f"{self.autoencoder.name} gave latents {tuple(latents.shape)}, its sizes say {expected}")
        stored = latents.to(STORED_DTYPES[self.config.dtype][1])
        finite = torch.isfinite(stored).all(dim=(1, 2, 3))
        if not finite.all():
            first = int(finite.logical_not().nonzero()[0, 0])
            bad = int(torch.isfinite(stored[first]).logical_not().sum())
            raise JLTError(
                f"The latents of {self.source.describe(batch[first])} are not finite in {self.config.dtype}: {bad} of "
                f"{stored[first].numel()} values, largest {float(latents[first].abs().max()):.3g}; "
                "check the autoencoder's weights and its normalisation."
            )
        return stored.cpu().numpy()

    def require_normalised(self, sums: _Sums) -> None:
        """Refuse latents of a scale that noise of unit variance was not meant for (DESIGN 7.10)."""
        low, high = STD_RANGE
        if low <= sums.overall_std() <= high or self.identity["normalisation"]["kind"] == "none":
            return
        raise JLTError(
            f"The latents of {self.autoencoder.name!r} are not normalised: their standard deviation is "
            f"{sums.overall_std():.3g} (channels from {sums.std().min():.3g} to {sums.std().max():.3g}), and {low} to "
            f"{high} is expected; check that the autoencoder's normalisation statistics are its own and fit the images."
        )

    def manifest(self) -> StoreManifest:
        """Collect the records of all shards; JLTError if the whole is not normalised."""
        sums = _Sums.zero(self.autoencoder.channels)
        shards = []
        for shard in range(self.num_shards):
            record, path = read_json(self.record_path(shard)), self.shard_path(shard)
            sums = sums.merge(_Sums(record["values"], np.array(record["total"]), np.array(record["squares"])))
            shards.append(ShardRecord(path.name, len(self.rows(shard)), path.stat().st_size, record["sha256"]))
        self.require_normalised(sums)
        return StoreManifest(
            **self.words(),
            channels=self.autoencoder.channels,
            height=self.side,
            width=self.side,
            class_names=self.source.class_names,
            count=len(self.source),
            channel_mean=tuple(sums.mean().tolist()),
            channel_std=tuple(sums.std().tolist()),
            std=sums.overall_std(),
            shards=tuple(shards),
        )


def _load(source: ImageSource, rows: range, resolution: int) -> tuple[UInt8[Tensor, "n s s 3"], np.ndarray]:
    pixels = np.empty((len(rows), resolution, resolution, 3), dtype=np.uint8)
    labels = np.empty(len(rows), dtype=np.int64)
    for position, row in enumerate(rows):
        image, labels[position] = source[row]
        try:
            pixels[position] = centre_crop(image, resolution)
        except JLTError as error:
            raise JLTError(f"{source.describe(row)}: {error}") from error
    return torch.from_numpy(pixels), labels


@contextlib.contextmanager
def _claimed(out: Path, words: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for one encoding with these words; JLTError if anybody or anything else has it."""
    state = out / STATE_FOLDER
    if out.exists() and not out.is_dir():
        raise JLTError(f"{out} is a file: name a folder for the latent store.")
    if not state.is_dir() and out.is_dir() and any(out.iterdir()):
        raise JLTError(
            f"{out} holds other files and is left as it is: name a new or empty folder for the latent store."
        )
    state.mkdir(parents=True, exist_ok=True)
    with lock_folder(state):
        words_path = state / "words.json"
        # Words bind from the first finished shard on, so that a refused first attempt can be corrected in place.
        if words_path.exists() and any(state.glob("shard-*.json")):
            _require_same_words(out, read_json(words_path), words)
        write_json(words_path, words)
        for leftover in out.glob(".shard-*.partial.safetensors"):
            leftover.unlink()
        yield


def _require_same_words(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    lines = difference(before, now)
    if lines:
        raise JLTError(f"{out} was encoded with other words ({'; '.join(lines)}): use those, or name another folder.")
