"""The table of GPUs: names as people write them, and rates that belong together."""

import pytest
import torch

from jlt.benchmarks.hardware import GPUS, find_gpu
from jlt.errors import UsageError
from jlt.runtime.environment import SMALLEST_MATMUL, matmul_rate


@pytest.mark.parametrize(("written", "name"), [("h200", "H200"), ("RTX 4090", "RTX-4090"), ("a100_80", "A100-80")])
def test_names_are_found_as_people_write_them(written, name):
    assert find_gpu(written).name == name


def test_an_unknown_gpu_gets_the_nearest():
    with pytest.raises(UsageError, match="H200"):
        find_gpu("H2000")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_rates_fall_with_precision_and_memory_is_in_bytes(gpu):
    assert gpu.peak["bfloat16"] >= 1.9 * gpu.peak["tf32"]
    assert gpu.peak["tf32"] >= gpu.peak["float32"] > 1e13
    assert 20e9 < gpu.memory < 300e9


def test_a_matrix_product_has_a_rate():
    assert 1e8 < matmul_rate(torch.float32, "cpu", repeats=1, size=SMALLEST_MATMUL) < 1e14
