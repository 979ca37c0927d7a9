"""Which prediction a latent space favours, before any training: the capacity that each needs (eq. 13).

At a time t the best linear predictor of a target multiplies each eigen-direction of z by a coefficient (eq. 10). One of
rank r keeps r directions and outputs 0 in the others: it loses the explained power (eq. 12) of those it drops, times
the weight that the loss gives to an error of the output. For a loss in velocity space without clamp (eq. 3) that is

    1 / (1-t)^2  for x,    1 / t^2  for eps,    1  for v.

Averaged over the training times p(t) this is the capacity curve: the excess risk, summed over directions, at ranks
0..d. A clamp and a loss in x- or noise-space change the weights as eq. 5 does.

The claim is that of two predictions the one that needs fewer directions for the same error is the better one, the more
so the larger a share of the network's width that is. A prediction needs the rank from which on its excess risk is
within a stated share of the unavoidable risk (eq. 11).

The assumptions behind the order are varied: the stated share, whether directions may change over time, the estimate of
the covariance, and its sampling error. The confidence is the share of the variations with the same outcome. It measures
how sure the model is, not whether the model is right; only training measures that.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64

from jlt.config import LossConfig, Prediction, TimestepConfig
from jlt.geometry.gaussian import Array, conditional_variance, explained_power, target_variance
from jlt.geometry.spectrum import Spectrum, shrunk, sphericity, tabulated_ranks
from jlt.loss import error_gain
from jlt.results.geometry import Advice, Outcome, TokenForecast, TrainingModel, Values
from jlt.timesteps import time_density

NODES = 48
"""Points of Gauss and Legendre's rule on each piece of the times."""
NORMAL_REACH = 9.0
"""Standard deviations beyond which a normal density is nothing in float64."""
LOGISTIC_REACH = 36.0
"""Logits beyond which a time is 0 or 1 in float64, and the density of uniform times is nothing."""
STATED_SHARE = 0.05
"""Excess risk over unavoidable risk that a predictor is allowed."""
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
REPLICATES = 5
"""Spectra for each estimate: as it is, shrunk for its number of samples, and others drawn within the sampling error."""
EVEN_MARGIN = 0.1
"""Of all directions: two predictions whose needs differ by less are called even."""
ISOTROPIC = 0.9
"""Sphericity from which on a space counts as isotropic."""
LIKE_NOISE = 1.5
"""Isotropic latents with a variance within this factor of the noise's are called even regardless of eq. 13."""
MIN_CONFIDENCE = 2 / 3
"""Share of the variations below which the call is undecided."""
TABULATED_RANKS = 129

Curve = Float64[np.ndarray, " d_plus_1"]
Needed = dict[Prediction, float]


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
    """Return a quadrature of p(t) (eq. 6): Gauss and Legendre's rule over the logit, cut at the clamps of eq. 3, 5."""
    low, high = _logit_range(model.timesteps)
    clamps = [math.log(t / (1 - t)) for t in (model.t_eps, 1 - model.t_eps) if 0 < t < 1]
    cuts = sorted({low, *(cut for cut in (*clamps, (low + high) / 2) if low < cut < high), high})
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    pieces = [(start, (end - start) / 2) for start, end in itertools.pairwise(cuts)]
    logit = torch.from_numpy(np.concatenate([start + half * (nodes + 1) for start, half in pieces]))
    # At a time of exactly 1 a direction without variance has no regression.
    t = logit.sigmoid().clamp_max(1 - sys.float_info.epsilon)
    # dt/dlogit = t (1-t).
    density = (time_density(t, model.timesteps) * t * (1 - t)).numpy()
    weight = np.concatenate([half * weights for _, half in pieces]) * density
    # The smallest float clamps nothing; a LossConfig has no 0.
    loss = LossConfig(model.loss_space, model.weighting, model.t_eps or sys.float_info.min)
    return TimeQuadrature(t.numpy(), weight / weight.sum(), loss)


def _logit_range(config: TimestepConfig) -> tuple[float, float]:
    """Return logits of t beyond which p(t) is nothing, even times a function that grows as 1 / (1-t)^2 or 1 / t^2."""
    low, high, shift = -LOGISTIC_REACH, LOGISTIC_REACH, math.log(config.shift)
    if config.distribution == "logit_normal":
        reach = NORMAL_REACH * config.P_std + 2 * config.P_std**2
        low, high = max(config.P_mean - reach, low), min(config.P_mean + reach, high)
    return low - shift, high - shift


def capacity_curve(prediction: Prediction, lam: Spectrum, times: TimeQuadrature, shared: bool = False) -> Curve:
    """Return the excess risk, summed over d directions, of the best predictor of each rank 0..d (eq. 13).

    It may choose other directions at every time, which only velocity makes use of; with `shared` they are the same at
    all times, as behind a bottleneck that does not know the time.
    """
    risk = explained_power(prediction, lam, times.t[:, None]) * times.loss_weight(prediction)
    kept_first = np.sort(times.average(risk))[::-1] if shared else times.average(np.sort(risk, axis=1)[:, ::-1])
    return np.concatenate([np.cumsum(kept_first[::-1])[::-1], [0.0]])


def width_floor(prediction: Prediction, lam: Spectrum, times: TimeQuadrature, width: int) -> float:
    """Return the risk, on the curve's scale, that no network of a width goes below, whatever its depth or training.

    Its last layer is linear, so its outputs span one affine subspace of `width` dimensions. Outside of that the error
    is the whole variance of the target (eq. 9). 0 for a width of a token's size or more.
    """
    dropped = times.average(target_variance(prediction, lam, times.t[:, None]) * times.loss_weight(prediction))
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


@dataclass(frozen=True)
class Estimate:
    """A spectrum: the name of its estimate, the relative error of each eigenvalue, and the samples behind it."""

    name: str
    eigenvalues: Spectrum
    relative_error: Float64[np.ndarray, " d"]
    independent: float
    """Independent samples that would give errors as large, since the tokens of a latent depend on each other."""
    enough: bool = True
    """Whether there are enough latents for a forecast, and enough tokens for variance in all directions."""

    def in_units_of(self, variance: float) -> Estimate:
        """Return the spectrum with variances divided by a unit."""
        return replace(self, eigenvalues=self.eigenvalues / variance)


def needed_ranks(lam: Spectrum, model: TrainingModel, share: float) -> Needed:
    """Return the rank that each prediction needs for an excess risk of `share` times the unavoidable one."""
    return _needed(lam, model, share, _curves(lam, model))


def forecast(estimates: Sequence[Estimate], model: TrainingModel, widths: Sequence[int]) -> TokenForecast:
    """Return the capacity curves of the first estimate, the directions that each prediction needs, and the outcome."""
    lam, enough, times = estimates[0].eigenvalues, estimates[0].enough, training_times(model)
    curves = _curves(lam, model)
    needed = _needed(lam, model, STATED_SHARE, curves)
    order = sorted(model.predictions, key=needed.__getitem__)
    outcome = _outcome(needed, len(lam))
    outcomes = [_outcome(varied, len(lam)) for varied in _variations(estimates, model)]
    confidence = outcomes.count(outcome) / len(outcomes)
    call: Outcome = outcome if enough and confidence >= MIN_CONFIDENCE else "undecided"
    if enough and sphericity(lam) > ISOTROPIC and 1 / LIKE_NOISE < lam.mean() < LIKE_NOISE:
        call = "even"
    ranks = tabulated_ranks(len(lam) + 1, TABULATED_RANKS)

    def tabulated(curves: dict[Prediction, Curve]) -> dict[Prediction, Values]:
        return {name: tuple(curve[ranks].tolist()) for name, curve in curves.items()}

    return TokenForecast(
        order=tuple(order),
        margin=(needed[order[1]] - needed[order[0]]) / len(lam),
        clean_over_velocity=(needed["v"] - needed["x"]) / len(lam),
        call=call,
        outcome=outcome,
        confidence=confidence,
        sphericity=sphericity(lam),
        stated_share=STATED_SHARE,
        needed={f"{share:g}": _needed(lam, model, share, curves) for share in SHARES},
        advice=tuple(_advice(needed, lam, model, width) for width in widths),
        unavoidable_risk=unavoidable_risk(lam, times),
        ranks=tuple(ranks.tolist()),
        curves=tabulated(curves),
        curves_one_subspace=tabulated(_curves(lam, model, shared=True)),
        needed_by_estimate={found.name: needed_ranks(found.eigenvalues, model, STATED_SHARE) for found in estimates},
        enough=enough,
        variations=len(outcomes),
    )


def _variations(estimates: Sequence[Estimate], model: TrainingModel) -> Iterator[Needed]:
    """Return the needs under every combination of stated share, subspace, estimate and sampling error."""
    random = np.random.default_rng(0)
    for estimate, replicate in itertools.product(estimates, range(REPLICATES)):
        lam = _replicate(estimate, replicate, random)
        for shared in (False, True):
            curves = _curves(lam, model, shared)
            yield from (_needed(lam, model, share, curves) for share in SHARES)


def _replicate(estimate: Estimate, replicate: int, random: np.random.Generator) -> Spectrum:
    lam = estimate.eigenvalues
    if replicate == 0:
        return lam
    if replicate == 1:
        return shrunk(lam, estimate.independent)
    error = random.standard_normal(len(lam)) * estimate.relative_error
    return np.asarray(np.sort(lam * np.exp(error))[::-1])


def _outcome(needed: Needed, dimension: int) -> Outcome:
    if abs(needed["v"] - needed["x"]) < EVEN_MARGIN * dimension:
        return "even"
    return min(needed, key=needed.__getitem__)


def _advice(needed: Needed, lam: Spectrum, model: TrainingModel, width: int) -> Advice:
    times, unit = training_times(model), model.noise_scale**2
    return Advice(
        width,
        width_share={name: rank / width for name, rank in needed.items()},
        loss_floor={name: unit * width_floor(name, lam, times, width) / len(lam) for name in model.predictions},
    )


def _curves(lam: Spectrum, model: TrainingModel, shared: bool = False) -> dict[Prediction, Curve]:
    return {name: capacity_curve(name, lam, training_times(model), shared) for name in model.predictions}


def _needed(lam: Spectrum, model: TrainingModel, share: float, curves: dict[Prediction, Curve]) -> Needed:
    risk = share * unavoidable_risk(lam, training_times(model))
    return {name: required_rank(curve, risk) for name, curve in curves.items()}
