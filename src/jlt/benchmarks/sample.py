"""The speed of sampling, against a plain loop over the same network in the same run."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.autoencoders.load import load_autoencoder, parse_decoder
from jlt.autoencoders.pretrained import PretrainedAutoencoder
from jlt.benchmarks.rounds import time_in_turn
from jlt.config import SampleConfig, TrainConfig
from jlt.errors import JLTError
from jlt.networks.transformer import build_network, forward_flops
from jlt.prediction import velocity_from_output
from jlt.runtime.environment import default_device, matmul_rate, measured_on, peak_memory, reset_peak_memory, seconds_of
from jlt.runtime.progress import inform
from jlt.sampling.guidance import Denoiser, in_interval, rows_evaluated
from jlt.sampling.sampler import LatentSampler, Start, decode_to_uint8
from jlt.sampling.solvers import network_evaluations
from jlt.timesteps import sampling_grid

ROUNDS = 3


def benchmark_sample(config: TrainConfig, sample: SampleConfig) -> dict[str, Any]:
    """Draw batches with random weights and, in turn, with a plain loop; then decode them, each timed by itself.

    The plain loop is Heun's method with two calls of the network at every evaluation, one for each branch.
    """
    device = default_device()
    eager = _sampler(config, sample, device)
    start = eager.start(range(sample.batch_size))
    ways = {"plain": partial(plain_heun, eager, start)}
    sampler = eager
    if sample.compile:
        # The eager loop as well: compilation is no merit of the loop.
        ways["eager"] = partial(eager.flow, start)
        sampler = _sampler(config, sample, device)
        sampler.denoiser.network.compile(dynamic=False)
    ways["jlt"] = partial(sampler.flow, start)
    inform(f"sampling {sample.batch_size} images of {config.name}: {ROUNDS} rounds after one that warms up")
    reset_peak_memory(device)
    rounds = time_in_turn({name: partial(seconds_of, way, device) for name, way in ways.items()}, ROUNDS, "sampling")
    peak = peak_memory(device)
    autoencoder = _autoencoder(config, sample.decoder, device)
    latents = dataclasses.replace(sampler, config=dataclasses.replace(sample, steps=1, grid=())).flow(start)
    decode = partial(seconds_of, partial(decode_to_uint8, autoencoder, latents), device)
    decoding = time_in_turn({"decode": decode}, ROUNDS, "decoding").seconds("decode")
    dtype = torch.bfloat16 if sample.precision == "bfloat16" else torch.float32
    rows, seconds, product = rows_evaluated(sample), rounds.seconds("jlt"), matmul_rate(dtype, device)
    rate = sample.batch_size / seconds
    settings = ("batch_size", "precision", "compile", "solver", "steps", "cfg_scale")
    return {
        "name": config.name,
        **{name: getattr(sample, name) for name in settings},
        "cfg_interval": list(sample.cfg_interval),
        "nfe": network_evaluations(sample.solver, sample.steps),
        "rows_per_image": rows,
        "img_per_second": rate,
        "nfe_per_second": rate * rows,
        "img_per_second_decoded": sample.batch_size / (seconds + decoding),
        "decoded_per_second": sample.batch_size / decoding,
        "autoencoder": autoencoder.name,
        "plain_img_per_second": sample.batch_size / rounds.seconds("plain"),
        "ratio": rounds.ratio("jlt", "plain"),
        "ratio_by_round": rounds.ratios("jlt", "plain"),
        "eager_ratio": rounds.ratio("eager" if sample.compile else "jlt", "plain"),
        "matmul_gflops": product / 1e9,
        "mfu": rate * rows * forward_flops(config.network) / product,
        "peak_memory_gib": peak / 2**30,
        **measured_on(device),
    }


@torch.inference_mode()
def plain_heun(sampler: LatentSampler, start: Start) -> Float[Tensor, "n c h w"]:
    """Draw with the simplest loop: a call of the network for each branch at every evaluation, guided or not."""
    denoiser, config = sampler.denoiser, sampler.config
    null = torch.full_like(start.labels, denoiser.null_label)

    def velocity(z: Float[Tensor, "n c h w"], t: float) -> Float[Tensor, "n c h w"]:
        times = z.new_full((len(z),), t)
        v_class, v_null = (
            velocity_from_output(denoiser.prediction, denoiser.network(z, times, labels).float(), z, times)
            for labels in (start.labels, null)
        )
        return v_null + (config.cfg_scale if in_interval(t, *config.cfg_interval) else 1.0) * (v_class - v_null)

    z, grid = start.noise, sampling_grid(config)
    with torch.autocast(z.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        for t, t_next in pairwise(grid):
            v = velocity(z, t)
            if t_next < 1:
                v = (v + velocity(z + (t_next - t) * v, t_next)) / 2
            z = z + (t_next - t) * v
    return z


def _sampler(config: TrainConfig, sample: SampleConfig, device: str) -> LatentSampler:
    sizes = config.network
    network = build_network(sizes, seed=0).to(device).eval().requires_grad_(False)
    return LatentSampler(Denoiser(network, config.prediction, sizes.num_classes), sizes.latent_shape, sample, device)


def _autoencoder(config: TrainConfig, decoder: str | None, device: str) -> Autoencoder:
    """Return a decoder, NAME or NAME:PLACE; by default a model of FLUX.2's class and size with random weights."""
    if decoder:
        autoencoder = load_autoencoder(*parse_decoder(decoder), device)
    else:
        from diffusers import AutoencoderKLFlux2

        autoencoder = PretrainedAutoencoder(AutoencoderKLFlux2(), "flux2", "random weights").to(device)
    if autoencoder.channels != config.network.channels:
        raise JLTError(f"{config.name} has {config.network.channels} channels, its decoder {autoencoder.channels}.")
    return autoencoder
