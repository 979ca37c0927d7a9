"""The denoising loss in any of three spaces for any of three predictions (eq. 5).

Every space and prediction is an affine function of the network's output o for fixed z and t, so the error in space s is
a time-dependent factor times the output's own error o - y, y the target. The loss is therefore computed there, where it
is well conditioned, and the nine cells and two weightings are nine factors each:

    error_s = space_gain_s(t) * readout_gain_p(t) * (o - y)

Symbols as in `jlt.path` and `jlt.prediction`; p is the prediction and s the loss space.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from jlt.config import LossConfig, LossSpace, Prediction
from jlt.path import PathSample
from jlt.prediction import readout_gain, target


def space_gain(space: LossSpace, t: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """Return ds^/dv^ of eq. 4: how an error of the velocity appears in a space."""
    return {"x": 1 - t, "eps": -t, "v": torch.ones_like(t)}[space]


def error_gain(prediction: Prediction, t: Float[Tensor, "batch"], config: LossConfig) -> Float[Tensor, "batch"]:
    """Return the factor g(t) with which the loss is the mean of (g (o - y))^2.

    `published` clamps a readout that divides and leaves everything else alone; an output that is already in the
    loss space is compared as it is. `matched` multiplies the exact velocity error of every prediction by the same
    sqrt(w(t)) of eq. 5. Its factors stay finite at t = 0 and t = 1 because w vanishes where a readout is singular.
    """
    if config.weighting == "published":
        if prediction == config.space:
            return torch.ones_like(t)
        return space_gain(config.space, t) * readout_gain(prediction, t, config.t_eps)
    noise_left, data_share = (1 - t).clamp_min(config.t_eps), t.clamp_min(config.t_eps)
    # readout_gain without clamp times (1-t)/noise_left * t/data_share, its division cancelled.
    gain = {
        "x": t / (noise_left * data_share),
        "eps": (t - 1) / (noise_left * data_share),
        "v": (1 - t) * t / (noise_left * data_share),
    }[prediction]
    return space_gain(config.space, t) * gain


def denoising_loss(
    prediction: Prediction, output: Float[Tensor, "batch *rest"], sample: PathSample, config: LossConfig
) -> Float[Tensor, "batch"]:
    """Eq. 5: the loss of each sample of the batch, the mean over its elements of w(t) (o_s - y_s)^2."""
    squared = (output - target(prediction, sample)).square().flatten(1).mean(dim=1)
    return error_gain(prediction, sample.t, config).square() * squared
