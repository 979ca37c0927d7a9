"""What the network predicts, and how a velocity is read out of it (eq. 3-4). Velocity is the hub of all conversions.

Symbols as in `jlt.path`; o is the network's output and t_eps the clamp of its readout. A readout without clamp is exact
but singular at one end of the path: x-prediction at t = 1, eps-prediction at t = 0.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from jlt.config import Prediction
from jlt.path import PathSample, Time, expand_time


def target(prediction: Prediction, sample: PathSample) -> Float[Tensor, "batch *rest"]:
    """Return what a network of this prediction should output for the sample."""
    return {"x": sample.x, "eps": sample.eps, "v": sample.v}[prediction]


def readout_gain(prediction: Prediction, t: Float[Tensor, "batch"], t_eps: float = 0.0) -> Float[Tensor, "batch"]:
    """Return dv^/do of eq. 3: the factor by which an error of the output becomes an error of the velocity."""
    if prediction == "x":
        return 1 / (1 - t).clamp_min(t_eps)
    if prediction == "eps":
        return -1 / t.clamp_min(t_eps)
    return t.new_ones(t.shape)


def velocity_from_output(
    prediction: Prediction,
    output: Float[Tensor, "batch *rest"],
    z: Float[Tensor, "batch *rest"],
    t: Float[Tensor, "batch"],
    t_eps: float = 0.0,
) -> Float[Tensor, "batch *rest"]:
    """Eq. 3: read the velocity out of a network's output o; t_eps in [0, 1) clamps the division."""
    if prediction == "v":
        return output
    return expand_time(readout_gain(prediction, t, t_eps), output) * (output - z)


def clean_from_velocity(
    v: Float[Tensor, "batch *rest"], z: Float[Tensor, "batch *rest"], t: Time
) -> Float[Tensor, "batch *rest"]:
    """Eq. 4: x^ = z + (1 - t) v^."""
    return z + (1 - expand_time(t, z)) * v
