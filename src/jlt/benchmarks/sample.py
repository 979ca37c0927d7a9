"""The speed of sampling, against a plain loop over the same network in the same run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.autoencoders.load import load_autoencoder
from jlt.autoencoders.pretrained import Pretrained
from jlt.config import SampleConfig, TrainConfig
from jlt.errors import JLTError
from jlt.networks.flops import forward_flops
from jlt.networks.transformer import build_network
from jlt.prediction import velocity_from_output
from jlt.runtime.environment import default_device, machine, versions
from jlt.runtime.progress import inform, track
from jlt.runtime.timing import matmul_rate, peak_memory, reset_peak_memory, seconds_of
from jlt.sampling.generate import LatentSampler, Start, decode_to_uint8
from jlt.sampling.guidance import Denoiser, rows_evaluated
from jlt.sampling.solvers import network_evaluations
from jlt.timesteps import sampling_grid

ROUNDS = 3


def benchmark_sample(config: TrainConfig, sample: SampleConfig, autoencoder_path: str | None) -> dict[str, Any]:
    """Draw batches with random weights and, in turn, with a plain loop; then decode them, each timed by itself.

    The plain loop is Heun's method with two calls of the network at every evaluation, one for each branch.
    """
    device = default_device()
    denoiser = _denoiser(config, device)
    noise, labels = _inputs(config, sample, device)
    compiled = _denoiser(config, device) if sample.compile else denoiser
    if sample.compile:
        compiled.network.compile(dynamic=False)
    inform(f"sampling {sample.batch_size} images of {config.name}: {ROUNDS} rounds after one that warms up")
    ways: dict[str, Callable[[], Any]] = {
        "jlt": lambda: flow(compiled, noise, labels, sample),
        "plain": lambda: plain_heun(denoiser, noise, labels, sample),
    }
    if sample.compile:
        # What compilation gives is no merit of the loop.
        ways["eager"] = lambda: flow(denoiser, noise, labels, sample)
    reset_peak_memory(device)
    rounds = [
        {name: seconds_of(way, device) for name, way in ways.items()} for _ in track(range(1 + ROUNDS), "sampling")
    ][1:]
    peak = peak_memory(device)
    autoencoder = _autoencoder(config, autoencoder_path, device)
    latents = flow(compiled, noise, labels, dataclasses.replace(sample, steps=1, grid=()))
    decode_to_uint8(autoencoder, latents)
    decoding = statistics.median(
        seconds_of(lambda: decode_to_uint8(autoencoder, latents), device) for _ in range(ROUNDS)
    )
    seconds = {name: statistics.median(round_[name] for round_ in rounds) for name in ways}
    dtype = torch.bfloat16 if sample.precision == "bfloat16" else torch.float32
    eager = "eager" if sample.compile else "jlt"
    rows = rows_evaluated(sample)
    rate, product = sample.batch_size / seconds["jlt"], matmul_rate(dtype, device)
    return {
        "name": config.name,
        "batch_size": sample.batch_size,
        "precision": sample.precision,
        "compile": sample.compile,
        "solver": sample.solver,
        "steps": sample.steps,
        "cfg_scale": sample.cfg_scale,
        "cfg_interval": list(sample.cfg_interval),
        "nfe": network_evaluations(sample.solver, sample.steps),
        "rows_per_image": rows,
        "img_per_second": rate,
        "nfe_per_second": rate * rows,
        "img_per_second_decoded": sample.batch_size / (seconds["jlt"] + decoding),
        "decoded_per_second": sample.batch_size / decoding,
        "autoencoder": autoencoder.name,
        "plain_img_per_second": sample.batch_size / seconds["plain"],
        "ratio": statistics.median(round_["plain"] / round_["jlt"] for round_ in rounds),
        "ratio_by_round": [round_["plain"] / round_["jlt"] for round_ in rounds],
        "eager_ratio": statistics.median(round_["plain"] / round_[eager] for round_ in rounds),
        "matmul_gflops": product / 1e9,
        "mfu": rate * rows * forward_flops(config.network) / product,
        "peak_memory_gib": peak / 2**30,
        "machine": machine(device),
        "versions": versions(),
    }


@torch.inference_mode()
def plain_heun(
    denoiser: Denoiser, noise: Float[Tensor, "n c h w"], labels: Int[Tensor, "n"], sample: SampleConfig
) -> Float[Tensor, "n c h w"]:
    """Draw as one writes it first: a call of the network for each branch at every evaluation, guided or not."""
    null, (low, high) = torch.full_like(labels, denoiser.null_label), sample.cfg_interval

    def velocity(z: Float[Tensor, "n c h w"], t: float) -> Float[Tensor, "n c h w"]:
        times = z.new_full((len(z),), t)
        v_class, v_null = (
            velocity_from_output(denoiser.prediction, denoiser.network(z, times, y).float(), z, times)
            for y in (labels, null)
        )
        scale = sample.cfg_scale if t < high and (low == 0 or t > low) else 1.0
        return v_null + scale * (v_class - v_null)

    z, grid = noise, sampling_grid(sample)
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=sample.precision == "bfloat16"):
        for t, t_next in pairwise(grid):
            v = velocity(z, t)
            if t_next < 1:
                v = (v + velocity(z + (t_next - t) * v, t_next)) / 2
            z = z + (t_next - t) * v
    return z


def _denoiser(config: TrainConfig, device: str) -> Denoiser:
    network = build_network(config.network, seed=0).to(device).eval().requires_grad_(False)
    return Denoiser(network, config.prediction, config.network.num_classes)


def _inputs(
    config: TrainConfig, sample: SampleConfig, device: str
) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, "n"]]:
    network, numbers = config.network, range(sample.batch_size)
    noise, _ = noise_of(sample.seed, numbers, (network.channels, network.height, network.width), device, 1.0)
    return noise, torch.arange(sample.batch_size, device=device) % network.num_classes


def _autoencoder(config: TrainConfig, path: str | None, device: str) -> Autoencoder:
    """Return the FLUX.2 autoencoder at a path; without one a model of its class and size with random weights."""
    if path:
        autoencoder = load_autoencoder("flux2", path, device)
    else:
        from diffusers import AutoencoderKLFlux2

        from jlt.autoencoders.flux2 import Flux2Autoencoder

        autoencoder = Flux2Autoencoder(Pretrained(AutoencoderKLFlux2(), "random weights", None), "flux2").to(device)
    if autoencoder.channels != config.network.channels:
        raise JLTError(f"{config.name} has {config.network.channels} channels, its decoder {autoencoder.channels}.")
    return autoencoder
