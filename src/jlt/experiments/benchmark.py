"""Speed on the machine at hand: the trainer's own update, against a matrix product measured in the same run."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from jlt.config import TrainConfig
from jlt.draws import normal_per_sample
from jlt.errors import WrongWordsError
from jlt.experiments.systems import preset
from jlt.hardware import matmul_rate, seconds_of
from jlt.networks.flops import training_flops
from jlt.networks.transformer import count_parameters
from jlt.protocol import default_device, machine, versions
from jlt.training.loop import initial_state, update

WARMUP_STEPS = 3


def benchmark_train(
    name: str, batch_size: int, steps: int, precision: Literal["float32", "bfloat16"], compile: bool
) -> dict[str, Any]:
    """Measure training steps of a named network on random latents; times are medians over `steps` steps.

    The step is the trainer's: forward, loss, backward, clipping, AdamW and two EMAs. MFU divides its arithmetic, by the
    usual count of three forwards, by the rate of the best of several matrix products before and after.
    """
    device = default_device()
    prediction, network = preset(name)
    config = TrainConfig(
        name=name, prediction=prediction, network=network, batch_size=batch_size, precision=precision, compile=compile
    )
    state = initial_state(config, torch.device(device))
    forward: Callable[..., torch.Tensor] = torch.compile(state.network) if compile else state.network
    shape = (network.channels, network.height, network.width)
    x, eps = (normal_per_sample(range(start, start + batch_size), shape, device) for start in (0, batch_size))
    labels = torch.arange(batch_size, device=device) % network.num_classes
    t = torch.linspace(0.05, 0.95, batch_size)

    def step() -> None:
        update(config, state, forward, x, eps, labels, t)

    if steps < 1:
        raise WrongWordsError("A benchmark needs at least one measured step.")
    dtype = getattr(torch, precision)
    rate = matmul_rate(dtype, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warmup = sum(seconds_of(step, device) for _ in range(WARMUP_STEPS))
    seconds = statistics.median(seconds_of(step, device) for _ in range(steps))
    memory = peak_memory(device)
    rate = max(rate, matmul_rate(dtype, device))
    flops = training_flops(network)
    return {
        "preset": name,
        "batch_size": batch_size,
        "precision": precision,
        "compile": compile,
        "steps": steps,
        "parameters": count_parameters(state.network),
        "network": dataclasses.asdict(network),
        "img_per_second": batch_size / seconds,
        "seconds_per_step": seconds,
        "gflop_per_image": flops / 1e9,
        "gflops": flops * batch_size / seconds / 1e9,
        "matmul_gflops": rate / 1e9,
        "mfu": flops * batch_size / seconds / rate,
        "peak_memory_gib": memory / 2**30,
        "warmup_seconds": warmup,
        "threads": torch.get_num_threads(),
        "machine": machine(device),
        "versions": versions(),
    }


def peak_memory(device: str) -> int:
    """Return the peak memory in bytes: of the GPU where there is one, of the process elsewhere."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Rather than getrusage, whose figure a process on Linux inherits from the one that started it.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
