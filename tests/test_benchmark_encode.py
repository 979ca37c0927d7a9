"""The encoding benchmark: its figures follow from each other, and both sides do the same work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jlt.autoencoders.load import load_autoencoder
from jlt.benchmarks import data as module
from jlt.benchmarks.data import benchmark_encode, repeated
from jlt.errors import UsageError
from jlt.images.registry import open_source
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding_job import EncodingJob
from jlt.report.benchmark_table import encode_benchmark_table

CONFIG = EncodeConfig("digits", "tiny", resolution=32, batch_size=16)


@pytest.fixture(scope="module")
def measured() -> dict:
    return benchmark_encode(CONFIG, 40)


def test_figures(measured: dict) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert measured["ratio"] == pytest.approx(measured["img_per_second"] / measured["bare_img_per_second"])
    assert (measured["images"], measured["orientations"]) == (40, 2)
    assert 0 < measured["ratio"] < 2
    assert f"{measured['ratio']:.1%}" in encode_benchmark_table(measured)


ENCODE = """
import sys, tempfile, torch
from pathlib import Path
from jlt.autoencoders.load import load_autoencoder
from jlt.benchmarks.data import repeated
from jlt.images.registry import open_source
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode_source
from jlt.runtime.environment import peak_memory
torch.set_num_threads(1)
config = EncodeConfig("digits", "pixels", resolution=8, batch_size=256, flips=False)
with tempfile.TemporaryDirectory() as folder:
    source = repeated(open_source("digits"), int(sys.argv[1]))
    encode_source(source, load_autoencoder("pixels"), config, Path(folder) / "store")
print(peak_memory("cpu"))
"""


def test_memory_of_encoding_does_not_grow_with_the_images() -> None:
    """In fresh processes with torch, and little else."""
    runs = [[sys.executable, "-c", ENCODE, str(count)] for count in (1000, 2000)]
    done = [subprocess.run(run, capture_output=True, text=True, check=True) for run in runs]
    few, many = (int(run.stdout) / 2**20 for run in done)
    assert 100 < few < 1000
    assert many < few * 1.1


def test_both_sides_encode_the_same_images_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    tiny = load_autoencoder("tiny")
    inner = tiny.encode

    def encode(images: torch.Tensor, noise_seeds: object = None) -> torch.Tensor:
        seen.append(images.clone())
        return inner(images, noise_seeds)

    monkeypatch.setattr(tiny, "encode", encode)
    source = repeated(open_source("digits"), 40)
    job = EncodingJob(source, tiny, CONFIG, Path("unused"))
    images = module._images(job)
    module._bare_seconds(tiny, images, CONFIG)
    bare = list(seen)
    seen.clear()
    module._encoding_seconds(source, tiny, CONFIG)
    assert [len(batch) for batch in bare] == [len(batch) for batch in seen] == [16, 16, 16, 16, 8, 8]
    for one, other in zip(bare[::2], seen[::2], strict=True):
        torch.testing.assert_close(one, other)


def test_repeated_images_come_in_turn() -> None:
    digits = open_source("digits")
    source = repeated(digits, 4000)
    assert len(source) == 4000
    np.testing.assert_array_equal(np.array(source[1797 + 5][0]), np.array(digits[5][0]))


def test_no_images_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one image"):
        benchmark_encode(CONFIG, 0)
