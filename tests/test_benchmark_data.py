"""The benchmark of reading: that every way reads what was asked for, and what its report says."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlt.benchmarks import data as module
from jlt.benchmarks.data import CLASSES, benchmark_data, random_shards
from jlt.errors import JLTError, UsageError
from jlt.latents.store import LatentStore
from jlt.latents.write import write_store
from jlt.report.benchmark_table import data_benchmark_table

SHAPE, BATCH = (4, 3, 2), 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "store"
    write_store(folder, random_shards(50, SHAPE, 20), CLASSES)
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "ROUNDS", 2)
        patched.setattr(module, "LARGE_COUNT", 1600)
        return benchmark_data(folder, 40, BATCH, 0.02)


def test_every_way_reads_what_was_asked_for(folder: Path) -> None:
    store = LatentStore.open(folder)
    asked = [*itertools.islice(module._requests(store, 50, BATCH), 12)]
    assert any(request.flips.any() for request in asked)
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    stored = [np.concatenate([shard[name] for shard in shards]) for name in ("latents", "latents_flip")]
    expected = [
        np.stack([stored[int(flip)][i] for i, flip in zip(request.indices, request.flips, strict=True)])
        for request in asked
    ]
    for batch, loaded in zip(expected, module._loader(store, iter(asked), BATCH, "cpu"), strict=True):
        np.testing.assert_array_equal(loaded.numpy(), batch)
    for batch, mapped in zip(expected, module._memory_map(store, iter(asked), BATCH), strict=True):
        np.testing.assert_array_equal(mapped, batch)
    for batch, (latents, _) in zip(expected, module._per_sample(store, iter(asked), 0), strict=True):
        np.testing.assert_array_equal(latents.numpy(), batch)


def test_report(measured: dict) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert measured["latents"] == {"synthetic": False, "count": 40, "of": 50, "flips": True}
    assert (measured["shape"], measured["dtype"], measured["batch_size"]) == ([4, 3, 2], "float16", BATCH)
    assert all(len(rates) == 2 and min(rates) > 0 for rates in measured["rounds"].values())
    for way, rates in measured["rounds"].items():
        assert measured["latents_per_second"][way] == pytest.approx(sum(rates) / 2)
    assert measured["loader_ratio"]["loader"] == 1
    assert 0 < measured["opening"]["seconds"] < 5


def test_memory_of_an_epoch_does_not_grow_with_the_store(measured: dict) -> None:
    memory = measured["epoch_memory"]
    assert (memory["small_count"], memory["large_count"]) == (1_000, 100_000)
    assert 50 * 2**20 < memory["small_bytes"] < 2**30
    assert memory["ratio"] < 1.2


def test_table_names_every_way(measured: dict) -> None:
    table = data_benchmark_table(measured)
    assert "40 latents, 4x3x2 float16, batch 8" in table
    assert f"{measured['latents_per_second']['loader']:,.0f}" in table
    assert measured["rounds"].keys() == measured["latents_per_second"].keys()
    assert len(table.splitlines()) >= len(measured["rounds"]) + 6


def test_no_room_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(JLTError, match=r"take 1 GB.*0\.001 GB free.*--count"):
        benchmark_data(None, 8000, 256, 1.0)


@pytest.mark.parametrize("words", [(0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0)])
def test_impossible_words(words: tuple[int, int, float]) -> None:
    with pytest.raises(UsageError):
        benchmark_data(None, *words)
