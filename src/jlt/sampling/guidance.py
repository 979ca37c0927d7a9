"""Velocities out of networks: the readout (eq. 3) and classifier-free guidance (eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jlt.config import Prediction, SampleConfig
from jlt.prediction import slope, velocity_from_output
from jlt.sampling.solvers import State, Velocity, evaluated_times
from jlt.timesteps import sampling_grid

NOISE_END = 0.02
"""The earliest time at which a noise prediction is evaluated: sampling begins at t = 0, where its readout is 0 / 0.

The noise of t = 0 is taken for the z of this time. On grids of up to 50 equal steps this changes the first evaluation
and no other.
"""


@dataclass(frozen=True)
class Denoiser:
    """A network with the meaning of its output: what turns (z, t, labels) into a velocity."""

    network: nn.Module
    prediction: Prediction
    null_label: int
    t_eps: float = 0.0

    def velocity(self, z: State, t: float | Float[Tensor, "b"], labels: Int[Tensor, "b"]) -> State:
        """Return v^ at one time t for the whole batch, or at one for each sample (eq. 3), in z's precision."""
        times = t.to(z) if isinstance(t, Tensor) else z.new_full((len(z),), t)
        if slope(self.prediction, 0.0) == 0:
            times = times.clamp_min(NOISE_END)
        output = self.network(z, times, labels).to(z.dtype)
        return velocity_from_output(self.prediction, output, z, times, self.t_eps)


def in_interval(t: float, low: float, high: float) -> bool:
    """Eq. 7: t < high and (low == 0 or t > low)."""
    return t < high and (low == 0 or t > low)


def guided(
    denoiser: Denoiser,
    labels: Int[Tensor, "b"],
    cfg_scale: float,
    cfg_interval: tuple[float, float],
    guide: Denoiser | None = None,
) -> Velocity:
    """Return the velocity of eq. 7 for these labels; no branch runs where it has no effect.

    The null class shares a forward with the labels. A `guide`, a weaker network for the same labels, takes its place
    in autoguidance (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself").
    """
    null = torch.full_like(labels, denoiser.null_label)

    def velocity(z: State, t: float) -> State:
        if cfg_scale == 1 or not in_interval(t, *cfg_interval):
            return denoiser.velocity(z, t, labels)
        if cfg_scale == 0:
            return guide.velocity(z, t, labels) if guide else denoiser.velocity(z, t, null)
        if guide is not None:
            v_class, v_null = denoiser.velocity(z, t, labels), guide.velocity(z, t, labels)
        else:
            v_class, v_null = denoiser.velocity(torch.cat((z, z)), t, torch.cat((labels, null))).chunk(2)
        return v_null + cfg_scale * (v_class - v_null)

    return velocity


def rows_evaluated(config: SampleConfig) -> int:
    """Return how many rows a network evaluates per image: its NFE, with both branches where both run."""
    times = evaluated_times(config.solver, sampling_grid(config))
    both = config.cfg_scale not in (0, 1)
    return sum(2 if both and in_interval(t, *config.cfg_interval) else 1 for t in times)
