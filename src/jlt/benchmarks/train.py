"""Speed of training on this machine: the trainer's own update, against a matrix product in the same run."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from operator import itemgetter
from typing import Any

import torch

from jlt.benchmarks.plan import Figure, Figures, count_network
from jlt.benchmarks.profiling import profile_steps
from jlt.benchmarks.train_loop import benchmark_loop, require_room
from jlt.config import Precision, TrainConfig
from jlt.errors import JLTError, UsageError
from jlt.latents.order import SampleOrder
from jlt.networks.flops import training_flops
from jlt.runtime import environment
from jlt.runtime.environment import default_device, machine, versions
from jlt.runtime.processes import SingleProcess
from jlt.runtime.progress import inform
from jlt.runtime.random_numbers import normal_per_sample
from jlt.training.draws import draw_step
from jlt.training.state import initial_state
from jlt.training.step import Stepper, float32_products, split_batch

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
    precisions = environment.compare_precisions(device)
    if precisions.warning:
        inform(precisions.warning)
    measured = [
        measure_or_skip(replace(config, batch_size=batch_size), steps, device)
        for config in configs
        for batch_size in batch_sizes
    ]
    fitting = sorted((entry for entry in measured if not entry["out_of_memory"]), key=itemgetter("img_per_second"))
    # Of each network the last one stays, which is the fastest.
    best = {entry["preset"]: entry for entry in fitting}
    at_best = [replace(c, batch_size=best[c.name]["batch_size"]) for c in configs if c.name in best]
    return {
        "measured": measured,
        "best": {name: entry["batch_size"] for name, entry in best.items()},
        "loop": {c.name: _or_error(benchmark_loop, c, loop_steps, best[c.name], device) for c in at_best if loop_steps},
        "profile": {c.name: _or_error(profile_update, c, best[c.name], device) for c in at_best if profile},
        "compare": {c.name: compare_variants(c, steps, device) for c in at_best if compare},
        "precisions": asdict(precisions),
        "warning": precisions.warning,
        "threads": torch.get_num_threads(),
        "machine": machine(device),
        "versions": versions(),
    }


def measure_or_skip(config: TrainConfig, steps: int, device: str) -> dict[str, Any]:
    """Return the settings and what `measure_update` does; `out_of_memory` is true where the batch does not fit."""
    inform(f"measuring {config.name} at batch size {config.batch_size}")
    compared = ("batch_size", "precision", "compile", "gradient_checkpointing")
    entry = {"preset": config.name, **{name: getattr(config, name) for name in compared}}
    entry |= {"accumulation": config.accumulation or 1, "out_of_memory": False}
    try:
        entry |= measure_update(config, steps, device)
    except torch.OutOfMemoryError:
        entry["out_of_memory"] = True
    # Only here is everything released that the failed update held.
    free_memory(device)
    return entry


def measure_update(config: TrainConfig, steps: int, device: str) -> dict[str, Any]:
    """Measure one training's updates on random latents; torch.OutOfMemoryError where they do not fit.

    The update is the trainer's: forward, loss, backward, clipping, AdamW and all averages. MFU divides its arithmetic,
    by the usual count of three forwards, by the rate of the best of several matrix products before and after.
    """
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    with float32_products(config.precision):
        size = environment.affordable_size(dtype, device, PRODUCT_SECONDS)
        rate = environment.matmul_rate(dtype, device, size=size)
        step = trainer_step(config, device)
        environment.reset_peak_memory(device)
        warmup = sum(environment.seconds_of(step, device) for _ in range(WARMUP_STEPS))
        seconds = statistics.median(environment.seconds_of(step, device) for _ in range(steps))
        memory = environment.peak_memory(device)
        rate = max(rate, environment.matmul_rate(dtype, device, size=size))
    flops = training_flops(config.network)
    return {
        "steps": steps,
        "parameters": count_network(config.network).parameters,
        "network": asdict(config.network),
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
    share = replace(config, batch_size=config.batch_size // processes, parallel="ddp")
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
    """Measure eager updates first, then each with one change: compiled, recomputing, and other precisions.

    Each entry has the `variant` and, where it fits, `ratio`: its images per second over those of the eager one.
    """
    eager = replace(config, compile=False, gradient_checkpointing=False)
    precisions: list[Precision] = ["float32", "tf32"] if torch.device(device).type == "cuda" else ["float32"]
    variants: dict[str, TrainConfig] = {
        "eager": eager,
        "compiled": replace(eager, compile=True),
        "gradient checkpointing": replace(eager, gradient_checkpointing=True),
        **{name: replace(eager, precision=name) for name in precisions if name != config.precision},
    }
    entries = [{"variant": name, **measure_or_skip(one, steps, device)} for name, one in variants.items()]
    rate = entries[0].get("img_per_second")
    for entry in entries:
        if rate and not entry["out_of_memory"]:
            entry["ratio"] = entry["img_per_second"] / rate
    return entries


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


def _or_error(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return figures, or the error in their place: what was measured before is kept."""
    try:
        found = measure(*arguments)
    except (JLTError, torch.OutOfMemoryError) as error:
        found = {"error": str(error)}
    free_memory(default_device())
    return found
