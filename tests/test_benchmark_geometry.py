"""The benchmark of measuring a space: what it times is the real measuring, and its report says what was found."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from jlt.benchmarks import geometry as module
from jlt.benchmarks.geometry import IMAGENET, RandomLatents, benchmark_geometry
from jlt.cli.main import main
from jlt.config import LatentShape
from jlt.geometry.accumulate import measure_moments
from jlt.report.benchmark_table import geometry_benchmark_table
from jlt.runtime.processes import SingleProcess

SHAPE = LatentShape(channels=3, height=4, width=4, num_classes=5)


def test_a_store_has_any_number_of_latents(monkeypatch):
    monkeypatch.setattr(module, "DISTINCT", 7)
    store = RandomLatents(SHAPE, 20)
    latents, labels = store.gather(np.arange(20))
    assert len(store) == 20
    assert torch.equal(latents[:7], latents[7:14])
    assert labels.tolist() == [number % 5 for number in range(20)]
    assert measure_moments(store, [1, 2], "cpu", SingleProcess()).tokens[2].count == 20 * 4


@pytest.mark.slow
def test_memory_does_not_grow_with_the_store():
    """In one process, where what an allocator does not return adds up; both stores are larger than what is kept."""
    script = """
from jlt.benchmarks.geometry import *
for count in (2_100, 6_300):
    reset_peak_memory("cpu")
    measure_moments(RandomLatents(LatentShape(128, 16, 16, 10), count), [1], "cpu", SingleProcess())
    print(peak_memory("cpu"))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    smaller, larger = map(int, run.stdout.split())
    # Half of the 275 MB by which the larger store is larger in float16.
    assert larger - smaller < 137e6


def test_report():
    measured = benchmark_geometry((1, 2), 40, SHAPE)
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert list(measured["tokens"]) == ["1", "2"]
    for size, entry in measured["tokens"].items():
        assert entry["dimension"] == 3 * int(size) ** 2
        assert min(entry["ratio_by_round"]) <= entry["ratio"] <= max(entry["ratio_by_round"])
    assert measured["imagenet_minutes"] == pytest.approx(IMAGENET / measured["latents_per_second"] / 60)
    assert (measured["count"], measured["peak_memory_mib"] > 50) == (40, True)
    table = geometry_benchmark_table(measured)
    assert "patch 2: covariance of tokens" in table
    assert "a pass over 40 latents" in table


def test_too_few_latents_are_refused(capsys):
    assert main(["benchmark", "geometry", "--count", "1"]) == 2
    assert "--count must be from 2 to" in capsys.readouterr().err
