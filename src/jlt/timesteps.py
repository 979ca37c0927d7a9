"""Times: the distribution that training draws them from (eq. 6), and the grids that samplers walk."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from jlt.config import SampleConfig, TimestepConfig


def shift_time(t: Float[Tensor, "*shape"], shift: float) -> Float[Tensor, "*shape"]:
    """Eq. 6: t -> t / (t + a (1 - t)), a = shift > 0; a > 1 moves times towards the noise."""
    return t / (t + shift * (1 - t))


def half_log_snr(t: float) -> float:
    """Return half the logarithm of the signal-to-noise ratio, log t/(1-t), infinite at t = 0 and t = 1."""
    if t <= 0:
        return -math.inf
    return math.log(t / (1 - t)) if t < 1 else math.inf


def times_from_uniform(u: Float[Tensor, "*shape"], config: TimestepConfig) -> Float[Tensor, "*shape"]:
    """Map uniform numbers in (0, 1) to training times by the inverse distribution function (eq. 6)."""
    if config.distribution == "logit_normal":
        u = torch.sigmoid(config.P_mean + config.P_std * torch.special.ndtri(u))
    elif config.distribution == "half_cauchy":
        # The odds t/(1-t) are tan(pi u / 2).
        opposite, adjacent = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
        u = opposite / (opposite + adjacent)
    return shift_time(u, config.shift)


def time_density(t: Float[Tensor, "*shape"], config: TimestepConfig) -> Float[Tensor, "*shape"]:
    """Return the density p(t) of the training times at t in (0, 1)."""
    # The shift is a Moebius map; its inverse has parameter 1 / a, and du/dt = a / (a t + 1 - t)^2.
    a = config.shift
    u = shift_time(t, 1 / a)
    jacobian = a / (a * t + 1 - t).square()
    if config.distribution == "uniform":
        return jacobian
    if config.distribution == "half_cauchy":
        return jacobian * 2 / math.pi / (u.square() + (1 - u).square())
    n = (torch.logit(u) - config.P_mean) / config.P_std
    normal = torch.exp(-n.square() / 2) / math.sqrt(2 * math.pi)
    return jacobian * normal / (config.P_std * u * (1 - u))


def uniform_grid(steps: int, shift: float = 1.0) -> Float[Tensor, "steps_plus_1"]:
    """Return steps + 1 float64 times from 0 to 1, equally spaced (eq. 8) and then shifted (eq. 6)."""
    # A quotient is correctly rounded, so that t = 0.1 on a grid of 50 is the same 0.1 that bounds an interval.
    return shift_time(torch.arange(steps + 1, dtype=torch.float64) / steps, shift)


def sampling_grid(config: SampleConfig) -> list[float]:
    """Return the times that a sampler walks: the explicit ones, or equally spaced and shifted."""
    return list(config.grid) or uniform_grid(config.steps, config.shift).tolist()
