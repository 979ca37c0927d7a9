"""Samples of a network against the data, along the directions of tokens and by spatial frequency.

Where the samples vary less or more than the data, the variance of the states on the network's own trajectories, over
that of the path at the same time (eq. 1), shows when it was lost or gained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.geometry.assemble import rows
from jlt.geometry.covariance import StationaryCovariance, multiplicity
from jlt.patches import patchify, unpatchify
from jlt.results.geometry import DecoderSensitivity, SampleSpectrum
from jlt.runtime.processes import Group, stop_together
from jlt.runtime.progress import bar
from jlt.runtime.random_numbers import normal_per_sample
from jlt.sampling.sampler import LatentSampler, batches_of
from jlt.timesteps import sampling_grid

SHOWN_TIMES = 10
"""Times before the last at which the states are measured, at most."""
PERTURBED_DIRECTIONS = 32
PERTURBATION = 0.1
"""Standard deviation of the noise along a direction: small, so that the decoder is nearly linear."""


@dataclass(frozen=True)
class Directions:
    """The eigen-directions of the data's tokens as columns, the variances along them, and the scale of the noise."""

    patch_size: int
    noise_scale: float
    eigenvalues: Float64[np.ndarray, " d"]
    vectors: Float64[Tensor, "d d"]

    def components(self, latents: Float[Tensor, "n c h w"]) -> Float64[Tensor, "n k d"]:
        """Return the components of every token of some latents along the directions."""
        return patchify(latents.double(), self.patch_size) @ self.vectors.to(latents.device)


class States:
    """Sums over the states of sampling trajectories: along directions at some times, by frequency at the end."""

    def __init__(self, times: list[float], directions: Directions, latent: tuple[int, int, int]) -> None:
        self.times, self.directions, self.tokens = times, directions, 0
        self.sums = torch.zeros(len(times) + 1, 2, len(directions.eigenvalues), dtype=torch.float64)
        self.frequencies = StationaryCovariance(*latent)

    def update(self, states: Mapping[float, Float[Tensor, "n c h w"]], samples: Float[Tensor, "n c h w"]) -> None:
        """Add the states of a batch at all times, and the samples at time 1."""
        for place, state in enumerate([*(states[t] for t in self.times), samples]):
            components = self.directions.components(state).flatten(0, 1)
            self.sums[place] += torch.stack((components.sum(0), components.square().sum(0))).cpu()
        self.tokens += len(components)
        self.frequencies.update(samples)

    def merge(self, other: States) -> None:
        """Add the states of another process."""
        self.sums += other.sums
        self.tokens += other.tokens
        self.frequencies.merge(other.frequencies)

    def spectrum(self, data: StationaryCovariance, steps: int) -> SampleSpectrum:
        """Return the variances over those of the path, whose end is the data."""
        mean, square = (self.sums / self.tokens).unbind(1)
        times = np.array([*self.times, 1.0])
        lam = np.maximum(self.directions.eigenvalues, np.finfo(np.float64).tiny)
        path = times[:, None] ** 2 * lam + (1 - times[:, None]) ** 2 * self.directions.noise_scale**2
        return SampleSpectrum(
            count=self.frequencies.images,
            steps=steps,
            times=tuple(times.tolist()),
            spread=rows((square - mean.square()).numpy() / path),
            by_frequency=tuple((variance_by_frequency(self.frequencies) / variance_by_frequency(data)).tolist()),
        )


def variance_by_frequency(covariance: StationaryCovariance) -> Float64[np.ndarray, " r"]:
    """Return the variance of whole latents in rings of spatial frequency, by whole cycles per latent."""
    height, width = covariance.shape[1:]
    vertical = np.minimum(np.arange(height), height - np.arange(height))
    ring = np.rint(np.hypot(vertical[:, None], np.arange(width // 2 + 1))).astype(int).ravel()
    power = covariance.scatter.diagonal(dim1=-2, dim2=-1).real.sum(-1).cpu().numpy() / (covariance.images - 1)
    return np.bincount(ring, power * multiplicity(height, width))


@torch.inference_mode()
def sampled_states(sampler: LatentSampler, directions: Directions, group: Group) -> States | None:
    """Draw the samples of a network and sum their states; the processes share them, and the first returns all.

    The others return None. Stopped on request.
    """
    grid, shape = sampling_grid(sampler.config)[:-1], sampler.shape
    times = grid[:: -(-len(grid) // SHOWN_TIMES)]
    found = States(times, directions, (shape.channels, shape.height, shape.width))
    numbers, seen = batches_of(sampler.config.num, sampler.config.batch_size), group.begin()
    with stop_together(group) as until_stopped, bar("sampling", sampler.config.num) as shown:
        for indices in until_stopped(numbers[group.rank :: group.size]):
            states: dict[float, Tensor] = {}

            def keep(t: float, z: Tensor, clean: Tensor, states: dict[float, Tensor] = states) -> None:  # noqa: ARG001
                # The last state at a time is the one on the trajectory.
                if t in times:
                    states[t] = z

            samples = sampler.flow(sampler.start(indices), observe=keep)
            found.update(states, samples)
            shown.show(group.add(seen, len(indices)))
    return group.reduce_to_rank0(found, States.merge)


@torch.inference_mode()
def decoder_sensitivity(
    autoencoder: Autoencoder, latents: Float[Tensor, "n c h w"], directions: Directions, seed: int = 0
) -> DecoderSensitivity:
    """Return how much images change with small noise along some directions in every token of these latents."""
    dimension, (height, width) = len(directions.eigenvalues), latents.shape[2:]
    tokens = height * width // directions.patch_size**2
    noise = PERTURBATION * normal_per_sample(range(seed, seed + len(latents)), (tokens, 1), "cpu")
    chosen = np.unique(np.linspace(0, dimension - 1, PERTURBED_DIRECTIONS).round().astype(int)).tolist()
    images, change = autoencoder.decode(latents), []
    for direction in chosen:
        moved = unpatchify(noise * directions.vectors[:, direction].float(), directions.patch_size, height, width)
        difference = autoencoder.decode(latents + moved.to(latents.device)) - images
        change.append(difference.double().square().mean().item() / PERTURBATION**2)
    return DecoderSensitivity(tuple(chosen), tuple(change))
