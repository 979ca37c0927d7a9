"""The loader: what it yields against the arrays that were written, its buffers, its thread, its errors."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from jlt.config import NetworkConfig, TrainConfig
from jlt.errors import JLTError
from jlt.latents.loader import DEPTH, read_ahead
from jlt.latents.store import LatentStore, write_store
from jlt.runtime.signals import Stopped, StopRequest
from jlt.training.checkpoint import open_checkpoint
from jlt.training.loop import train

COUNT, BATCH = 40, 6


@dataclass(frozen=True)
class Request:
    indices: np.ndarray
    flips: np.ndarray


@pytest.fixture(scope="module")
def arrays() -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)

    def latents(n: int) -> np.ndarray:
        return generator.standard_normal((n, 3, 2, 4)).astype(np.float16)

    return [{"latents": latents(n), "latents_flip": latents(n), "labels": np.arange(n) % 5} for n in (15, 15, 10)]


@pytest.fixture
def store(arrays: list[dict[str, np.ndarray]], tmp_path: Path) -> LatentStore:
    write_store(tmp_path / "store", arrays, classes=5)
    return LatentStore.open(tmp_path / "store")


def random_requests(steps: int, seed: int = 0) -> list[Request]:
    generator = np.random.default_rng(seed)
    return [Request(generator.integers(0, COUNT, BATCH), generator.random(BATCH) < 0.5) for _ in range(steps)]


def expected(arrays: list[dict[str, np.ndarray]], request: Request) -> np.ndarray:
    plain, flipped = (np.concatenate([shard[name] for shard in arrays]) for name in ("latents", "latents_flip"))
    return np.stack([(flipped if f else plain)[i] for i, f in zip(request.indices, request.flips, strict=True)])


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("jlt-reader")]


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    yield
    assert readers() == []


def test_a_written_store_is_what_safetensors_reads(store: LatentStore, arrays: list[dict[str, np.ndarray]]) -> None:
    assert len(store) == COUNT
    for record, shard in zip(store.manifest.shards, arrays, strict=True):
        stored = load_file(store.folder / record.file)
        assert stored.keys() == shard.keys()
        for name, values in shard.items():
            np.testing.assert_array_equal(stored[name], values)
    values = np.concatenate([shard[name] for shard in arrays for name in ("latents", "latents_flip")]).astype(float)
    assert store.manifest.std == pytest.approx(values.std())
    np.testing.assert_allclose(store.manifest.channel_mean, values.mean((0, 2, 3)))
    assert (store.manifest.minimum, store.manifest.maximum) == (values.min(), values.max())


def test_batches_are_the_requested_ones_in_order(store: LatentStore, arrays: list[dict[str, np.ndarray]]) -> None:
    requests = [*random_requests(20), Request(np.array([39, 0]), np.array([True, False]))]
    seen = 0
    for request, (given, latents, labels) in zip(requests, read_ahead(store, requests, BATCH), strict=True):
        assert given is request
        assert latents.dtype == torch.float16
        np.testing.assert_array_equal(latents.numpy(), expected(arrays, request))
        np.testing.assert_array_equal(
            labels.numpy(), np.where(request.indices < 30, request.indices % 15, request.indices - 30) % 5
        )
        seen += 1
    assert seen == 21


def test_a_batch_is_valid_until_the_next_is_requested(store: LatentStore, arrays: list[dict[str, np.ndarray]]) -> None:
    requests = random_requests(5)
    with contextlib.closing(read_ahead(store, requests, BATCH)) as batches:
        for request, latents, _ in batches:
            time.sleep(0.05)  # long enough for the thread to read all that it may
            np.testing.assert_array_equal(latents.numpy(), expected(arrays, request))


def test_memory_is_that_of_the_ring(store: LatentStore) -> None:
    places = {latents.data_ptr() for _, latents, _ in read_ahead(store, random_requests(30), BATCH)}
    assert len(places) == DEPTH


def test_no_more_is_read_than_there_are_buffers(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    gather = LatentStore.gather
    monkeypatch.setattr(LatentStore, "gather", lambda *arguments: (calls.append(None), gather(*arguments))[1])
    batches = read_ahead(store, random_requests(30), BATCH)
    for taken in range(1, 4):
        next(batches)
        time.sleep(0.1)
        # The one that was handed out, and one more: read while the first is computed with.
        assert len(calls) == taken - 1 + DEPTH
    batches.close()


def test_reading_goes_on_while_the_consumer_computes(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = LatentStore.gather
    monkeypatch.setattr(LatentStore, "gather", lambda *arguments: (time.sleep(0.05), gather(*arguments))[1])
    begun = time.perf_counter()
    for _ in read_ahead(store, random_requests(10), BATCH):
        time.sleep(0.05)
    # In turn it would be a second; overlapped it is 11 times 0.05 s.
    assert time.perf_counter() - begun < 0.8


def test_requests_need_not_end_and_are_drawn_no_further_than_read(store: LatentStore) -> None:
    drawn = itertools.count()
    requests = (Request(np.array([next(drawn) % COUNT]), np.array([False])) for _ in itertools.count())
    batches = read_ahead(store, requests, BATCH)
    for _ in range(3):
        next(batches)
    batches.close()
    assert next(drawn) <= 3 + DEPTH


def test_a_truncated_file_is_named_at_the_batch_that_needs_it(store: LatentStore) -> None:
    good, bad = Request(np.array([0]), np.array([False])), Request(np.array([20]), np.array([True]))
    os.truncate(store.folder / "shard-00001.safetensors", 500)
    batches = read_ahead(store, [good, good, bad, good], BATCH)
    for _ in range(2):
        next(batches)
    with pytest.raises(JLTError, match="shard-00001.*truncated"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_errors_of_the_requests_arrive(store: LatentStore) -> None:
    def requests() -> Iterator[Request]:
        yield from random_requests(2)
        raise ZeroDivisionError

    batches = read_ahead(store, requests(), BATCH)
    next(batches), next(batches)
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_a_batch_larger_than_the_buffers_is_refused(store: LatentStore) -> None:
    with pytest.raises(ValueError, match="out has to be"):
        next(read_ahead(store, random_requests(1), BATCH - 1))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early_ends_the_thread(store: LatentStore, taken: int) -> None:
    batches = read_ahead(store, random_requests(100), BATCH)
    for _ in range(taken):
        next(batches)
    assert len(readers()) == (taken > 0)
    batches.close()
    assert readers() == []


def test_an_exception_of_the_consumer_ends_the_thread(store: LatentStore) -> None:
    def consume() -> None:
        with contextlib.closing(read_ahead(store, random_requests(100), BATCH)) as batches:
            for _ in batches:
                raise KeyError

    with pytest.raises(KeyError):
        consume()
    assert readers() == []


def test_gather_reads_into_the_memory_given(store: LatentStore, arrays: list[dict[str, np.ndarray]]) -> None:
    request = random_requests(1)[0]
    out = store.empty(BATCH)
    latents, _ = store.gather(request.indices, request.flips, out)
    assert latents is out
    np.testing.assert_array_equal(out.numpy(), expected(arrays, request))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(BATCH, 3, 2, 4),
        torch.empty(BATCH + 1, 3, 2, 4, dtype=torch.float16),
        torch.empty(BATCH, 3, 4, 2, dtype=torch.float16),
        torch.empty(BATCH, 3, 4, 2, dtype=torch.float16).mT,
        torch.empty(BATCH, 3, 2, 4, dtype=torch.float16, device="meta"),
    ],
)
def test_other_memory_is_refused(store: LatentStore, out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="out has to be contiguous torch.float16"):
        store.gather(np.zeros(BATCH, dtype=np.int64), None, out)


def config_for(store: LatentStore, **changes: int) -> TrainConfig:
    network = NetworkConfig(3, 2, 4, 5, hidden_size=8, depth=1, num_heads=1)
    settings = {"steps": 7, "batch_size": BATCH, "log_every": 1, "checkpoint_every": 100, **changes}
    return TrainConfig("test", "x", network, precision="float32", flips=True, **settings)


def test_digest_belongs_to_the_steps_made(store: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped at step 3 has read further; its state must equal that of a run of three steps."""
    config = config_for(store)
    train(dataclasses.replace(config, steps=3), store, tmp_path / "three")
    log = tmp_path / "stopped" / "log.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "__bool__", lambda self: log.read_text().count('"loss"') == 2)
        with pytest.raises(Stopped):
            train(config, store, tmp_path / "stopped")
    assert readers() == []
    three, stopped = (open_checkpoint(tmp_path / name).read_state() for name in ("three", "stopped"))
    assert three.draws == stopped.draws


def test_training_on_a_truncated_store_ends_with_its_name(store: LatentStore, tmp_path: Path) -> None:
    os.truncate(store.folder / "shard-00002.safetensors", 600)
    with pytest.raises(JLTError, match="shard-00002.*truncated"):
        train(config_for(store, steps=50), store, tmp_path / "run")
    assert readers() == []
