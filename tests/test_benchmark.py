"""The benchmark's report against its own parts; the arithmetic it divides by against PyTorch's count of operations."""

import functools
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jlt.benchmarks import train
from jlt.benchmarks.train import benchmark_train, loop_figures
from jlt.config import NetworkConfig, TrainConfig
from jlt.errors import JLTError, UsageError
from jlt.experiments.recipes import preset, preset_config
from jlt.networks.transformer import Transformer, build_network, count_parameters, forward_flops, training_flops
from jlt.report.benchmark_table import benchmark_table
from jlt.runtime import environment
from jlt.runtime.environment import ProductRates
from jlt.storage.codec import to_json
from jlt.training import meter

BATCH = 3
PRESET = "JLT-XS/1"


@pytest.fixture(scope="module", autouse=True)
def _small_products():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "PRODUCT_SECONDS", 0.05)
        patch.setattr(environment, "compare_precisions", functools.cache(environment.compare_precisions))
        yield


@pytest.fixture(scope="module")
def result():
    return benchmark_train([preset_config(PRESET, precision="float32")], [2], 1)


@pytest.fixture(scope="module")
def measured(result):
    (entry,) = result["measured"]
    return entry


def test_the_benchmark_reports_what_it_measured(result, measured):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    settings = {"preset": PRESET, "batch_size": 2, "steps": 1, "precision": "float32", "compile": False}
    assert settings.items() <= measured.items()
    network = preset(PRESET)[1]
    assert measured["network"] == to_json(network)
    assert measured["parameters"] == count_parameters(build_network(network, seed=0))
    assert result["best"] == {PRESET: 2}
    assert result["threads"] == torch.get_num_threads()
    assert {"cpu", "cores", "device"} <= set(result["machine"])
    assert result["versions"]["torch"] == torch.__version__


def test_utilisation_follows_from_its_parts(measured):
    assert measured["seconds_per_step"] > 0
    assert measured["img_per_second"] == pytest.approx(2 / measured["seconds_per_step"])
    assert measured["gflop_per_image"] == pytest.approx(training_flops(preset(PRESET)[1]) / 1e9)
    assert measured["gflops"] == pytest.approx(measured["gflop_per_image"] * measured["img_per_second"])
    assert measured["mfu"] == pytest.approx(measured["gflops"] / measured["matmul_gflops"])
    assert 0 < measured["mfu"] < 1


def test_peak_memory_is_in_gib(measured):
    # torch alone takes about a fifth of a GiB; this process has run tests on small networks.
    assert 0.1 < measured["peak_memory_gib"] < 16


def test_unknown_preset_gets_the_nearest():
    with pytest.raises(UsageError, match="JLT-XS/1"):
        preset_config("JLT-XS1")


def small_config(**changes) -> TrainConfig:
    settings = {"network": network_config(), "precision": "float32", "flips": True, **changes}
    return TrainConfig("small", "x", **settings)


def fake_update(speeds):
    """Return a measurement whose speed is a function of the batch size; None does not fit in memory."""

    def measure(config, steps, device):
        speed = speeds[config.batch_size]
        if speed is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        figures = ("seconds_per_step", "gflops", "matmul_gflops", "mfu", "peak_memory_gib", "warmup_seconds")
        return {"img_per_second": speed * (2 if config.compile else 1), **dict.fromkeys(figures, 0.5)}

    return measure


def test_what_does_not_fit_is_recorded_and_the_fastest_is_marked(monkeypatch):
    monkeypatch.setattr(train, "measure_update", fake_update({4: 10.0, 8: 12.5, 16: 11.0, 32: None}))
    found = benchmark_train([small_config()], [4, 8, 16, 32], 1, compare=True)
    assert [entry["out_of_memory"] for entry in found["measured"]] == [False, False, False, True]
    assert found["best"] == {"small": 8}
    compared = found["compare"]["small"]
    assert [entry["variant"] for entry in compared] == ["eager", "compiled", "gradient checkpointing"]
    assert [entry["ratio"] for entry in compared] == [1.0, 2.0, 1.0]
    table = benchmark_table(found)
    assert "12.5 *" in table
    assert "batch 32: does not fit" in table
    assert "gradient checkpointing" in table


def test_where_nothing_fits_there_is_no_best(monkeypatch):
    monkeypatch.setattr(train, "measure_update", fake_update({4: None}))
    found = benchmark_train([small_config()], [4], 1, loop_steps=4, profile=True, compare=True)
    assert found["best"] == found["loop"] == found["profile"] == found["compare"] == {}
    assert "does not fit" in benchmark_table(found)


def test_loop_and_profile_are_measured_at_the_fastest():
    found = benchmark_train([small_config()], [4], 2, loop_steps=9, profile=True)
    loop, profile = found["loop"]["small"], found["profile"]["small"]
    assert loop["steps"] == 8
    assert loop["growth_steps"] == 6
    assert loop["ratio"] == pytest.approx(loop["img_per_second"] / found["measured"][0]["img_per_second"])
    assert 0 <= loop["waiting"] < 1
    assert 0 <= loop["pause_seconds"] < 1
    assert sum(profile["shares"].values()) == pytest.approx(1)
    assert profile["idle"] is None
    table = benchmark_table(found)
    assert "waiting for data" in table
    assert "aten::addmm" in table


def test_a_loop_that_fails_loses_nothing(monkeypatch):
    def fail(*arguments):
        raise JLTError("Step 0: there is not enough memory.")

    monkeypatch.setattr(train, "benchmark_loop", fail)
    found = benchmark_train([small_config()], [4], 1, loop_steps=4)
    assert found["loop"] == {"small": {"error": "Step 0: there is not enough memory."}}
    assert found["measured"][0]["img_per_second"] > 0
    assert "not enough memory" in benchmark_table(found)


def test_too_few_steps_of_the_loop_are_refused_at_once():
    with pytest.raises(UsageError, match="at least 4 steps"):
        benchmark_train([small_config()], [4], 1, loop_steps=3)


def test_figures_of_a_log():
    def line(step, speed, waiting, resident):
        return {"event": "step", "step": step, "img_per_second": speed, "waiting": waiting, "resident_gib": resident}

    saves = [{"event": "saved", "pause_seconds": p, "write_seconds": 3.0} for p in (9.0, 0.5)]
    windows = [line(10, 1.0, 0.9, 1.0), line(20, 10.0, 0.1, 1.5), line(30, 30.0, 0.5, 1.25), line(40, 1.0, 0.9, 1.25)]
    figures = loop_figures([{"event": "start"}, *windows, *saves], bare_img_per_second=20.0)
    # 10 steps at 10 img/s take three times as long as 10 at 30 img/s.
    assert figures["img_per_second"] == pytest.approx(15)
    assert figures["ratio"] == pytest.approx(0.75)
    assert figures["waiting"] == pytest.approx((3 * 0.1 + 0.5) / 4)
    assert (figures["first_pause_seconds"], figures["pause_seconds"]) == (9.0, 0.5)
    assert (figures["growth_mib"], figures["growth_steps"]) == (256, 30)


# ---- precisions ----


def test_a_slower_bfloat16_is_reported():
    assert ProductRates(float32=1e11, bfloat16=2e11).warning == ""
    assert ProductRates(float32=1e11, bfloat16=9.5e10).warning == ""
    assert "20 times as fast" in ProductRates(float32=1e11, bfloat16=5e9).warning


def test_a_slow_device_is_measured_with_small_matrices(monkeypatch):
    # At 1 GFLOP/s the side of 512 takes 0.27 s, and that of 1024 takes 2.1 s.
    monkeypatch.setattr(environment, "matmul_rate", lambda *_: 1e9)
    assert environment.affordable_size(torch.float32, "cpu", seconds=1.0) == 512
    assert environment.affordable_size(torch.float32, "cpu", seconds=0.1) == 256
    assert environment.affordable_size(torch.float32, "cpu", seconds=100.0) == 2048
    assert environment.affordable_size(torch.float32, "cpu", seconds=100.0, largest=1024) == 1024


@pytest.mark.parametrize(("precision", "warned"), [("bfloat16", True), ("float32", False), ("tf32", False)])
def test_the_trainer_warns_of_a_slow_bfloat16_only_where_it_is_used(precision, warned, monkeypatch):
    monkeypatch.setattr(meter, "compare_precisions", lambda *_: ProductRates(1e11, 1e9))
    warning = meter.precision_warning(precision, torch.device("cpu"))
    assert bool(warning) == warned


# ---- profiles ----


@pytest.fixture
def _one_thread():
    # On a busy machine the threads of a product wait for each other, and its share is anything.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_matrix_products_lead_a_real_profile():
    config = preset_config("JLT-S/1", precision="float32", batch_size=2)
    found = train.profile_update(config, {"seconds_per_step": 1.0}, "cpu")
    shares = list(found["shares"].values())
    assert sum(shares) == pytest.approx(1)
    assert shares[:-1] == sorted(shares[:-1], reverse=True)
    assert next(iter(found["shares"])) in ("aten::addmm", "aten::mm", "mkl::_mkl_linear")
    assert any("attention" in name for name in found["shares"])
    assert any("adam" in name for name in found["shares"])
    assert found["idle"] is None


# ---- the arithmetic ----


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
    # The usual count of three forwards also counts the gradient of the input, which is not needed.
    config = CONFIGURATIONS[name]
    assert training_flops(config) == 3 * forward_flops(config)
    assert training_flops(config) == pytest.approx(counted(config, backward=True), rel=0.05)


def test_published_base_network_has_the_published_size_and_cost():
    config = preset("JLT-B/1")[1]
    with torch.device("meta"):
        parameters = count_parameters(Transformer(config))
    assert parameters == pytest.approx(130e6, rel=0.01)
    assert training_flops(config) == pytest.approx(138e9, rel=0.01)
