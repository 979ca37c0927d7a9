"""The plan of an encoding, which images go into which shard and batch, and the facts about each finished shard.

A shard holds a fixed range of the source's positions, and no batch spans two shards. So the content of every file
follows from the arguments alone: not from the number of processes, nor from interruptions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.errors import JLTError, UsageError
from jlt.images.decoding import PixelBatch
from jlt.images.source import ImageSource, SkippedImage
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.manifest import LatentSums, ShardRecord, StoreManifest
from jlt.latents.shards import Layout
from jlt.latents.store import STATE_FOLDER, STORED_DTYPES, VERIFY_THREADS
from jlt.runtime.environment import require_memory
from jlt.runtime.progress import inform, track
from jlt.runtime.random_numbers import derive_seed
from jlt.storage.codec import from_json, to_json
from jlt.storage.files import read_sealed_json, sealed_text, sha256_file, write_text

CROP = "adm centre crop"


@dataclass(frozen=True)
class FinishedShard:
    """The facts about a shard that are kept until the manifest is written.

    `record` and `sums` are None where every image was skipped: such a shard has no file.
    """

    record: ShardRecord | None
    sums: LatentSums | None
    skipped: tuple[SkippedImage, ...]
    made_with: dict[str, str]


class EncodingJob:
    """One encoding of an opened source through a loaded autoencoder into the folder `out`."""

    def __init__(self, source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig, out: Path) -> None:
        # A batch as levels and as floating-point numbers.
        require_memory(3 * 5 * config.batch_size * config.resolution**2, f"A batch of {config.batch_size:,} images")
        if config.resolution % autoencoder.downsampling:
            raise UsageError(
                f"A resolution of {config.resolution} is not a multiple of {autoencoder.downsampling}, "
                f"the image pixels per latent position of the autoencoder {autoencoder.name!r}."
            )
        self.source, self.autoencoder, self.config, self.out = source, autoencoder, config, out
        self.side = config.resolution // autoencoder.downsampling
        self.orientations = ("latents", "latents_flip") if config.flips else ("latents",)
        self.num_shards = -(-len(source) // config.shard_size)

    def arguments(self) -> dict[str, Any]:
        """Return everything that decides the content of the store, as JSON fields of its manifest."""
        config = self.config
        encoding = {"crop": CROP} | {
            name: getattr(config, name) for name in ("exif", "precision", "batch_size", "shard_size")
        }
        # On a GPU they decide nothing.
        encoding["threads"] = config.threads if self.autoencoder.device.type == "cpu" else None
        return to_json(
            {
                "autoencoder": self.autoencoder.identity(),
                "source": self.source.identity(),
                "encoding": encoding,
                "resolution": config.resolution,
                "flips": config.flips,
                "dtype": config.dtype,
                "class_names": self.source.class_names,
            }
        )

    def rows(self, shard: int) -> range:
        """Return the positions in the source that a shard holds."""
        size = self.config.shard_size
        return range(shard * size, min((shard + 1) * size, len(self.source)))

    def batches(self, shard: int) -> list[range]:
        """Return the positions of each batch of a shard, in order."""
        rows, size = self.rows(shard), self.config.batch_size
        return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]

    def layout(self, count: int) -> Layout:
        """Return the tensors of a shard of `count` latents."""
        shape = (count, self.autoencoder.channels, self.side, self.side)
        latents = dict.fromkeys(self.orientations, (self.config.dtype, shape))
        return {**latents, "labels": ("int64", (count,)), "index": ("int64", (count,))}

    @property
    def batch_bytes(self) -> int:
        """Bytes of one batch of latents, in all its orientations."""
        values = self.config.batch_size * self.autoencoder.channels * self.side**2 * len(self.orientations)
        return values * np.dtype(self.config.dtype).itemsize

    def shard_path(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self.out / f"shard-{shard:05d}.safetensors"

    def _facts_path(self, shard: int) -> Path:
        return self.out / STATE_FOLDER / f"shard-{shard:05d}.json"

    def save_facts(self, shard: int, facts: FinishedShard) -> None:
        """Save the facts about a finished shard; with them, a resumed encoding keeps the shard."""
        write_text(self._facts_path(shard), sealed_text(to_json(facts)))

    def load_facts(self, shard: int) -> FinishedShard:
        """Return the facts about a finished shard; JLTError if there are none, or their file is damaged."""
        return from_json(FinishedShard, read_sealed_json(self._facts_path(shard)))

    def missing(self) -> list[int]:
        """Return the shards that no earlier attempt finished, or that were damaged since."""
        with ThreadPoolExecutor(VERIFY_THREADS) as pool:
            found = pool.map(self._is_finished, range(self.num_shards))
            finished = list(track(found, "checking finished shards", total=self.num_shards))
        return [shard for shard in range(self.num_shards) if not finished[shard]]

    def _is_finished(self, shard: int) -> bool:
        if not self._facts_path(shard).exists():
            return False
        path = self.shard_path(shard)
        with contextlib.suppress(JLTError, OSError):
            record = self.load_facts(shard).record
            if record is None or sha256_file(path) == record.sha256:
                return True
        inform(f"{path} or its entry in {STATE_FOLDER} is damaged: the shard is encoded again.")
        return False

    def require_skipping_allowed(self, skipped: Sequence[SkippedImage]) -> None:
        """Raise a JLTError if an earlier attempt skipped images and this one must not."""
        if skipped and self.config.on_bad_image == "stop":
            count = f"{len(skipped)} bad images, {skipped[0].image} first" if len(skipped) > 1 else skipped[0].image
            raise JLTError(f"An earlier attempt skipped {count}: resume with --on-bad-image skip.")

    def made_with(self) -> dict[str, str]:
        """Return the device and the versions that decide the last bits of latents."""
        device = self.autoencoder.device
        cpu = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        return {"device": name, "torch": torch.__version__, "pillow": PIL.__version__}

    def manifest(self) -> StoreManifest:
        """Return the manifest of the finished shards; JLTError if there are none, or latents of a wrong scale."""
        finished = [self.load_facts(shard) for shard in range(self.num_shards)]
        shards = tuple(facts.record for facts in finished if facts.record)
        if not shards:
            raise JLTError(f"None of the {len(self.source)} images of {self.source.name} can be used.")
        sums = LatentSums.zero(self.autoencoder.channels)
        for facts in finished:
            sums = sums.merge(facts.sums) if facts.sums else sums
        sums.require_normalised(self.autoencoder.identity())
        return StoreManifest(
            **{**self.arguments(), "class_names": self.source.class_names},
            channels=self.autoencoder.channels,
            height=self.side,
            width=self.side,
            count=sum(record.count for record in shards),
            skipped=tuple(image for facts in finished for image in facts.skipped),
            made_with=tuple({tuple(sorted(facts.made_with.items())): facts.made_with for facts in finished}.values()),
            **sums.moments(),
            shards=shards,
        )


@dataclass(frozen=True)
class EncodedBatch:
    """The latents of the usable images among the positions `rows`, in the stored dtype, on the autoencoder's device.

    The keys of `latents` and `largest` are orientations; `largest` is each latent's largest absolute value before
    rounding.
    """

    rows: range
    index: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    latents: dict[str, Float[Tensor, "n c h w"]]
    largest: dict[str, Float[Tensor, " n"]]
    bad: tuple[SkippedImage, ...]


def encode_batch(job: EncodingJob, batch: PixelBatch) -> EncodedBatch:
    """Encode a batch of pixels in the orientations that are stored."""
    # Channels stay last in memory, which is fastest for the autoencoders' convolutions.
    pixels = torch.from_numpy(batch.pixels).to(job.autoencoder.device)
    images = pixels.float().div_(127.5).sub_(1).permute(0, 3, 1, 2)
    latents, largest = {}, {}
    for name in job.orientations:
        seeds = None
        if job.autoencoder.posterior == "sample":
            # A function of the image's position in the source alone.
            seeds = [derive_seed(0, name, index) for index in batch.index.tolist()]
        exact = _encode_images(job, images.flip(3) if name == "latents_flip" else images, seeds)
        latents[name] = exact.to(STORED_DTYPES[job.config.dtype])
        largest[name] = exact.abs().amax(dim=(1, 2, 3)) if len(exact) else exact.new_empty(0)
    return EncodedBatch(batch.rows, batch.index, batch.labels, latents, largest, batch.bad)


def _encode_images(
    job: EncodingJob, images: Float[Tensor, "n 3 s s"], noise_seeds: list[int] | None
) -> Float[Tensor, "n c h w"]:
    expected = (len(images), job.autoencoder.channels, job.side, job.side)
    if not len(images):
        return images.new_empty(expected)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=job.config.precision == "bfloat16"):
        latents = job.autoencoder.encode(images, noise_seeds).float()
    if latents.shape != expected:
        raise ValueError(f"{job.autoencoder.name} gave latents {tuple(latents.shape)}, its sizes say {expected}")
    return latents


def require_finite(job: EncodingJob, batch: EncodedBatch, name: str) -> None:
    """Raise a JLTError that names the first image whose latent, as stored, holds infinities or NaN."""
    dtype, largest = job.config.dtype, batch.largest[name]
    # Rounding keeps the order, so a latent is finite as stored if its largest value is.
    finite = torch.isfinite(largest.to(STORED_DTYPES[dtype]))
    if finite.all():
        return
    first = int(finite.logical_not().nonzero()[0, 0])
    latent = batch.latents[name][first]
    bad = int(torch.isfinite(latent).logical_not().sum())
    raise JLTError(
        f"The latents of {job.source.describe(int(batch.index[first]))} are not finite in {dtype}: {bad} of "
        f"{latent.numel()} values, largest {largest[first].item():.3g}. "
        "Check the autoencoder's weights and its normalisation."
    )
