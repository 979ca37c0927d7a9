"""Speed of training on this machine: the trainer's own update, against a matrix product in the same run."""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from jlt.benchmarks.plan import Figure, Figures, count_network
from jlt.benchmarks.profiling import profile_steps
from jlt.benchmarks.train_loop import benchmark_loop, require_room
from jlt.config import Precision, TrainConfig
from jlt.errors import JLTError, UsageError
from jlt.latents.order import SampleOrder
from jlt.networks.flops import training_flops
from jlt.runtime.environment import default_device, machine, versions
from jlt.runtime.processes import SingleProcess
from jlt.runtime.progress import inform
from jlt.runtime.random_numbers import normal_per_sample
from jlt.runtime.timing import (
    affordable_size,
    compare_precisions,
    matmul_rate,
    peak_memory,
    reset_peak_memory,
    seconds_of,
)
from jlt.training.batch_split import split_batch
from jlt.training.draws import draw_step
from jlt.training.state import initial_state
from jlt.training.step import Stepper, float32_products

WARMUP_STEPS = 3
PROFILED_STEPS = 3
PRODUCT_SECONDS = 2.0
"""How long one matrix product may take, which a benchmark repeats a dozen times."""


def benchmark_train(
    configs: Sequence[TrainConfig],
    batch_sizes: Sequence[int],
    steps: int,
    loop_steps: int = 0,
    profile: bool = False,
    compare: bool = False,
) -> dict[str, Any]:
    """Measure the update of each training at each batch size; and at the fastest one, on request, what surrounds it.

    `measured` has an entry per pair, `best` the fastest batch size by name. Each of the rest is by name and empty where
    it was not requested: `loop` (`loop_steps` steps of the training loop, against the bare update), `profile` (where
    the time of a step goes), `compare` (compiling, recomputing and other precisions). Times are medians over `steps`
    updates. A loop or profile that fails, for lack of memory for example, has an `error` in place of its figures.
    """
    if steps < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise UsageError("A benchmark needs at least one measured step and a positive batch size.")
    device = default_device()
    if loop_steps:
        require_room(configs, batch_sizes, loop_steps)
    precisions = compare_precisions(device)
    if precisions.warning:
        inform(precisions.warning)
    measured = [
        measure_or_skip(dataclasses.replace(config, batch_size=batch_size), steps, device)
        for config in configs
        for batch_size in batch_sizes
    ]
    best = {config.name: fastest for config in configs if (fastest := _fastest(measured, config.name))}
    at_best = [dataclasses.replace(c, batch_size=best[c.name]["batch_size"]) for c in configs if c.name in best]
    return {
        "measured": measured,
        "best": {name: entry["batch_size"] for name, entry in best.items()},
        "loop": {
            config.name: _or_error(benchmark_loop, config, loop_steps, best[config.name], device)
            for config in at_best
            if loop_steps
        },
        "profile": {
            config.name: _or_error(profile_update, config, best[config.name], device) for config in at_best if profile
        },
        "compare": {config.name: compare_variants(config, steps, device) for config in at_best if compare},
        "precisions": dataclasses.asdict(precisions),
        "warning": precisions.warning,
        "threads": torch.get_num_threads(),
        "machine": machine(device),
        "versions": versions(),
    }


def measure_or_skip(config: TrainConfig, steps: int, device: str) -> dict[str, Any]:
    """Return what `measure_update` does, or an entry with `out_of_memory` where the batch does not fit."""
    inform(f"measuring {config.name} at batch size {config.batch_size}")
    try:
        entry = {**describe(config), "out_of_memory": False, **measure_update(config, steps, device)}
    except torch.OutOfMemoryError:
        entry = {**describe(config), "out_of_memory": True}
    # Only here is everything released that the failed update held.
    free_memory(device)
    return entry


def describe(config: TrainConfig) -> dict[str, Any]:
    """Return what distinguishes one measurement from another."""
    return {
        "preset": config.name,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "compile": config.compile,
        "gradient_checkpointing": config.gradient_checkpointing,
        "accumulation": config.accumulation or 1,
    }


def measure_update(config: TrainConfig, steps: int, device: str) -> dict[str, Any]:
    """Measure one training's updates on random latents; torch.OutOfMemoryError where they do not fit.

    The update is the trainer's: forward, loss, backward, clipping, AdamW and all averages. MFU divides its arithmetic,
    by the usual count of three forwards, by the rate of the best of several matrix products before and after.
    """
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    with float32_products(config.precision):
        size = affordable_size(dtype, device, PRODUCT_SECONDS)
        rate = matmul_rate(dtype, device, size=size)
        step = trainer_step(config, device)
        reset_peak_memory(device)
        warmup = sum(seconds_of(step, device) for _ in range(WARMUP_STEPS))
        seconds = statistics.median(seconds_of(step, device) for _ in range(steps))
        memory = peak_memory(device)
        rate = max(rate, matmul_rate(dtype, device, size=size))
    flops = training_flops(config.network)
    return {
        "steps": steps,
        "parameters": count_network(config.network).parameters,
        "network": dataclasses.asdict(config.network),
        "img_per_second": config.batch_size / seconds,
        "seconds_per_step": seconds,
        "gflop_per_image": flops / 1e9,
        "gflops": flops * config.batch_size / seconds / 1e9,
        "matmul_gflops": rate / 1e9,
        "mfu": flops * config.batch_size / seconds / rate,
        "peak_memory_gib": memory / 2**30,
        "warmup_seconds": warmup,
    }


def measure_share(config: TrainConfig, processes: int) -> Figures:
    """Return the peak memory and the time of real updates on this machine, of the share of one of some processes.

    The process works alone: nothing is sent, and nothing is sharded. JLTError where the share does not fit.
    """
    inform("measuring an update")
    share = dataclasses.replace(config, batch_size=config.batch_size // processes, parallel="ddp")
    try:
        found = measure_update(share, 1, default_device())
    except torch.OutOfMemoryError:
        raise JLTError("An update does not fit on this machine: leave --measure out.") from None
    source = "measured here: the update of one process alone"
    return {
        "peak_memory": Figure(found["peak_memory_gib"] * 2**30, "bytes", source),
        "seconds_per_step": Figure(found["seconds_per_step"], "seconds", source),
        "mfu": Figure(found["mfu"], "share", "of a matrix product in the same run"),
    }


def profile_update(config: TrainConfig, bare: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return where the time of an update goes; `bare` is its measurement without the profiler."""
    inform(f"profiling {config.name} at batch size {config.batch_size}")
    with float32_products(config.precision):
        step = trainer_step(config, device)
        for _ in range(WARMUP_STEPS):
            step()
        return profile_steps(step, PROFILED_STEPS, bare["seconds_per_step"], device)


def compare_variants(config: TrainConfig, steps: int, device: str) -> list[dict[str, Any]]:
    """Measure eager, compiled and recomputing updates and other precisions, one after the other.

    Each entry has the `variant` and, where it fits, `ratio`: its images per second over those of the eager one.
    """
    entries = [
        {"variant": name, **measure_or_skip(variant, steps, device)}
        for name, variant in variants(config, device).items()
    ]
    eager = entries[0].get("img_per_second")
    for entry in entries:
        if eager and not entry["out_of_memory"]:
            entry["ratio"] = entry["img_per_second"] / eager
    return entries


def variants(config: TrainConfig, device: str) -> dict[str, TrainConfig]:
    """Return the trainings to compare by name: eager first, each other one with one change to it."""
    eager = dataclasses.replace(config, compile=False, gradient_checkpointing=False)
    found = {
        "eager": eager,
        "compiled": dataclasses.replace(eager, compile=True),
        "gradient checkpointing": dataclasses.replace(eager, gradient_checkpointing=True),
    }
    others: list[Precision] = ["float32", "tf32"] if torch.device(device).type == "cuda" else ["float32"]
    return found | {name: dataclasses.replace(eager, precision=name) for name in others if name != config.precision}


def trainer_step(config: TrainConfig, device: str) -> Callable[[], None]:
    """Return a function that makes one of the trainer's updates on random latents."""
    network = config.network
    state = initial_state(config, device)
    stepper = Stepper(config, state, split_batch(config, 1), SingleProcess())
    shape = (network.channels, network.height, network.width)
    latents = normal_per_sample(range(config.batch_size), shape, device)
    labels = torch.arange(config.batch_size) % network.num_classes
    draws = draw_step(config, SampleOrder(config.batch_size, 0), 0)

    def step() -> None:
        stepper.apply(stepper.differentiate(draws, latents, labels, stop=False))
        state.ema.update(state.step)

    return step


def free_memory(device: str) -> None:
    """Free the memory of what is no longer used, and compiled code, which is specialised to the last batch size."""
    torch.compiler.reset()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _fastest(measured: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    fitting = [entry for entry in measured if entry["preset"] == name and not entry["out_of_memory"]]
    return max(fitting, key=lambda entry: entry["img_per_second"], default=None)


def _or_error(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return figures, or the error in their place: what was measured before is kept."""
    try:
        found = measure(*arguments)
    except (JLTError, torch.OutOfMemoryError) as error:
        found = {"error": str(error)}
    free_memory(default_device())
    return found
