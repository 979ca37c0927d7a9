"""What a predictor of limited rank loses when its output is read as a velocity (eq. 13).

At a time t the best linear predictor of a target multiplies each eigen-direction of z by a coefficient (eq. 10). One of
rank r keeps r directions and outputs 0 in the others: it loses the explained power (eq. 12) of those it drops, times
the weight that the loss gives to an error of the output. For a loss in velocity space without clamp (eq. 3) that is

    1 / (1-t)^2  for x,    1 / t^2  for eps,    1  for v.

Averaged over the training times p(t) this is the capacity curve: the excess risk, summed over directions, at ranks
0..d. A clamp and a loss in x- or noise-space change the weights as eq. 5 does.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float64

from jlt.config import LossConfig, Prediction, TimestepConfig
from jlt.geometry.gaussian import Array, conditional_variance, explained_power, target_variance
from jlt.geometry.spectrum import Spectrum
from jlt.loss import error_gain
from jlt.results.geometry import TrainingModel
from jlt.timesteps import time_density

NODES = 48
"""Points of Gauss and Legendre's rule on each piece of the times."""
NORMAL_REACH = 9.0
"""Standard deviations beyond which a normal density is nothing in float64."""
LOGISTIC_REACH = 36.0
"""Logits beyond which a time is 0 or 1 in float64, and the density of uniform times is nothing."""

Curve = Float64[np.ndarray, " d_plus_1"]


@dataclass(frozen=True)
class TimeQuadrature:
    """Training times with probabilities that add up to one, and the loss that weighs errors at them."""

    t: Float64[np.ndarray, " n"]
    probability: Float64[np.ndarray, " n"]
    loss: LossConfig

    def average(self, values: Float64[np.ndarray, "n *rest"]) -> Array:
        """Average over p(t) values that are given at every time."""
        return np.asarray(np.tensordot(self.probability, values, axes=1))

    def loss_weight(self, prediction: Prediction) -> Float64[np.ndarray, "n 1"]:
        """Return the weight that the loss gives to a squared error of the output, at every time (eq. 5)."""
        return error_gain(prediction, torch.from_numpy(self.t), self.loss).square().numpy()[:, None]


@functools.cache
def training_times(model: TrainingModel) -> TimeQuadrature:
    """Return a quadrature of p(t) (eq. 6): Gauss and Legendre's rule over the logit, cut where eq. 3 and 5 are clamped.

    The loss is the matched one in the model's space.
    """
    low, high = _logit_range(model.timesteps)
    clamps = [math.log(t / (1 - t)) for t in (model.t_eps, 1 - model.t_eps) if 0 < t < 1]
    cuts = sorted({low, *(cut for cut in (*clamps, (low + high) / 2) if low < cut < high), high})
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    pieces = [(start, (end - start) / 2) for start, end in pairwise(cuts)]
    logit = torch.from_numpy(np.concatenate([start + half * (nodes + 1) for start, half in pieces]))
    # At a time of exactly 1 a direction without variance has no regression.
    t = logit.sigmoid().clamp_max(1 - sys.float_info.epsilon)
    # dt/dlogit = t (1-t).
    density = (time_density(t, model.timesteps) * t * (1 - t)).numpy()
    weight = np.concatenate([half * weights for _, half in pieces]) * density
    # The smallest float clamps nothing; a LossConfig has no 0.
    loss = LossConfig(model.loss_space, "matched", model.t_eps or sys.float_info.min)
    return TimeQuadrature(t.numpy(), weight / weight.sum(), loss)


def _logit_range(config: TimestepConfig) -> tuple[float, float]:
    """Return logits of t beyond which p(t) is nothing, even times a function that grows as 1 / (1-t)^2 or 1 / t^2."""
    low, high, shift = -LOGISTIC_REACH, LOGISTIC_REACH, math.log(config.shift)
    if config.distribution == "logit_normal":
        reach = NORMAL_REACH * config.P_std + 2 * config.P_std**2
        low, high = max(config.P_mean - reach, low), min(config.P_mean + reach, high)
    return low - shift, high - shift


def direction_risk(prediction: Prediction, lam: Spectrum, times: TimeQuadrature) -> Float64[np.ndarray, "n d"]:
    """Return the excess risk of an output of 0 in a direction, at every time and for every eigenvalue."""
    return explained_power(prediction, lam, times.t[:, None]) * times.loss_weight(prediction)


def capacity_curve(prediction: Prediction, lam: Spectrum, times: TimeQuadrature, shared: bool = False) -> Curve:
    """Return the excess risk, summed over d directions, of the best predictor of each rank 0..d (eq. 13).

    It may choose other directions at every time, which only velocity makes use of; with `shared` they are the same at
    all times, as behind a bottleneck that does not know the time.
    """
    risk = direction_risk(prediction, lam, times)
    kept_first = np.sort(times.average(risk))[::-1] if shared else times.average(np.sort(risk, axis=1)[:, ::-1])
    return np.concatenate([np.cumsum(kept_first[::-1])[::-1], [0.0]])


def width_floor(prediction: Prediction, lam: Spectrum, times: TimeQuadrature, width: int) -> float:
    """Return the risk, on the curve's scale, that no network of a width goes below, whatever its depth or training.

    Its last layer is linear, so its outputs lie in one affine subspace of `width` dimensions. Outside of that the error
    is the whole variance of the target (eq. 9). 0 for a width of a token's size or more.
    """
    dropped = times.average(target_variance(prediction, lam) * times.loss_weight(prediction))
    return float(np.sort(dropped)[: max(0, len(lam) - width)].sum())


def unavoidable_risk(lam: Spectrum, times: TimeQuadrature) -> float:
    """Return the sum over directions, on the curve's scale, of the risk that no predictor goes below (eq. 11)."""
    return float(times.average(conditional_variance("v", lam, times.t[:, None]) * times.loss_weight("v")).sum())


def required_rank(curve: Curve, risk: float) -> float:
    """Return the rank from which on a capacity curve stays within `risk` >= 0, linear between whole ranks."""
    inside = int(np.argmax(curve <= risk))
    if inside == 0:
        return 0.0
    above, below = curve[inside - 1], curve[inside]
    return float(inside - 1 + (above - risk) / (above - below))
