"""What the network predicts, and how a velocity is read out of it (eq. 2-4).

A prediction is a target y that mixes the clean latent and the noise by two functions of time (eq. 2):

    y = alpha x + beta eps        x: 1, 0    eps: 0, 1    v: 1, -1

At fixed z and t every such target is an affine function of the velocity, of slope m (eq. 3, 4):

    y = (alpha + beta) z + m v        m = (1-t) alpha - t beta        v^ = (o - (alpha + beta) z) / m

o is the network's output. A readout divides by m, so it is singular where m vanishes: x-prediction at t = 1,
eps-prediction at t = 0. t_eps clamps it there. Other symbols as in `jlt.path`.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from jlt.config import Prediction, parse_prediction
from jlt.path import PathSample, Time, expand_time

Times = TypeVar("Times", float, np.ndarray, Tensor)


def mixture(prediction: Prediction, t: Times) -> tuple[Times | float, Times | float]:
    """Return alpha and beta of eq. 2 at times in [0, 1]; JLTError for an unknown prediction.

    `skip=s` begins at x (s = 0), passes EDM's preconditioning for data of unit variance (s = 1; Karras et al. 2022,
    table 1), and tends to the noise. `mix=r` is x - r eps: it begins at x (r = 0) and passes the velocity (r = 1).
    """
    family, value = parse_prediction(prediction)
    if family == "skip":
        length = ((1 - t) ** 2 + (value * t) ** 2) ** 0.5
        return (1 - t) / length, -(value**2) * t / length
    if family == "mix":
        return 1.0, -value
    return 0.0, 1.0


def slope(prediction: Prediction, t: Times) -> Times:
    """Return m = (1-t) alpha - t beta, the factor by which an error of the velocity becomes one of the output."""
    alpha, beta = mixture(prediction, t)
    return alpha - t * (alpha + beta)


def target(prediction: Prediction, sample: PathSample) -> Float[Tensor, "batch *rest"]:
    """Return what a network of this prediction should output for the sample (eq. 2)."""
    alpha, beta = mixture(prediction, sample.t)
    return expand_time(alpha, sample.x) * sample.x + expand_time(beta, sample.x) * sample.eps


def readout_gain(prediction: Prediction, t: Float[Tensor, "batch"], t_eps: float = 0.0) -> Float[Tensor, "batch"]:
    """Return dv^/do of eq. 3, 1 / m with |m| clamped: an error of the output times it is an error of the velocity."""
    # The slope of a prediction has one sign at all times.
    sign = math.copysign(1.0, slope(prediction, 0.5))
    return sign / (sign * slope(prediction, t)).clamp_min(t_eps)


def velocity_from_output(
    prediction: Prediction,
    output: Float[Tensor, "batch *rest"],
    z: Float[Tensor, "batch *rest"],
    t: Float[Tensor, "batch"],
    t_eps: float = 0.0,
) -> Float[Tensor, "batch *rest"]:
    """Eq. 3: read the velocity out of a network's output o; t_eps in [0, 1) clamps the division."""
    alpha, beta = mixture(prediction, t)
    return expand_time(readout_gain(prediction, t, t_eps), z) * (output - expand_time(alpha + beta, z) * z)


def clean_from_velocity(
    v: Float[Tensor, "batch *rest"], z: Float[Tensor, "batch *rest"], t: Time
) -> Float[Tensor, "batch *rest"]:
    """Eq. 4: x^ = z + (1 - t) v^."""
    return z + (1 - expand_time(t, z)) * v
