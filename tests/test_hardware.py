"""The table of GPUs: names as people and as PyTorch write them, and rates that belong together."""

import pytest
import torch

from jlt.benchmarks.hardware import GPUS, device_peak, find_gpu
from jlt.errors import UsageError
from jlt.runtime.timing import SMALLEST_MATMUL, matmul_rate


@pytest.mark.parametrize(("words", "name"), [("h200", "H200"), ("RTX 4090", "RTX-4090"), ("a100_80", "A100-80")])
def test_names_are_found_as_people_write_them(words, name):
    assert find_gpu(words).name == name


def test_an_unknown_gpu_gets_the_nearest():
    with pytest.raises(UsageError, match="H200"):
        find_gpu("H2000")


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("", None),
    ],
)
def test_a_device_has_the_peak_of_its_whole_name_alone(device, peak):
    assert device_peak(device, "bfloat16") == peak


def test_no_device_name_is_of_two_gpus():
    names = [name for gpu in GPUS.values() for name in gpu.device_names]
    assert len(names) == len(set(names)) >= len(GPUS)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_rates_fall_with_precision_and_memory_is_in_bytes(gpu):
    assert gpu.peak("bfloat16") >= 1.9 * gpu.peak("tf32")
    assert gpu.peak("tf32") >= gpu.peak("float32") > 1e13
    assert 20e9 < gpu.memory < 300e9


def test_a_matrix_product_has_a_rate():
    assert 1e8 < matmul_rate(torch.float32, "cpu", repeats=1, size=SMALLEST_MATMUL) < 1e14
