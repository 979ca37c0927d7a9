"""Speed of training on this machine: the trainer's own update, against a matrix product in the same run.

At the fastest batch size also the training loop, against its bare update, and where the time of a step goes.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from jlt.benchmarks.data import SHARD_ROWS, random_shards
from jlt.benchmarks.plan import Figure, Figures
from jlt.config import Precision, TrainConfig, in_steps
from jlt.errors import JLTError, UsageError
from jlt.latents.loader import SampleOrder
from jlt.latents.store import LatentStore, write_store
from jlt.networks.transformer import count_network, training_flops
from jlt.runtime import environment
from jlt.runtime.environment import default_device, measured_on
from jlt.runtime.processes import SingleProcess
from jlt.runtime.progress import inform
from jlt.runtime.random_numbers import normal_per_sample
from jlt.storage.codec import to_json
from jlt.storage.rows import require_space
from jlt.training.draws import draw_step
from jlt.training.loop import Watcher, train
from jlt.training.state import initial_state
from jlt.training.step import Stepper, float32_products, split_batch

WARMUP_STEPS = 3
PROFILED_STEPS = 3
PRODUCT_SECONDS = 2.0
"""How long one matrix product may take, which a benchmark repeats a dozen times."""
LISTED_OPERATIONS = 15
"""Operations of a profile that are listed; the rest is one entry."""
WINDOWS = 4
"""Lines of the loop's log. The first warms up, the next ones give the speed, and the last two save a checkpoint."""
MOST_LATENTS = 4000
"""Random latents that the loop trains on."""


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
        **measured_on(device),
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
        "parameters": count_network(config.network),
        "network": to_json(config.network),
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
    share = replace(config, batch_size=config.batch_size // processes, parallel="ddp")
    found = measure_or_skip(share, 1, default_device())
    if found["out_of_memory"]:
        raise JLTError("An update does not fit on this machine: leave --measure out.")
    source = "measured here: the update of one process alone"
    return {
        "peak_memory": Figure(found["peak_memory_gib"] * 2**30, source),
        "seconds_per_step": Figure(found["seconds_per_step"], source, "seconds"),
        "mfu": Figure(found["mfu"], "of a matrix product in the same run", "share"),
    }


def profile_update(config: TrainConfig, bare: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return where the time of an update goes; `bare` is its measurement without the profiler.

    Returns `shares` of the time by name, the largest first: on a CPU each operation without those that it calls, on a
    GPU each kernel. `idle` is the share of the bare `seconds_per_step` in which a GPU ran no kernel.
    """
    inform(f"profiling {config.name} at batch size {config.batch_size}")
    cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with float32_products(config.precision):
        step = trainer_step(config, device)
        for _ in range(WARMUP_STEPS):
            step()
        with profile(activities=activities) as profiler:
            for _ in range(PROFILED_STEPS):
                step()
            if cuda:
                torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    # An annotation on a GPU spans the kernels within it, which are counted themselves.
    entries = [
        (entry.key, (entry.self_device_time_total if cuda else entry.self_cpu_time_total) / 1e6)
        for entry in profiler.key_averages()
        if entry.device_type == kind and not (cuda and entry.is_user_annotation)
    ]
    entries.sort(key=lambda entry: -entry[1])
    total = sum(seconds for _, seconds in entries)
    shares = {name: seconds / total for name, seconds in entries[:LISTED_OPERATIONS]}
    return {
        "steps": PROFILED_STEPS,
        "shares": {**shares, "everything else": max(0.0, 1 - sum(shares.values()))},
        "idle": max(0.0, 1 - total / PROFILED_STEPS / bare["seconds_per_step"]) if cuda else None,
    }


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


def benchmark_loop(config: TrainConfig, steps: int, bare: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Train on a temporary store of random latents, and read speed, waiting, pause and memory from the run's log.

    `bare` is what the update alone measured, with its `img_per_second`. The pause is that of the second save: the first
    may wait until its buffers are made. Errors are those of `jlt.training.loop.train`.
    """
    inform(f"training {config.name} for {steps} steps at batch size {config.batch_size}")
    config = loop_config(config, steps)
    with tempfile.TemporaryDirectory(prefix="jlt-benchmark-") as temporary:
        latents, run = Path(temporary) / "latents", Path(temporary) / "run"
        network, count = config.network, min(MOST_LATENTS, config.batch_size * config.steps)
        shape = (network.channels, network.height, network.width)
        write_store(latents, random_shards(count, shape, SHARD_ROWS, network.num_classes), network.num_classes)
        config = in_steps(config, count)
        # It requests the first checkpoint: training waits until that is written, so that the next one need not.
        saves_once = Watcher(lambda step: step == config.steps - config.log_every, lambda *_: None)
        train(config, LatentStore.open(latents), run, device, watchers=[saves_once])
        log = (run / "log.jsonl").read_text(encoding="utf-8")
    return loop_figures([json.loads(line) for line in log.splitlines()], bare["img_per_second"])


def loop_figures(log: Sequence[Mapping[str, Any]], bare_img_per_second: float) -> dict[str, Any]:
    """Return the figures of a log of `WINDOWS` lines with two saves.

    img_per_second, waiting (share of the time, 0 to 1) and ratio (loop over bare update) are those of the windows in
    which nothing was warmed up or saved; pauses are in seconds, and growth is that of resident memory in MiB from the
    first line to the last (None where the system does not say).
    """
    lines = [entry for entry in log if entry["event"] == "step"]
    saves = [entry for entry in log if entry["event"] == "saved"]
    undisturbed = lines[1:-1]
    # The windows are of equally many steps: their mean speed is a harmonic one, and their times go as its inverse.
    speed = statistics.harmonic_mean([line["img_per_second"] for line in undisturbed])
    waited = sum(line["waiting"] / line["img_per_second"] for line in undisturbed)
    first, last = (line.get("resident_gib") for line in (lines[0], lines[-1]))
    return {
        "steps": lines[-1]["step"],
        "img_per_second": speed,
        "ratio": speed / bare_img_per_second,
        "waiting": waited / sum(1 / line["img_per_second"] for line in undisturbed),
        "first_pause_seconds": saves[0]["pause_seconds"],
        "pause_seconds": saves[1]["pause_seconds"],
        "write_seconds": saves[1]["write_seconds"],
        "growth_mib": None if first is None or last is None else (last - first) * 1024,
        "growth_steps": lines[-1]["step"] - lines[0]["step"],
    }


def loop_config(config: TrainConfig, steps: int) -> TrainConfig:
    """Return a training of `WINDOWS` log lines that saves at its end; UsageError for fewer steps than that."""
    if steps < WINDOWS:
        raise UsageError(f"The training loop is measured over at least {WINDOWS} steps, or 0 to leave it out.")
    window = steps // WINDOWS
    total = window * WINDOWS
    return replace(config, steps=total, log_every=window, checkpoint_every=total, snapshot_every=total + 1, keep_last=1)


def require_room(configs: Sequence[TrainConfig], batch_sizes: Sequence[int], steps: int) -> None:
    """Raise a JLTError unless the disk has space for the largest store with two checkpoints, and steps suffice."""
    needed = 0
    for config in configs:
        network = loop_config(config, steps).network
        # Weights, two moments and the averages, twice: an old checkpoint is removed when the new one is complete.
        checkpoints = 2 * 4 * count_network(network) * (3 + len(config.ema) + len(config.power_ema))
        latents = 2 * 2 * math.prod((network.channels, network.height, network.width))
        needed = max(needed, checkpoints + latents * min(MOST_LATENTS, max(batch_sizes) * steps))
    what = "The files of the training loop (none with --loop-steps 0)"
    require_space(Path(tempfile.gettempdir()), needed, what)


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
