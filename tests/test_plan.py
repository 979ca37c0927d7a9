"""The forecast of a run against what it forecasts: counted parameters, memory of real passes, a measured process."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from jlt.benchmarks.memory import pass_memory
from jlt.benchmarks.plan import (
    COMPILED_SHARE,
    Figure,
    Hardware,
    checkpoints_at_once,
    describe_hardware,
    describe_latents,
    make_plan,
    run_passes,
)
from jlt.cli.main import main
from jlt.config import FLUX2_IMAGENET256, NetworkConfig, TrainConfig
from jlt.errors import JLTError
from jlt.experiments.recipes import resolve_recipe
from jlt.networks import layers
from jlt.networks.layers import NORM_EPS, rms_normalise
from jlt.networks.sizes import sized_network
from jlt.networks.transformer import build_network, count_network, count_parameters, training_flops
from jlt.report.benchmark_table import plan_table, quantity
from jlt.storage.codec import to_json

GIB = 2**30
NETWORK = NetworkConfig(channels=6, height=4, width=8, num_classes=5, hidden_size=32, depth=5, num_heads=4)
CONTEXT = dataclasses.replace(NETWORK, context_tokens=5, context_start=1, fixed_positions=True, bottleneck_size=7)
IMAGES = 4


def run_config(**changes) -> TrainConfig:
    settings = {"name": "small", "prediction": "x", "network": NETWORK, "batch_size": 24, "steps": 100}
    return TrainConfig(**{**settings, **changes})


def hardware(processes: int = 1, memory: int = GIB, **changes) -> Hardware:
    peak, total, outside = Figure(1e12, "given", "FLOP/s"), Figure(memory, "given"), Figure(0, "given")
    return dataclasses.replace(Hardware("test", processes, peak, total, outside, slack=0.0), **changes)


def planned(config: TrainConfig, machine: Hardware, mfu: float = 0.5):
    return make_plan(config, describe_latents(config, 1000, None), machine, mfu)


# ---- memory of the passes ----


def autograd_bytes(config: NetworkConfig, bfloat16: bool, checkpoint_blocks: bool, images: int, compiler="") -> int:
    """Return the bytes that autograd saves in a real forward pass, once per storage and without parameters."""
    network = build_network(config, seed=0)
    network.checkpoint_blocks = checkpoint_blocks
    known = {value.untyped_storage().data_ptr() for value in [*network.parameters(), *network.buffers()]}
    z = torch.randn(images, config.channels, config.height, config.width)
    inputs = z, torch.rand(images), torch.zeros(images, dtype=torch.long)
    known |= {value.untyped_storage().data_ptr() for value in inputs}
    # The storages are kept, or a new one could get the address of an old one.
    saved = {}

    def keep(value):
        saved[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    forward = torch.compile(network, backend=compiler) if compiler else network
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        forward(*inputs)
    return sum(storage.nbytes() for place, storage in saved.items() if place not in known)


class FusedNorm(torch.autograd.Function):
    """RMS normalisation that saves what a GPU's kernel saves: its input and the inverse norms."""

    @staticmethod
    def forward(ctx, x):
        r = (x.float().square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        ctx.save_for_backward(x, r)
        return (x * r).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, r = ctx.saved_tensors
        y = x * r
        return (r * (g - y * (g * y).mean(-1, keepdim=True))).to(x.dtype)


@pytest.mark.parametrize(
    ("config", "gpu"),
    [(NETWORK, False), (NETWORK, True), (CONTEXT, False), (CONTEXT, True)],
    ids=["cpu", "gpu", "context on a cpu", "context"],
)
@pytest.mark.parametrize("checkpoint_blocks", [False, True], ids=["saved", "checkpointed"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_saved_bytes_are_those_that_autograd_saves(config, bfloat16, checkpoint_blocks, gpu, monkeypatch):
    if gpu:
        monkeypatch.setattr(layers, "rms_normalise", FusedNorm.apply)
    real = autograd_bytes(config, bfloat16, checkpoint_blocks, IMAGES)
    # The output is counted too, and saved for nothing but the loss.
    output = config.channels * config.height * config.width * IMAGES * (2 if bfloat16 else 4)
    assert pass_memory(config, IMAGES, bfloat16, checkpoint_blocks, gpu).saved == pytest.approx(real, abs=1.1 * output)


def peak_bytes(config: NetworkConfig, bfloat16: bool, checkpoint_blocks: bool, images: int) -> int:
    """Return the peak of what a real pass allocates, with gradients that exist before it."""
    network = build_network(config, seed=0)
    network.checkpoint_blocks = checkpoint_blocks
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    z = torch.randn(images, config.channels, config.height, config.width)
    inputs = z, torch.rand(images), torch.zeros(images, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = network(*inputs)
        (output.float() - z).square().mean().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize(
    ("config", "checkpoint_blocks", "bfloat16"),
    [(NETWORK, False, False), (NETWORK, False, True), (NETWORK, True, False), (CONTEXT, True, True)],
    ids=["plain", "bfloat16", "checkpointed", "all"],
)
@pytest.mark.parametrize("images", [8, 40])
def test_the_peak_is_that_of_a_real_pass(config, bfloat16, checkpoint_blocks, images):
    memory = pass_memory(config, images, bfloat16, checkpoint_blocks, fused_norm=False)
    real = peak_bytes(config, bfloat16, checkpoint_blocks, images)
    assert memory.saved + memory.working == pytest.approx(real, rel=0.03)


def test_checkpointing_saves_the_inputs_of_blocks_alone():
    config = dataclasses.replace(NETWORK, depth=20)
    saved, checkpointed = (pass_memory(config, 1, False, recomputes, True) for recomputes in (False, True))
    tokens = config.tokens * config.hidden_size * 4
    assert checkpointed.activations == pytest.approx(config.depth * tokens, rel=0.3)
    assert checkpointed.activations < saved.activations / 10
    # All values of one block exist while its gradients are computed.
    assert checkpointed.working > 10 * tokens


def test_autocast_keeps_copies_of_the_weights_for_any_batch():
    copies = pass_memory(NETWORK, 1, True, False, True).copies_and_tables
    matrices = sum(module.weight.numel() for module in build_network(NETWORK, 0).modules() if type(module) is nn.Linear)
    assert copies == pytest.approx(2 * matrices, rel=0.1)
    # Tables of positions remain, which are small compared with the weights of any real network.
    assert pass_memory(NETWORK, 1, False, False, True).copies_and_tables < 0.2 * copies


def test_the_gradient_of_a_normalisation_is_exact():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_normalise, x)


COMPILED = f"""
import dataclasses, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_plan import NETWORK, autograd_bytes
config = dataclasses.replace(NETWORK, hidden_size=64, depth=2)
print([autograd_bytes(config, False, False, images, compiler)
       for compiler in ("", "aot_eager_decomp_partition") for images in (2, 3)])
sys.exit()
"""
"""The partitioner that inductor uses, without its code; apart from this process, whose checked types stop dynamo."""


@pytest.mark.slow
def test_a_compiled_network_saves_the_stated_share():
    process = forked.start([], plant=COMPILED)
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    two, three, compiled_two, compiled_three = json.loads(printed)
    assert compiled_three - compiled_two == pytest.approx(COMPILED_SHARE * (three - two), rel=0.05)


def test_compiled_runs_are_counted_with_their_share():
    eager, compiled = (run_passes(run_config(compile=compile), 3, gpu=False) for compile in (False, True))
    assert compiled.activations == pytest.approx(COMPILED_SHARE * eager.activations, abs=1)
    assert dataclasses.replace(compiled, activations=eager.activations) == eager


# ---- memory of a run ----


def test_state_is_the_parameters_times_what_is_held():
    plan = planned(run_config(ema=(0.9, 0.99), power_ema=(0.05,)), hardware(processes=2))
    parameters = count_parameters(build_network(NETWORK, seed=0))
    assert plan.work["parameters"].value == parameters
    shares = {"weights": 1, "gradients": 1, "adamw_moments": 2, "ema_0.9": 1, "ema_0.99": 1, "power_ema_0.05": 1}
    assert {name: plan.memory[name].value for name in shares} == {
        name: 4 * parameters * count for name, count in shares.items()
    }


def test_a_total_is_the_sum_of_its_parts():
    machine = hardware(processes=2, outside=Figure(1000, "given"), slack=0.1)
    memory = {name: figure.value for name, figure in planned(run_config(), machine).memory.items()}
    passes = ("activations", "weight_copies_and_tables", "working_memory", "latents_and_noise")
    assert memory["outside_the_network"] == pytest.approx(1000 + 0.1 * sum(memory[name] for name in passes), abs=1)
    assert memory["total"] == sum(value for name, value in memory.items() if name not in ("total", "available"))


def test_fsdp_divides_the_state_and_nothing_else():
    ddp, fsdp = (planned(run_config(parallel=parallel), hardware(processes=4)).memory for parallel in ("ddp", "fsdp"))
    state = ["weights", "gradients", "adamw_moments", "ema_0.9999", "ema_0.9996", "power_ema_0.05", "power_ema_0.1"]
    assert all(fsdp[name].value == pytest.approx(ddp[name].value / 4, abs=4) for name in state)
    assert all(fsdp[name].value == ddp[name].value for name in ("activations", "working_memory", "latents_and_noise"))
    parameters = count_network(NETWORK)
    assert 0 < fsdp["gathered_by_fsdp"].value < 4 * parameters
    assert (
        planned(run_config(parallel="fsdp"), hardware()).memory.keys()
        == planned(run_config(), hardware()).memory.keys()
    )


def test_gradients_of_a_process_alone_take_the_place_of_activations():
    alone, accumulating = (planned(run_config(accumulation=count), hardware()).memory for count in (1, 2))
    assert alone["gradients"].value == 0
    assert accumulating["gradients"].value == accumulating["weights"].value
    # Two tokens, whose activations are fewer than the weights.
    few = planned(run_config(batch_size=1, network=dataclasses.replace(NETWORK, patch_size=4)), hardware()).memory
    assert 0 < few["gradients"].value <= few["weights"].value


def test_a_run_that_does_not_fit_lists_what_would():
    config, whole = run_config(), planned(run_config(), hardware(processes=2))
    memory = int(whole.memory["total"].value) - 1
    plan = planned(config, hardware(processes=2, memory=memory))
    assert whole.fits
    assert whole.largest_micro_batch_size == 12
    assert whole.ways_to_fit == ()
    assert not plan.fits
    assert [dict(way.settings) for way in plan.ways_to_fit] == [
        {"micro_batch_size": 6},
        {"gradient_checkpointing": True},
        {"parallel": "fsdp"},
        {"parallel": "fsdp", "gradient_checkpointing": True},
    ]
    for way in plan.ways_to_fit:
        changed = planned(dataclasses.replace(config, **way.settings), hardware(processes=2, memory=memory))
        assert changed.fits
        assert changed.memory["total"].value == way.bytes
        assert changed.time["hours"].value == pytest.approx(way.seconds / 3600)
    nothing = planned(config, hardware(memory=1000))
    assert (nothing.fits, nothing.largest_micro_batch_size, nothing.ways_to_fit) == (False, 0, ())
    assert "take more or larger GPUs" in plan_table(to_json(nothing))


# ---- disk, time, communication ----


def test_disk_is_what_is_kept():
    config = run_config(flips=True, checkpoint_every=10, snapshot_every=25, ema=(0.9,), power_ema=(0.05, 0.1))
    plan, parameters = planned(config, hardware()), count_network(NETWORK)
    store = 1000 * (6 * 4 * 8 * 2 * 2 + 16)
    assert plan.disk["latent_store"].value == store
    assert plan.disk["checkpoint"].value == 4 * parameters * (1 + 2 + 1 + 2)
    assert plan.disk["checkpoints"].value == 4 * plan.disk["checkpoint"].value
    assert plan.disk["snapshots"].value == 4 * 2 * 4 * parameters
    parts = ("latent_store", "checkpoints", "snapshots")
    assert plan.disk["disk_needed"].value == sum(plan.disk[name].value for name in parts)


@pytest.mark.parametrize(
    ("keeping", "count"),
    [
        ({"keep_last": 3}, 4),
        ({"keep_last": 0}, 11),
        ({"keep_last": 1, "keep_every": 50}, 3),
        ({"keep_last": 20}, 11),
        ({"keep_last": 1, "checkpoint_every": 1000}, 1),
    ],
)
def test_checkpoints_at_once(keeping, count):
    assert checkpoints_at_once(run_config(**{"steps": 105, "checkpoint_every": 10, **keeping})) == count


def test_time_follows_from_rate_and_operations():
    plan = planned(run_config(), hardware(processes=2), mfu=0.25)
    rate = 2 * 1e12 * 0.25 / training_flops(NETWORK)
    assert plan.time["img_per_second"].value == pytest.approx(rate)
    assert plan.time["seconds_per_step"].value == pytest.approx(24 / rate)
    assert plan.time["hours"].value == pytest.approx(100 * 24 / rate / 3600)
    assert plan.time["gpu_hours"].value == pytest.approx(2 * plan.time["hours"].value)
    assert plan.work["epochs"].value == pytest.approx(2.4)
    recomputing = planned(run_config(gradient_checkpointing=True), hardware(processes=2), mfu=0.25)
    assert recomputing.time["hours"].value == pytest.approx(4 / 3 * plan.time["hours"].value)


def test_a_ring_carries_the_gradients_twice():
    sent = planned(run_config(), hardware(processes=4)).time["sent_per_step"].value
    assert sent == pytest.approx(2 * 3 / 4 * 4 * count_network(NETWORK))
    assert planned(run_config(), hardware()).time["sent_per_step"].value == 0
    fsdp = planned(run_config(parallel="fsdp", accumulation=2), hardware(processes=4)).time["sent_per_step"].value
    assert fsdp == pytest.approx(3 * sent)


def test_published_recipe_on_one_node():
    config = resolve_recipe("imagenet256-jlt-b1")
    plan = planned(config, describe_hardware("h200", 8, config), mfu=0.4)
    assert plan.work["parameters"].value == pytest.approx(130e6, rel=0.01)
    assert plan.work["micro_batch_size"].value == 128
    assert plan.time["hours"].value == pytest.approx(3 * 46e9 * 1024 * 250_000 / (8 * 989e12 * 0.4) / 3600, rel=0.01)
    assert plan.fits
    assert 15 * GIB < plan.memory["total"].value < 30 * GIB


# ---- refusals and the table ----


@pytest.mark.parametrize(("changes", "mfu", "message"), [({"batch_size": 25}, 0.5, "24 or 26"), ({}, 40.0, "(0, 1]")])
def test_what_is_impossible_is_refused(changes, mfu, message):
    with pytest.raises(JLTError, match=re.escape(message)):
        planned(run_config(**changes), hardware(processes=2), mfu)


def test_every_figure_says_where_it_comes_from():
    plan = to_json(planned(run_config(parallel="fsdp"), hardware(processes=2)))
    for section in ("work", "memory", "disk", "time"):
        for name, entry in plan[section].items():
            assert entry["source"], name
    lines = plan_table(plan).splitlines()
    assert max(map(len, lines)) <= 120
    assert any("seconds per step" in line and "batch size / images per second" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "bytes", "0"),
        (3 * GIB / 2, "bytes", "1.50 GiB"),
        (5 * 2**20, "bytes", "5.00 MiB"),
        (2048, "bytes", "2.00 KiB"),
        (130_508_672, "count", "130,508,672"),
        (53.421, "count", "53.4"),
        (989.4e12, "FLOP/s", "989 TFLOP/s"),
        (0.4, "share", "40.0%"),
        (3.11, "hours", "3.11 h"),
        (0.5, "hours", "30 min 00 s"),
    ],
)
def test_quantities_are_written_as_a_person_would(value, unit, text):
    assert quantity({"value": value, "unit": unit}) == text


def test_the_command_prints_one_json_object(capsys):
    arguments = ["plan", "digits", "--gpus", "2", "--gpu", "L40S", "--network.depth", "2", "--mfu", "0.3"]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == json.loads(json.dumps(plan, allow_nan=False))
    assert (plan["gpu"], plan["processes"], plan["config"]["network"]["depth"]) == ("L40S", 2, 2)
    assert (plan["time"]["mfu"]["value"], plan["work"]["micro_batch_size"]["value"]) == (0.3, 32)
    assert main(arguments) == 0
    assert "It fits" in capsys.readouterr().out


def test_an_update_is_measured_on_request(capsys):
    assert main(["plan", "digits", "--gpus", "2", "--gpu", "L40S", "--network.depth", "1", "--measure", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["peak_memory"]["value"] > 0.1 * GIB
    assert measured["seconds_per_step"]["value"] > 0
    assert "measured here" in measured["seconds_per_step"]["source"]


# ---- against a measured process ----

MEASURED_BATCH = 48


def jlt_process(*arguments) -> dict:
    """Run a command in a process of its own: a peak of memory is a process's, and includes all that it did before."""
    done = subprocess.run(
        [sys.executable, "-m", "jlt", *map(str, arguments), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak of memory is read from /proc")
def test_a_plan_for_this_machine_is_near_what_the_benchmark_measures():
    shape = FLUX2_IMAGENET256
    arguments = ["--preset", "JLT-XS/1", "--batch-size", MEASURED_BATCH, "--steps", 3, "--precision", "float32"]
    (measured,) = jlt_process("benchmark", "train", *arguments, "--loop-steps", 0)["measured"]
    settings = [f"--network.{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(shape).items()]
    settings += ["--batch-size", MEASURED_BATCH, "--ema", 0.9999, 0.9996, "--power-ema", 0.05, 0.1]
    plan = jlt_process("plan", "digits", "--gpu", "cpu", "--mfu", min(1, measured["mfu"]), *settings)
    assert plan["config"]["network"] == measured["network"] == to_json(sized_network("XS", 1, shape))
    assert plan["work"]["parameters"]["value"] == measured["parameters"]
    # The C library's allocator keeps some of what is freed, and how much varies; the benchmark's own matrix products
    # and what the mathematics library takes for them are no part of a run.
    peak = measured["peak_memory_gib"] * GIB
    assert plan["memory"]["total"]["value"] == pytest.approx(peak, abs=0.1 * peak + 0.1 * GIB)
    # The rate of a matrix product is measured again, on a machine that others may use.
    assert 0.4 < plan["time"]["img_per_second"]["value"] / measured["img_per_second"] < 2.5
