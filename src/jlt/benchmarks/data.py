"""Speed of reading latents on the machine at hand: the trainer's loader against other ways, all in the same run."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jlt.errors import JLTError, UsageError
from jlt.latents.loader import DEPTH, read_ahead
from jlt.latents.order import SampleOrder
from jlt.latents.shards import ShardFile
from jlt.latents.store import LatentStore
from jlt.latents.write import write_store
from jlt.runtime.environment import cores, default_device, machine, versions
from jlt.runtime.processes import spawn_context
from jlt.runtime.progress import inform
from jlt.runtime.timing import peak_memory

ROUNDS = 5
SHAPE = (128, 16, 16)
CLASSES = 1000
SHARD_ROWS = 1000
COPIED_BATCHES = 8
"""Batches that the memory copy takes in turn, so that its source is not in the processor's cache."""
READ_BEFORE = 4
"""Batches taken before each measurement: whatever a way had read ahead while the others were measured."""
WORKER_TIMEOUT_SECONDS = 120
LARGE_COUNT, LARGE_SHARDS = 1_280_000, 160
SMALL_EPOCH, LARGE_EPOCH = 1_000, 100_000

Way = Generator[Any, None, None]


@dataclass(frozen=True)
class Asked:
    """One batch that is asked for, as `jlt.latents.loader.Request` has it."""

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
            advice = "choose a smaller --count, name a store with --latents"
            require_space(Path(temporary), 2 * 2 * math.prod(SHAPE) * count, advice)
            inform(f"writing {count} random latents into {temporary}")
            write_store(Path(temporary) / "latents", random_shards(count, SHAPE, SHARD_ROWS), CLASSES)
        store = LatentStore.open(latents or Path(temporary) / "latents")
        count = min(count, len(store))
        inform("measuring how fast they are read")
        rounds = _measure_ways(store, count, batch_size, seconds)
        inform("measuring opening and memory")
        footprint = {"opening": _openings(store.folder, Path(temporary)), "epoch_memory": _memories(Path(temporary))}
    rates = {way: statistics.median(values) for way, values in rounds.items()}
    return {
        "latents": {"synthetic": latents is None, "count": count, "of": len(store), "flips": store.manifest.flips},
        "shape": [store.shape.channels, store.shape.height, store.shape.width],
        "dtype": store.manifest.dtype,
        "batch_size": batch_size,
        "seconds": seconds,
        "latents_per_second": rates,
        "loader_ratio": {way: _median_ratio(rounds["loader"], rounds[way]) for way in rounds},
        "hidden": _hidden(rounds),
        "rounds": rounds,
        **footprint,
        "threads": torch.get_num_threads(),
        "machine": machine(default_device()),
        "versions": versions(),
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


def require_space(folder: Path, needed: int, advice: str) -> None:
    """Raise a JLTError unless the disk of a temporary folder has room for so many bytes; `advice` says what helps."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise JLTError(
            f"The benchmark's files take {needed / 1e9:.2g} GB, and {folder.parent} has {free / 1e9:.2g} GB free: "
            f"{advice}, or let TMPDIR name another folder."
        )


def _requests(store: LatentStore, count: int, batch_size: int) -> Iterator[Asked]:
    order = SampleOrder(count, seed=0)
    for start in itertools.count(0, batch_size):
        flips = order.flips(start, batch_size) & store.manifest.flips
        yield Asked(order.indices(start, batch_size), flips)


def _measure_ways(store: LatentStore, count: int, batch_size: int, seconds: float) -> dict[str, list[float]]:
    """Return latents per second of each way in each round."""
    for start in range(0, count, batch_size):
        chunk = np.arange(start, min(start + batch_size, count))
        for flipped in {False, store.manifest.flips}:
            store.gather(chunk, np.full(len(chunk), flipped))
    requests = functools.partial(_requests, store, count, batch_size)
    compute = _computing(store, next(requests()))
    device = default_device()
    ways: dict[str, Way] = {
        "loader": _loader(store, requests(), batch_size, device),
        "loader_float32": (latents.float() for latents in _loader(store, requests(), batch_size, device)),
        "gather": (store.gather(asked.indices, asked.flips) for asked in requests()),
        "memory_map": _memory_map(store, requests(), batch_size),
        "memory_copy": _memory_copy(store, batch_size),
        "per_sample_alone": _per_sample(store, requests(), 0),
        "per_sample_workers": _per_sample(store, requests(), min(2, cores())),
        "computing": (compute() for _ in itertools.count()),
        "computing_gather": (compute() for asked in requests() if store.gather(asked.indices, asked.flips)),
        "computing_loader": (compute() for _ in _loader(store, requests(), batch_size, "cpu")),
    }
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    with contextlib.ExitStack() as stack:
        for way in ways.values():
            stack.callback(way.close)
        for _ in range(ROUNDS):
            for name, way in ways.items():
                rounds[name].append(batch_size * _rate(way, seconds, device))
    return rounds


def _rate(way: Way, seconds: float, device: str) -> float:
    """Return batches per second over about `seconds`."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(READ_BEFORE):
        next(way)
    synchronize()
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(way)
        batches += 1
    synchronize()
    return batches / (time.perf_counter() - start)


def _loader(store: LatentStore, requests: Iterator[Asked], batch_size: int, device: str) -> Way:
    with contextlib.closing(read_ahead(store, requests, batch_size, device)) as batches:
        for _, latents, _ in batches:
            yield latents


def _memory_map(store: LatentStore, requests: Iterator[Asked], batch_size: int) -> Way:
    """Copy row after row out of memory maps into two buffers in turn, as many as the loader has."""
    names = ("latents", "latents_flip") if store.manifest.flips else ("latents",)
    maps, places = [], []
    for shard, record in enumerate(store.manifest.shards):
        path = store.folder / record.file
        entries = ShardFile(path).read_entries()
        maps.append([_map(path, entries[name].offset, entries[name].shape, store) for name in names])
        places += [(shard, row) for row in range(record.count)]
    buffers = itertools.cycle([store.empty(batch_size).numpy() for _ in range(DEPTH)])
    for asked, buffer in zip(requests, buffers, strict=False):
        for k, (index, flip) in enumerate(zip(asked.indices.tolist(), asked.flips.tolist(), strict=True)):
            shard, row = places[index]
            buffer[k] = maps[shard][flip][row]
        yield buffer


def _map(path: Path, offset: int, shape: tuple[int, ...], store: LatentStore) -> np.ndarray:
    return np.memmap(path, dtype=store.manifest.dtype, mode="r", offset=offset, shape=shape)


def _memory_copy(store: LatentStore, batch_size: int) -> Way:
    """Copy batches that lie in memory already: what no reader of files can pass on one thread."""
    buffers = [store.empty(batch_size).numpy() for _ in range(DEPTH)]
    source = np.ones((COPIED_BATCHES, *buffers[0].shape), dtype=buffers[0].dtype)
    for batch, buffer in zip(itertools.cycle(source), itertools.cycle(buffers), strict=False):
        np.copyto(buffer, batch)
        yield buffer


class PerSampleDataset(Dataset[tuple[Tensor, Tensor]]):
    """One latent at a time through the safetensors library, its file opened anew: how the authors' loader reads."""

    def __init__(self, store: LatentStore) -> None:
        shards = store.manifest.shards
        self.places = [(str(store.folder / record.file), row) for record in shards for row in range(record.count)]

    def __getitem__(self, asked: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, flip = asked
        path, row = self.places[index]
        with safe_open(path, framework="pt") as file:
            latents = file.get_slice("latents_flip" if flip else "latents")
            return latents[row : row + 1][0], file.get_slice("labels")[row : row + 1][0]


def _per_sample(store: LatentStore, requests: Iterator[Asked], workers: int) -> Way:
    batches = (list(zip(asked.indices.tolist(), asked.flips.tolist(), strict=True)) for asked in requests)
    context = spawn_context() if workers else None  # a fork of a process with threads may hang
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        PerSampleDataset(store),
        batch_sampler=batches,
        num_workers=workers,
        multiprocessing_context=context,
        timeout=WORKER_TIMEOUT_SECONDS if workers else 0,
    )
    yield from loader


def _computing(store: LatentStore, asked: Asked) -> Callable[[], Tensor]:
    """Return products on one thread that take about twice as long as reading a batch takes."""
    product = functools.partial(_product, torch.rand(512, 512))

    repeats = math.ceil(2 * _best(lambda: store.gather(asked.indices, asked.flips)) / _best(product))
    return lambda: [product() for _ in range(repeats)][-1]


def _product(matrix: Tensor) -> Tensor:
    # On more threads the products would take the core that the reader is to have.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = matrix @ matrix
    torch.set_num_threads(threads)
    return result


def _best(work: Callable[[], Any], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _median_ratio(ours: list[float], others: list[float]) -> float:
    return statistics.median(our / other for our, other in zip(ours, others, strict=True))


def _hidden(rounds: Mapping[str, list[float]]) -> float:
    """Return the share of the reading time that the loader hides behind computing: 1 where a step costs no more."""
    columns = (rounds[way] for way in ("computing", "computing_gather", "computing_loader"))
    seconds = [[1 / rate for rate in rates] for rates in zip(*columns, strict=True)]
    return statistics.median((turn - loader) / (turn - alone) for alone, turn, loader in seconds)


def _openings(folder: Path, temporary: Path) -> dict[str, Any]:
    """Return seconds to open the store, and one of as many latents as ImageNet's in as many shards as usual."""
    large = temporary / "many"
    write_store(large, random_shards(LARGE_COUNT, (4, 1, 1), LARGE_COUNT // LARGE_SHARDS), CLASSES)
    return {
        "seconds": _best(lambda: LatentStore.open(folder), 3),
        "large_seconds": _best(lambda: LatentStore.open(large), 3),
        "large_count": LARGE_COUNT,
        "large_shards": LARGE_SHARDS,
    }


def _memories(temporary: Path) -> dict[str, Any]:
    """Return peak resident bytes of fresh processes that read a whole epoch of a small and of a large store."""
    peaks = {}
    for count in (SMALL_EPOCH, LARGE_EPOCH):
        folder = temporary / f"epoch-{count}"
        write_store(folder, random_shards(count, (4, 4, 4), 10 * SHARD_ROWS), CLASSES)
        script = f"from jlt.benchmarks.data import read_epoch; read_epoch({str(folder)!r})"
        done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
        if done.returncode:
            raise JLTError(f"A process that reads {folder} failed: {done.stderr.strip()[-300:]}")
        peaks[count] = json.loads(done.stdout)["peak"]
    return {
        "small_count": SMALL_EPOCH,
        "small_bytes": peaks[SMALL_EPOCH],
        "large_count": LARGE_EPOCH,
        "large_bytes": peaks[LARGE_EPOCH],
        "ratio": peaks[LARGE_EPOCH] / peaks[SMALL_EPOCH],
    }


def read_epoch(folder: str, batch_size: int = 256) -> None:
    """Read one shuffled epoch through the loader and print this process's peak memory as JSON."""
    store = LatentStore.open(folder)
    steps = math.ceil(len(store) / batch_size)
    batches = read_ahead(store, itertools.islice(_requests(store, len(store), batch_size), steps), batch_size)
    read = sum(len(latents) for _, latents, _ in batches)
    print(json.dumps({"read": read, "peak": peak_memory("cpu")}))
