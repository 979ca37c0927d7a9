"""The benchmark's report against its own parts; the arithmetic it divides by against PyTorch's count of operations."""

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jlt.config import NetworkConfig
from jlt.errors import WrongWordsError
from jlt.experiments.benchmark import benchmark_train
from jlt.experiments.systems import preset
from jlt.networks.flops import forward_flops, training_flops
from jlt.networks.transformer import Transformer, build_network, count_parameters

BATCH = 3


@pytest.fixture(scope="module")
def measured():
    return benchmark_train("JLT-XS/1", 2, 1, "float32", compile=False)


def test_the_benchmark_says_what_it_measured(measured):
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    asked = {"preset": "JLT-XS/1", "batch_size": 2, "steps": 1, "precision": "float32", "compile": False}
    assert asked.items() <= measured.items()
    network = preset("JLT-XS/1")[1]
    assert measured["network"] == dataclasses.asdict(network)
    assert measured["parameters"] == count_parameters(build_network(network, seed=0))
    assert measured["threads"] == torch.get_num_threads()
    assert {"cpu", "cores", "device"} <= set(measured["machine"])
    assert measured["versions"]["torch"] == torch.__version__


def test_utilisation_follows_from_its_parts(measured):
    assert measured["seconds_per_step"] > 0
    assert measured["img_per_second"] == pytest.approx(2 / measured["seconds_per_step"])
    assert measured["gflop_per_image"] == pytest.approx(training_flops(preset("JLT-XS/1")[1]) / 1e9)
    assert measured["gflops"] == pytest.approx(measured["gflop_per_image"] * measured["img_per_second"])
    assert measured["mfu"] == pytest.approx(measured["gflops"] / measured["matmul_gflops"])
    assert 0 < measured["mfu"] < 1


def test_peak_memory_is_in_gib(measured):
    # torch alone takes about a fifth of a GiB; this process has run tests on small networks.
    assert 0.1 < measured["peak_memory_gib"] < 16


def test_unknown_preset_gets_the_nearest():
    with pytest.raises(WrongWordsError, match="JLT-XS/1"):
        benchmark_train("JLT-XS1", 2, 1, "float32", compile=False)


def network_config(**changes) -> NetworkConfig:
    settings = {
        "channels": 6,
        "height": 4,
        "width": 8,
        "num_classes": 5,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 4,
        **changes,
    }
    return NetworkConfig(**settings)


CONFIGURATIONS = {
    "patch 1": network_config(),
    "patch 2": network_config(patch_size=2),
    "bottleneck": network_config(patch_size=2, bottleneck_size=7),
    "context tokens": network_config(context_tokens=5, context_start=1),
    "context tokens from the start": network_config(context_tokens=3, fixed_positions=True),
    "all": network_config(patch_size=2, bottleneck_size=5, context_tokens=4, context_start=2, mlp_ratio=3.0),
}


def counted(config: NetworkConfig, backward: bool) -> float:
    """Return the operations of one image in a real pass, by PyTorch's counter."""
    network = build_network(config, seed=0)
    z = torch.randn(BATCH, config.channels, config.height, config.width)
    labels = torch.arange(BATCH) % config.num_classes
    # The counter does not know the fused attention of a CPU; as plain products it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = network(z, torch.linspace(0.1, 0.9, BATCH), labels)
        if backward:
            output.square().mean().backward()
    return counter.get_total_flops() / BATCH


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_forward_flops_are_those_of_a_real_pass(name):
    config = CONFIGURATIONS[name]
    assert forward_flops(config) == counted(config, backward=False)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_training_flops_are_near_those_of_a_real_update(name):
    # The usual count of three forwards also counts the gradient of the input, which nobody needs.
    config = CONFIGURATIONS[name]
    assert training_flops(config) == 3 * forward_flops(config)
    assert training_flops(config) == pytest.approx(counted(config, backward=True), rel=0.05)


def test_published_base_network_has_the_published_size_and_cost():
    config = preset("JLT-B/1")[1]
    with torch.device("meta"):
        parameters = count_parameters(Transformer(config))
    assert parameters == pytest.approx(130e6, rel=0.01)
    assert training_flops(config) == pytest.approx(138e9, rel=0.01)
