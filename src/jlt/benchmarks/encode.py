"""The speed of encoding, against the autoencoder's bare forward on the same images in the same run."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.autoencoders.load import load_autoencoder
from jlt.benchmarks.rounds import time_in_turn
from jlt.errors import UsageError
from jlt.images.decoding import load_batch
from jlt.images.registry import open_source
from jlt.images.source import ImageSource, Selected
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode_source
from jlt.latents.encoding_job import EncodingJob
from jlt.runtime.environment import default_device, exact_arithmetic, machine, peak_memory, seconds_of, versions

ROUNDS = 3
IMAGE_BYTES = 2**30
"""Images that the bare forward keeps in memory; where there are more, it goes through these again."""


def repeated(source: ImageSource, count: int) -> ImageSource:
    """Return a source repeated, or cut, to a number of images."""
    return Selected(source, np.arange(count) % len(source))


def benchmark_encode(config: EncodeConfig, num: int) -> dict[str, Any]:
    """Encode `num` images to a temporary store, and pass the same images through the autoencoder alone, in turn.

    Both make the stored orientations of every image. The bare forward goes from images to latents in memory; encoding
    goes from the source to a store that is flushed and hashed.
    """
    if num < 1:
        raise UsageError("A benchmark needs at least one image.")
    source = repeated(open_source(config.images, config.split, config.class_names), num)
    autoencoder = load_autoencoder(config.autoencoder, config.autoencoder_path, default_device(), config.posterior)
    images = _images(EncodingJob(source, autoencoder, config, Path()))
    ways = {
        "bare": partial(_bare_seconds, autoencoder, images, config),
        "encoding": partial(_encoding_seconds, source, autoencoder, config),
    }
    rounds = time_in_turn(ways, ROUNDS, "encoding")
    bare_rate, rate = num / rounds.seconds("bare"), num / rounds.seconds("encoding")
    return {
        "autoencoder": autoencoder.identity(),
        "images": num,
        **{name: getattr(config, name) for name in ("resolution", "batch_size", "precision", "threads")},
        "orientations": 1 + config.flips,
        "img_per_second": rate,
        "bare_img_per_second": bare_rate,
        "ratio": rate / bare_rate,
        "ratio_by_round": rounds.ratios("encoding", "bare"),
        "peak_memory_mib": peak_memory(autoencoder.device.type) / 2**20,
        "machine": machine(autoencoder.device),
        "versions": versions(),
    }


def _images(job: EncodingJob) -> list[Float[Tensor, "_ 3 s s"]]:
    """Return every batch of images in [-1, 1]; beyond `IMAGE_BYTES` the first ones again."""
    config = job.config
    batches = [rows for shard in range(job.num_shards) for rows in job.batches(shard)]
    kept = max(1, IMAGE_BYTES // (4 * config.batch_size * 3 * config.resolution**2))
    loaded = [load_batch(job.source, rows, config.resolution, config.exif).pixels for rows in batches[:kept]]
    images = [torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1 for pixels in loaded]
    return [images[number % kept][: len(rows)].to(job.autoencoder.device) for number, rows in enumerate(batches)]


def _bare_seconds(autoencoder: Autoencoder, images: list[Float[Tensor, "_ 3 s s"]], config: EncodeConfig) -> float:
    device = autoencoder.device.type

    def encode() -> None:
        for batch in images:
            for _ in range(1 + config.flips):
                autoencoder.encode(batch, range(len(batch)))

    with (
        exact_arithmetic(config.threads),
        torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"),
    ):
        return seconds_of(encode, device)


def _encoding_seconds(source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig) -> float:
    with tempfile.TemporaryDirectory(prefix="jlt-benchmark-") as folder:
        start = time.perf_counter()
        encode_source(source, autoencoder, config, Path(folder) / "store")
        return time.perf_counter() - start
