"""What a predictor of limited rank loses when its output is read as a velocity (eq. 13).

At a time t the best linear predictor of a target multiplies each eigen-direction of z by a coefficient (eq. 10). One of
rank r keeps r directions and is silent in the others: it loses the explained power (eq. 12) of those it drops, times
the squared factor with which an error of the output becomes one of the velocity (eq. 3),

    1 / (1-t)^2  for x,    1 / t^2  for eps,    1  for v.

Averaged over the training times p(t) this is the capacity curve: the excess risk, summed over directions, at ranks
0..d. The loss weighs times besides: with `t_eps` every velocity error counts w(t) of eq. 5, as in a matched training,
and a loss in x- or noise-space counts it (1-t)^2 or t^2 times. The velocity space and no clamp leave eq. 13 as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float64

from jlt.config import LossSpace, Prediction, TimestepConfig
from jlt.geometry.gaussian import Array, conditional_variance, explained_power, target_variance

NODES = 48
"""Points of Gauss and Legendre's rule on each piece of the times."""
NORMAL_REACH = 9.0
"""Standard deviations beyond which a normal density is nothing in float64."""
LOGISTIC_REACH = 36.0
"""Logits beyond which a time is 0 or 1 in float64, and the density of uniform times is nothing."""

Spectrum = Float64[np.ndarray, " d"]
Curve = Float64[np.ndarray, " d_plus_1"]


@dataclass(frozen=True)
class Times:
    """Training times, with probabilities that add up to one and what a squared velocity error counts at each."""

    t: Float64[np.ndarray, " n"]
    probability: Float64[np.ndarray, " n"]
    loss_weight: Float64[np.ndarray, " n"]

    def average(self, values: Float64[np.ndarray, "n *rest"]) -> Array:
        """Average over p(t) what was computed at every time."""
        return np.asarray(np.tensordot(self.probability, values, axes=1))


def training_times(config: TimestepConfig, t_eps: float = 0.0, space: LossSpace = "v") -> Times:
    """Return a quadrature of p(t) (eq. 6): Gauss and Legendre's rule over the logit, cut where eq. 3 and 5 are clamped.

    The loss is the matched one, clamped at `t_eps`, in a space.

    ValueError for uniform times without a clamp: the velocity error of a clean prediction has no mean there.
    """
    if config.distribution == "uniform" and t_eps == 0:
        raise ValueError("the risk of a clean prediction is infinite at uniform times without a clamp: t_eps > 0")
    low, high = _range(config)
    clamps = [_logit(t, config.shift) for t in (t_eps, 1 - t_eps) if 0 < t < 1]
    cuts = sorted({low, *(cut for cut in (*clamps, (low + high) / 2) if low < cut < high), high})
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    pieces = [(start, (end - start) / 2) for start, end in pairwise(cuts)]
    logit = np.concatenate([start + half * (nodes + 1) for start, half in pieces])
    weight = np.concatenate([half * weights for _, half in pieces]) * _density(logit, config)
    u = 1 / (1 + np.exp(-logit))
    t = u / (u + config.shift * (1 - u))
    return Times(t, weight / weight.sum(), loss_weight(t, t_eps, space))


def _range(config: TimestepConfig) -> tuple[float, float]:
    """Return logits beyond which nothing is left, of a function that grows as fast as 1 / (1-t)^2 or 1 / t^2 too."""
    if config.distribution == "uniform":
        return -LOGISTIC_REACH, LOGISTIC_REACH
    reach = NORMAL_REACH * config.P_std + 2 * config.P_std**2
    return max(config.P_mean - reach, -LOGISTIC_REACH), min(config.P_mean + reach, LOGISTIC_REACH)


def _density(logit: Float64[np.ndarray, " n"], config: TimestepConfig) -> Float64[np.ndarray, " n"]:
    """Return the density of the logits before the shift, up to a factor."""
    if config.distribution == "uniform":
        return np.asarray(1 / (2 + np.exp(logit) + np.exp(-logit)))
    return np.asarray(np.exp(-(((logit - config.P_mean) / config.P_std) ** 2) / 2))


def _logit(t: float, shift: float) -> float:
    """Return the logit, before the shift, of a time after it."""
    return float(np.log(t / (1 - t)) + np.log(shift))


def velocity_gain(prediction: Prediction, t: Array) -> Array:
    """Return the squared factor from an error of the output to one of the velocity (eq. 3), for t inside (0, 1)."""
    return np.asarray({"x": (1 - t) ** -2, "eps": t**-2.0, "v": np.ones_like(t)}[prediction])


def loss_weight(t: Array, t_eps: float, space: LossSpace = "v") -> Array:
    """Return what a squared velocity error counts in a matched training (eq. 5) whose loss is in a space (eq. 4)."""
    clamped = ((1 - t) / np.maximum(1 - t, t_eps) * t / np.maximum(t, t_eps)) ** 2
    return np.asarray(clamped * {"x": (1 - t) ** 2, "eps": t**2, "v": np.ones_like(t)}[space])


def direction_risk(prediction: Prediction, lam: Spectrum, times: Times) -> Float64[np.ndarray, "n d"]:
    """Return the excess velocity risk of being silent in a direction, at every time and for every eigenvalue."""
    t, weight = times.t[:, None], times.loss_weight[:, None]
    return explained_power(prediction, lam, t) * velocity_gain(prediction, t) * weight


def capacity_curve(prediction: Prediction, lam: Spectrum, times: Times, shared: bool = False) -> Curve:
    """Return the excess velocity risk, summed over d directions, of the best predictor of each rank 0..d (eq. 13).

    It may choose other directions at every time, which only velocity makes use of; with `shared` they are the same at
    all times, as behind a bottleneck that does not know the time.
    """
    risk = direction_risk(prediction, lam, times)
    kept_first = np.sort(times.average(risk))[::-1] if shared else times.average(np.sort(risk, axis=1)[:, ::-1])
    return np.concatenate([np.cumsum(kept_first[::-1])[::-1], [0.0]])


def width_floor(prediction: Prediction, lam: Spectrum, times: Times, width: int) -> float:
    """Return the velocity risk, on the curve's scale, below which no network of a width comes, however deep or trained.

    Its last layer is linear: whatever it computes, its outputs lie in one affine subspace of `width` dimensions, and
    outside of that the error is the whole variance of the target (eq. 9). 0 for a width of a token's size or more.
    """
    t, weight = times.t[:, None], times.loss_weight[:, None]
    silent = times.average(target_variance(prediction, lam) * velocity_gain(prediction, t) * weight)
    return float(np.sort(silent)[: max(0, len(lam) - width)].sum())


def unavoidable_risk(lam: Spectrum, times: Times) -> float:
    """Return the sum over directions, on the curve's scale, of what no predictor can go below (eq. 11 for velocity)."""
    risk = conditional_variance("v", lam, times.t[:, None]) * times.loss_weight[:, None]
    return float(times.average(risk).sum())


def required_rank(curve: Curve, risk: float) -> float:
    """Return the rank from which on a capacity curve stays within `risk` >= 0, linear between whole ranks."""
    inside = int(np.argmax(curve <= risk))
    if inside == 0:
        return 0.0
    above, below = curve[inside - 1], curve[inside]
    return float(inside - 1 + (above - risk) / (above - below))
