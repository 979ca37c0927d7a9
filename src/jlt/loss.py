"""The denoising loss in the space of any prediction, for any prediction (eq. 5).

Every space and prediction is an affine function of the network's output o for fixed z and t, so the error in space s is
a time-dependent factor times the output's own error o - y, y the target. The loss is therefore computed there, where it
is well conditioned, and every combination of prediction, space and weighting is one factor:

    error_s = m_s(t) / m_p(t) * (o - y)

m is the slope of eq. 3, p the prediction and s the loss space.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from jlt.config import LossConfig, Prediction
from jlt.path import PathSample
from jlt.prediction import readout_gain, slope, target

MIN_SNR = 5.0
"""Signal-to-noise ratio from which on `min_snr` no longer grows (Hang et al. 2023, arXiv 2303.09556)."""


def error_gain(prediction: Prediction, t: Float[Tensor, "batch"], config: LossConfig) -> Float[Tensor, "batch"]:
    """Return the factor g(t) with which the loss is the mean of (g (o - y))^2.

    `published` clamps a readout that divides and leaves everything else alone; an output that is already in the
    loss space is compared as it is. The others multiply the exact velocity error of every prediction by the same
    sqrt(w(t)) of eq. 5, so their factors stay finite at t = 0 and t = 1, where a readout is singular.
    """
    if config.weighting == "published":
        if prediction == config.space:
            return torch.ones_like(t)
        return slope(config.space, t) * readout_gain(prediction, t, config.t_eps)
    # Zero over zero is its limit: the factors are smooth, and the nearest float stands for either end.
    t = t.clamp(torch.finfo(t.dtype).tiny, 1 - torch.finfo(t.dtype).eps)
    noise_left, data_share = (1 - t).clamp_min(config.t_eps), t.clamp_min(config.t_eps)
    # The exact error times (1-t)/noise_left * t/data_share, the one that cancels m first.
    exact = t * ((1 - t) / slope(prediction, t)) / (noise_left * data_share)
    if config.weighting == "min_snr":
        exact = exact * (t / (1 - t)).clamp_max(MIN_SNR**0.5) * (1 - t)
    return slope(config.space, t) * exact


def denoising_loss(
    prediction: Prediction, output: Float[Tensor, "batch *rest"], sample: PathSample, config: LossConfig
) -> Float[Tensor, "batch"]:
    """Eq. 5: the loss of each sample of the batch, the mean over its elements of w(t) (o_s - y_s)^2."""
    squared = (output - target(prediction, sample)).square().flatten(1).mean(dim=1)
    return error_gain(prediction, sample.t, config).square() * squared
