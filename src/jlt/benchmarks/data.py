"""Speed of making and reading latents on this machine, against other ways in the same run.

Encoding is measured against the autoencoder's bare forward on the same images, the trainer's loader against others.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jlt.autoencoders.contract import Autoencoder
from jlt.autoencoders.load import load_autoencoder
from jlt.benchmarks.rounds import Rounds, time_in_turn
from jlt.errors import UsageError
from jlt.images.decoding import load_batch
from jlt.images.registry import open_source
from jlt.images.source import ImageSource, Selected
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode_source
from jlt.latents.encoding_job import EncodingJob
from jlt.latents.loader import DEPTH, SampleOrder, read_ahead
from jlt.latents.store import LatentStore, write_store
from jlt.runtime.environment import cores, default_device, exact_arithmetic, measured_on, peak_memory, seconds_of
from jlt.runtime.processes import spawn_context
from jlt.runtime.progress import inform
from jlt.storage.rows import require_space

ROUNDS = 5
SHAPE = (128, 16, 16)
CLASSES = 1000
SHARD_ROWS = 1000
COPIED_BATCHES = 8
"""Batches that the memory copy takes in turn, so that its source is not in the processor's cache."""
READ_BEFORE = 4
"""Batches taken before each measurement: a way may have read them ahead while the others were measured."""
WORKER_TIMEOUT_SECONDS = 120
ENCODING_ROUNDS = 3
IMAGE_BYTES = 2**30
"""Images that the bare forward keeps in memory; where there are more, it goes through these again."""

Way = Generator[Any, None, None]
"""Yields batch after batch."""


@dataclass(frozen=True)
class Rows:
    """The latents of one batch, as `jlt.latents.loader.Request` has them."""

    indices: np.ndarray
    flips: np.ndarray


def benchmark_data(latents: Path | None, count: int, batch_size: int, seconds: float) -> dict[str, Any]:
    """Measure shuffled batches with random flips from a warm page cache, in latents per second.

    The first `count` latents of a store are read, or of a temporary one of random 128x16x16 float16 latents. Every way
    is measured for `seconds` in each of several rounds, in turn; figures are medians over the rounds, and so are the
    ratios of the loader to each other way. JLTError where a temporary store does not fit on the disk.
    """
    if count < 1 or batch_size < 1 or seconds <= 0:
        raise UsageError("A benchmark of reading needs positive count, batch size and seconds.")
    with tempfile.TemporaryDirectory(prefix="jlt-benchmark-") as temporary:
        if latents is None:
            what = f"{count} random latents (fewer with --count, none with --latents, elsewhere with TMPDIR)"
            require_space(Path(temporary), 2 * 2 * math.prod(SHAPE) * count, what)
            inform(f"writing {count} random latents into {temporary}")
            write_store(Path(temporary) / "latents", random_shards(count, SHAPE, SHARD_ROWS), CLASSES)
        store = LatentStore.open(latents or Path(temporary) / "latents")
        count = min(count, len(store))
        rounds = _measure(store, count, batch_size, seconds)
    return {
        "latents": {"synthetic": latents is None, "count": count, "of": len(store), "flips": store.manifest.flips},
        "shape": [store.shape.channels, store.shape.height, store.shape.width],
        "dtype": store.manifest.dtype,
        "batch_size": batch_size,
        "seconds": seconds,
        "latents_per_second": {way: batch_size / rounds.seconds(way) for way in rounds.by_way},
        "loader_ratio": {way: rounds.ratio("loader", way) for way in rounds.by_way},
        "rounds": {way: [batch_size / spent for spent in times] for way, times in rounds.by_way.items()},
        "threads": torch.get_num_threads(),
        **measured_on(default_device()),
    }


def random_shards(
    count: int, shape: tuple[int, int, int], rows: int, classes: int = CLASSES
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the arrays of shards of `rows` normal float16 latents in both orientations, for `write_store`."""
    generator = np.random.default_rng(0)
    for start in range(0, count, rows):
        n = min(rows, count - start)
        latents = generator.standard_normal((n, *shape), dtype=np.float32).astype(np.float16)
        labels = generator.integers(0, classes, n)
        yield {"latents": latents, "latents_flip": np.ascontiguousarray(latents[..., ::-1]), "labels": labels}


def batches_in_order(store: LatentStore, count: int, batch_size: int) -> Iterator[Rows]:
    """Yield endless batches of the first `count` latents of a store, in the order of a training."""
    order = SampleOrder(count, seed=0)
    for start in itertools.count(0, batch_size):
        flips = order.flips(start, batch_size) & store.manifest.flips
        yield Rows(order.indices(start, batch_size), flips)


def _measure(store: LatentStore, count: int, batch_size: int, seconds: float) -> Rounds:
    """Return the seconds that a batch takes in each way."""
    # Once, for the page cache.
    for start in range(0, count, batch_size):
        chunk = np.arange(start, min(start + batch_size, count))
        for flipped in {False, store.manifest.flips}:
            store.gather(chunk, np.full(len(chunk), flipped))
    batches, device = functools.partial(batches_in_order, store, count, batch_size), default_device()
    ways: dict[str, Way] = {
        "loader": _loader(store, batches(), batch_size, device),
        "gather": (store.gather(rows.indices, rows.flips) for rows in batches()),
        "memory_copy": _memory_copy(store, batch_size),
        "per_sample_alone": _per_sample(store, batches(), 0),
        "per_sample_workers": _per_sample(store, batches(), min(2, cores())),
    }
    with contextlib.ExitStack() as stack:
        for way in ways.values():
            stack.callback(way.close)
        timed = {name: functools.partial(_seconds_per_batch, way, seconds, device) for name, way in ways.items()}
        return time_in_turn(timed, ROUNDS, "reading")


def _seconds_per_batch(way: Way, seconds: float, device: str) -> float:
    """Return the seconds that a batch takes, measured over about `seconds`."""
    for _ in range(READ_BEFORE):
        next(way)
    batches = 0

    def read() -> None:
        nonlocal batches
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            next(way)
            batches += 1

    return seconds_of(read, device) / batches


def _loader(store: LatentStore, batches: Iterator[Rows], batch_size: int, device: str) -> Way:
    with contextlib.closing(read_ahead(store, batches, batch_size, device)) as loaded:
        for _, latents, _ in loaded:
            yield latents


def _memory_copy(store: LatentStore, batch_size: int) -> Way:
    """Copy batches that are in memory already: a bound for every reader of files on one thread."""
    buffers = [store.empty(batch_size).numpy() for _ in range(DEPTH)]
    source = np.ones((COPIED_BATCHES, *buffers[0].shape), dtype=buffers[0].dtype)
    for batch, buffer in zip(itertools.cycle(source), itertools.cycle(buffers), strict=False):
        np.copyto(buffer, batch)
        yield buffer


class PerSampleDataset(Dataset[tuple[Tensor, Tensor]]):
    """One latent at a time through safetensors, opening its file each time, as the authors' loader does."""

    def __init__(self, store: LatentStore) -> None:
        shards = store.manifest.shards
        self.places = [(str(store.folder / record.file), row) for record in shards for row in range(record.count)]

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, flip = item
        path, row = self.places[index]
        with safe_open(path, framework="pt") as file:
            latents = file.get_slice("latents_flip" if flip else "latents")
            return latents[row : row + 1][0], file.get_slice("labels")[row : row + 1][0]


def _per_sample(store: LatentStore, batches: Iterator[Rows], workers: int) -> Way:
    items = (list(zip(rows.indices.tolist(), rows.flips.tolist(), strict=True)) for rows in batches)
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        PerSampleDataset(store),
        batch_sampler=items,
        num_workers=workers,
        # A fork of a process with threads may hang.
        multiprocessing_context=spawn_context() if workers else None,
        timeout=WORKER_TIMEOUT_SECONDS if workers else 0,
    )
    yield from loader


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
        "bare": functools.partial(_bare_seconds, autoencoder, images, config),
        "encoding": functools.partial(_encoding_seconds, source, autoencoder, config),
    }
    rounds = time_in_turn(ways, ENCODING_ROUNDS, "encoding")
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
        **measured_on(autoencoder.device),
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
