"""What an encoding consists of: which images go into which shard and batch, and what is known of each finished shard.

A shard holds a fixed range of the source's positions and batches never straddle shards, so the content of every file
follows from the words alone: not from how many processes work, nor from where an earlier attempt was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import torch

from jlt.autoencoders.contract import Autoencoder
from jlt.errors import JLTError
from jlt.images.source import ImageSource, SkippedImage
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.manifest import ShardRecord, StoreManifest
from jlt.latents.shards import ITEM_BYTES
from jlt.latents.statistics import LatentSums
from jlt.latents.store import STATE_FOLDER, STORED_DTYPES, VERIFY_THREADS
from jlt.runtime.progress import inform, track
from jlt.storage.files import read_sealed_json, sealed_text, sha256_file, write_text

CROP = "adm centre crop"


@dataclass(frozen=True)
class FinishedShard:
    """What an encoding remembers of a shard until the manifest is written.

    `record` and `sums` are None where every image was skipped: such a shard has no file.
    """

    record: ShardRecord | None
    sums: LatentSums | None
    skipped: tuple[SkippedImage, ...]
    made_with: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values from which `from_json` makes the same facts."""
        record = dataclasses.asdict(self.record) if self.record else None
        skipped = [dataclasses.asdict(image) for image in self.skipped]
        return {
            "record": record,
            "sums": self.sums.to_json() if self.sums else None,
            "skipped": skipped,
            "made_with": self.made_with,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> FinishedShard:
        """Return the facts that `to_json` wrote."""
        record = ShardRecord(**fields["record"]) if fields["record"] else None
        skipped = tuple(SkippedImage(**image) for image in fields["skipped"])
        sums = LatentSums.from_json(fields["sums"]) if fields["sums"] else None
        return cls(record, sums, skipped, fields["made_with"])


class EncodingJob:
    """One encoding of an opened source through a loaded autoencoder into the folder `out`."""

    def __init__(self, source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig, out: Path) -> None:
        if min(config.resolution, config.batch_size, config.shard_size) < 1:
            raise JLTError("Resolution, batch size and shard size have to be at least 1.")
        if config.threads < 1 or (config.workers or 0) < 0:
            raise JLTError("An autoencoder has at least one thread, and there are no fewer than 0 workers.")
        if config.resolution % autoencoder.downsampling:
            raise JLTError(
                f"A resolution of {config.resolution} is not a multiple of {autoencoder.downsampling}, "
                f"the image pixels per latent position of the autoencoder {autoencoder.name!r}."
            )
        self.source, self.autoencoder, self.config, self.out = source, autoencoder, config, out
        self.identity = autoencoder.identity()
        self.side = config.resolution // autoencoder.downsampling
        self.orientations = ("latents", "latents_flip") if config.flips else ("latents",)
        self.num_shards = -(-len(source) // config.shard_size)

    def words(self) -> dict[str, Any]:
        """Return everything that decides the content of the store, by the manifest's names."""
        config = self.config
        encoding = {"crop": CROP} | {
            name: getattr(config, name) for name in ("exif", "precision", "batch_size", "shard_size")
        }
        # On a GPU they decide nothing.
        encoding["threads"] = config.threads if self.autoencoder.device.type == "cpu" else None
        words = {
            "autoencoder": self.identity,
            "source": self.source.identity(),
            "encoding": encoding,
            "resolution": config.resolution,
            "flips": config.flips,
            "dtype": config.dtype,
            "class_names": self.source.class_names,
        }
        return json.loads(json.dumps(words))

    def rows(self, shard: int) -> range:
        """Return the positions in the source that a shard holds."""
        size = self.config.shard_size
        return range(shard * size, min((shard + 1) * size, len(self.source)))

    def batches(self, shard: int) -> list[range]:
        """Return the positions that go through the autoencoder together, in order."""
        rows, size = self.rows(shard), self.config.batch_size
        return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]

    def layout(self, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the tensors of a shard with their dtypes and shapes."""
        shape = (count, self.autoencoder.channels, self.side, self.side)
        latents = dict.fromkeys(self.orientations, (STORED_DTYPES[self.config.dtype][0], shape))
        return {**latents, "labels": ("I64", (count,)), "index": ("I64", (count,))}

    @property
    def batch_bytes(self) -> int:
        """How much one batch of latents takes, in all its orientations."""
        values = self.config.batch_size * self.autoencoder.channels * self.side**2 * len(self.orientations)
        return values * ITEM_BYTES[STORED_DTYPES[self.config.dtype][0]]

    def shard_path(self, shard: int) -> Path:
        """Return where a shard lies."""
        return self.out / f"shard-{shard:05d}.safetensors"

    def _facts_path(self, shard: int) -> Path:
        return self.out / STATE_FOLDER / f"shard-{shard:05d}.json"

    def remember(self, shard: int, finished: FinishedShard) -> None:
        """Note that a shard is finished; from here on no restart makes it again."""
        write_text(self._facts_path(shard), sealed_text(finished.to_json()))

    def recall(self, shard: int) -> FinishedShard:
        """Return what is remembered of a shard; JLTError if nothing is, or it was damaged."""
        return FinishedShard.from_json(read_sealed_json(self._facts_path(shard)))

    def missing(self) -> list[int]:
        """Return the shards that no earlier attempt finished, or that were damaged since."""
        with ThreadPoolExecutor(VERIFY_THREADS) as pool:
            found = pool.map(self._is_sound, range(self.num_shards))
            sound = list(track(found, "checking finished shards", total=self.num_shards))
        return [shard for shard in range(self.num_shards) if not sound[shard]]

    def _is_sound(self, shard: int) -> bool:
        if not self._facts_path(shard).exists():
            return False
        path = self.shard_path(shard)
        with contextlib.suppress(JLTError, OSError):
            record = self.recall(shard).record
            if record is None or sha256_file(path) == record.sha256:
                return True
        inform(f"{path} is not what was written, or what was noted of it is not: it is made again.")
        return False

    def require_policy(self, skipped: Sequence[SkippedImage]) -> None:
        """Raise a JLTError if images were skipped by an earlier attempt and that is not what is asked for now."""
        if skipped and self.config.on_bad_image == "stop":
            raise JLTError(f"An earlier attempt skipped {_count(skipped)}: go on with --on-bad-image skip.")

    def made_with(self) -> dict[str, str]:
        """Return the device and the versions on which the last bits of latents depend."""
        device = self.autoencoder.device
        cpu = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        return {"device": name, "torch": torch.__version__, "pillow": PIL.__version__}

    def manifest(self) -> StoreManifest:
        """Return the manifest of the finished shards; JLTError if there are none, or latents of a wrong scale."""
        finished = [self.recall(shard) for shard in range(self.num_shards)]
        skipped = tuple(image for shard in finished for image in shard.skipped)
        shards = tuple(shard.record for shard in finished if shard.record)
        if not shards:
            raise JLTError(f"None of the {len(self.source)} images of {self.source.name} can be used.")
        sums = LatentSums.zero(self.autoencoder.channels)
        for shard in finished:
            sums = sums.merge(shard.sums) if shard.sums else sums
        self.require_normalised(sums)
        words = self.words()
        return StoreManifest(
            **{**words, "class_names": tuple(words["class_names"])},
            channels=self.autoencoder.channels,
            height=self.side,
            width=self.side,
            count=sum(record.count for record in shards),
            skipped=skipped,
            made_with=tuple({tuple(sorted(shard.made_with.items())): shard.made_with for shard in finished}.values()),
            **sums.moments(),
            shards=shards,
        )

    def require_normalised(self, sums: LatentSums) -> None:
        """Raise a JLTError for latents of another scale than they should have, unless they are pixels."""
        if self.identity["normalisation"]["kind"] != "none":
            sums.require_normalised(self.autoencoder.name)


def _count(skipped: Sequence[SkippedImage]) -> str:
    return f"{len(skipped)} bad images, {skipped[0].image} first" if len(skipped) > 1 else skipped[0].image
