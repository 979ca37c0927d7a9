"""Speed on the machine at hand: the trainer's own update, against a matrix product measured in the same run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch

from jlt.config import Precision, TrainConfig
from jlt.data.order import SampleOrder
from jlt.draws import normal_per_sample
from jlt.errors import WrongWordsError
from jlt.experiments.systems import preset
from jlt.measure import matmul_rate, peak_memory, seconds_of
from jlt.networks.flops import training_flops
from jlt.networks.transformer import Transformer, count_parameters
from jlt.processes import Alone
from jlt.protocol import default_device, machine, versions
from jlt.training.batch import split_batch
from jlt.training.draws import draw_step
from jlt.training.state import initial_state
from jlt.training.step import Stepper, float32_products

WARMUP_STEPS = 3


def benchmark_train(name: str, batch_size: int, steps: int, precision: Precision, compile: bool) -> dict[str, Any]:
    """Measure training steps of a named network on random latents; times are medians over `steps` steps.

    The step is the trainer's: forward, loss, backward, clipping, AdamW and all averages. MFU divides its arithmetic, by
    the usual count of three forwards, by the rate of the best of several matrix products before and after.
    """
    if steps < 1:
        raise WrongWordsError("A benchmark needs at least one measured step.")
    device = default_device()
    prediction, network = preset(name)
    config = TrainConfig(
        name=name, prediction=prediction, network=network, batch_size=batch_size, precision=precision, compile=compile
    )
    step = trainer_step(config, device)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with float32_products(precision):
        rate = matmul_rate(dtype, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        warmup = sum(seconds_of(step, device) for _ in range(WARMUP_STEPS))
        seconds = statistics.median(seconds_of(step, device) for _ in range(steps))
        memory = peak_memory(device)
        rate = max(rate, matmul_rate(dtype, device))
    flops = training_flops(network)
    with torch.device("meta"):
        parameters = count_parameters(Transformer(network))
    return {
        "preset": name,
        "batch_size": batch_size,
        "precision": precision,
        "compile": compile,
        "steps": steps,
        "parameters": parameters,
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


def trainer_step(config: TrainConfig, device: str) -> Callable[[], None]:
    """Return a function that makes one of the trainer's updates on random latents."""
    network = config.network
    state = initial_state(config, device)
    stepper = Stepper(config, state, split_batch(config, 1), Alone())
    shape = (network.channels, network.height, network.width)
    latents = normal_per_sample(range(config.batch_size), shape, device)
    labels = torch.arange(config.batch_size) % network.num_classes
    draws = draw_step(config, SampleOrder(config.batch_size, 0), 0)

    def step() -> None:
        stepper.apply(stepper.differentiate(draws, latents, labels, asked=False))
        state.ema.update(state.step)

    return step
