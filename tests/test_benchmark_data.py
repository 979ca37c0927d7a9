"""The benchmark of reading: every variant reads the requested latents, and the content of the report."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlt.benchmarks import data as module
from jlt.benchmarks.data import CLASSES, benchmark_data, random_shards
from jlt.errors import JLTError, UsageError
from jlt.latents.store import LatentStore, write_store
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
        return benchmark_data(folder, 40, BATCH, 0.02)


def test_every_way_reads_the_requested_latents(folder: Path) -> None:
    store = LatentStore.open(folder)
    batches = [*itertools.islice(module.batches_in_order(store, 50, BATCH), 12)]
    assert any(rows.flips.any() for rows in batches)
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    stored = [np.concatenate([shard[name] for shard in shards]) for name in ("latents", "latents_flip")]
    expected = [
        np.stack([stored[int(flip)][i] for i, flip in zip(rows.indices, rows.flips, strict=True)]) for rows in batches
    ]
    for batch, loaded in zip(expected, module._loader(store, iter(batches), BATCH, "cpu"), strict=True):
        np.testing.assert_array_equal(loaded.numpy(), batch)
    for batch, (latents, _) in zip(expected, module._per_sample(store, iter(batches), 0), strict=True):
        np.testing.assert_array_equal(latents.numpy(), batch)


def test_report(measured: dict) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert measured["latents"] == {"synthetic": False, "count": 40, "of": 50, "flips": True}
    assert (measured["shape"], measured["dtype"], measured["batch_size"]) == ([4, 3, 2], "float16", BATCH)
    assert all(len(rates) == 2 and min(rates) > 0 for rates in measured["rounds"].values())
    for way, rates in measured["rounds"].items():
        # The median of two rounds is that of their times.
        assert measured["latents_per_second"][way] == pytest.approx(2 / sum(1 / rate for rate in rates))
    assert measured["loader_ratio"]["loader"] == 1


READ_EPOCH = """
import itertools, math, sys
from pathlib import Path
from jlt.benchmarks.data import batches_in_order
from jlt.latents.loader import read_ahead
from jlt.latents.store import LatentStore
from jlt.runtime.environment import peak_memory
store = LatentStore.open(Path(sys.argv[1]))
batches = itertools.islice(batches_in_order(store, len(store), 256), math.ceil(len(store) / 256))
assert sum(len(latents) for _, latents, _ in read_ahead(store, batches, 256)) >= len(store)
print(peak_memory("cpu"))
"""


def test_memory_of_an_epoch_does_not_grow_with_the_store(tmp_path: Path) -> None:
    peaks = []
    for count in (1_000, 100_000):
        write_store(tmp_path / str(count), random_shards(count, (4, 4, 4), 10_000), CLASSES)
        command = [sys.executable, "-c", READ_EPOCH, str(tmp_path / str(count))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert 50 * 2**20 < peaks[0] < 2**30
    assert peaks[1] / peaks[0] < 1.2


def test_table_names_every_way(measured: dict) -> None:
    table = data_benchmark_table(measured)
    assert "40 latents, 4x3x2 float16, batch 8" in table
    assert f"{measured['latents_per_second']['loader']:,.0f}" in table
    assert measured["rounds"].keys() == measured["latents_per_second"].keys()
    assert len(table.splitlines()) >= len(measured["rounds"]) + 2


def test_no_room_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(JLTError, match=r"--count.* take 1,048\.6 MB.*1\.0 MB are free"):
        benchmark_data(None, 8000, 256, 1.0)


@pytest.mark.parametrize("arguments", [(0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0)])
def test_impossible_arguments(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(UsageError):
        benchmark_data(None, *arguments)
