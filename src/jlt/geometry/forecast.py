"""Which prediction a latent space favours, before anything is trained: what capacity each needs (eq. 13), as advice.

The claim is that of two predictions the one that needs fewer directions for the same error is the better one, the more
so the larger a share of the network's width that is. Needed is the rank from which on the excess risk is within a
stated share of the risk that nobody can avoid (eq. 11).

What the order rests on is varied: the share that is stated, whether directions may change over time, the estimate of
the covariance, and its sampling error. The share of the variations in which the same prediction comes first is the
confidence. It says how firmly the model speaks, and not whether the model is right: that is measured by training.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from jlt.config import PREDICTIONS, LossSpace, Prediction, TimestepConfig, TrainConfig
from jlt.errors import UsageError
from jlt.geometry.capacity import Times, capacity_curve, required_rank, training_times, unavoidable_risk, width_floor
from jlt.geometry.spectrum import Spectrum, shrunk, summarise

STATED_SHARE = 0.05
"""Excess risk over unavoidable risk that a predictor is allowed."""
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
REPLICATES = 5
"""Spectra for each estimate: as it is, shrunk as so few latents ask for, and others drawn within the sampling error."""
HARDLY = 0.1
"""Of all directions: two predictions that need numbers so close are called even."""
ISOTROPIC = 0.9
"""Sphericity from which on all directions count as alike."""
LIKE_NOISE = 1.5
"""Isotropic latents whose variance is within this factor of the noise's: there the needs of eq. 13 decide nothing."""
DECIDED = 2 / 3
"""Of the variations: where fewer agree the model does not say who wins."""
TABULATED_RANKS = 129

Needed = dict[Prediction, float]
Call = Literal["x", "eps", "v", "even", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A spectrum, by which estimate it was found, how well each eigenvalue is known, and from how many samples."""

    name: str
    eigenvalues: Spectrum
    relative_error: Float64[np.ndarray, " d"]
    independent: float
    """Independent samples that would tell as much as the tokens do, which depend on each other within a latent."""
    enough: bool = True
    """Whether there are latents enough for any advice, and tokens enough for all directions to have variance."""

    def in_units_of(self, variance: float) -> Estimate:
        """Return the spectrum of latents whose unit of variance is another one."""
        return replace(self, eigenvalues=self.eigenvalues / variance)


@dataclass(frozen=True)
class TrainingModel:
    """The training that a forecast is for: its times, its matched loss (clamp 0 in v is eq. 13 as it stands), noise."""

    timesteps: TimestepConfig
    t_eps: float
    loss_space: LossSpace = "v"
    noise_scale: float = 1.0
    """Standard deviation of the noise, in whose units spectra are."""

    @classmethod
    def of(cls, train: TrainConfig) -> TrainingModel:
        """Return the model of a run; of another weighting of its loss than the matched one nothing is known here."""
        return cls(train.timesteps, train.loss.t_eps, train.loss.space, train.noise_scale)

    def __post_init__(self) -> None:
        if not 0 <= self.t_eps < 0.5 or (self.t_eps == 0 and self.timesteps.distribution == "uniform"):
            raise UsageError(
                "t_eps must lie in [0, 0.5), and above 0 for uniform times: without a clamp the risk of a clean "
                "prediction has no mean there."
            )
        if not 0 < self.noise_scale < math.inf:
            raise UsageError(f"A scale of noise is above 0, not {self.noise_scale}.")

    @functools.cached_property
    def times(self) -> Times:
        """Return the quadrature of p(t), with the loss's weights."""
        return training_times(self.timesteps, self.t_eps, self.loss_space)


def needed_ranks(lam: Spectrum, model: TrainingModel, share: float, shared: bool = False) -> Needed:
    """Return the rank that each prediction needs for an excess risk of `share` times what nobody can avoid."""
    return _needed(_curves(lam, model, shared), unavoidable_risk(lam, model.times), share)


def forecast(estimates: Sequence[Estimate], model: TrainingModel, widths: Sequence[int]) -> dict[str, Any]:
    """Return the capacity curves of the first estimate, what each prediction needs, and advice for networks' widths.

    JSON values. `order` names predictions from the best; `margin` is by how many of all directions, as a share, the
    second needs more than the first; `outcome` is the first, or even where x and v need about as much; `confidence` is
    the share (0..1) of the variations with the same outcome, and `call` what is made of it.
    """
    lam = estimates[0].eigenvalues
    unavoidable = unavoidable_risk(lam, model.times)
    curves = {shared: _curves(lam, model, shared) for shared in (False, True)}
    ranks = np.unique(np.linspace(0, len(lam), TABULATED_RANKS).round().astype(np.int64))
    needed = _needed(curves[False], unavoidable, STATED_SHARE)
    order = sorted(PREDICTIONS, key=lambda prediction: needed[prediction])
    outcome = _outcome(needed, len(lam))
    outcomes = [_outcome(varied, len(lam)) for varied in variations(estimates, model)]
    found: dict[str, Any] = {
        "sphericity": summarise(lam).sphericity,
        "stated_share": STATED_SHARE,
        "unavoidable_risk": unavoidable,
        "ranks": ranks.tolist(),
        "curves": {name: curve[ranks].tolist() for name, curve in curves[False].items()},
        "curves_one_subspace": {name: curve[ranks].tolist() for name, curve in curves[True].items()},
        "needed": {f"{share:g}": _needed(curves[False], unavoidable, share) for share in SHARES},
        "needed_by_estimate": {
            estimate.name: needed_ranks(estimate.eigenvalues, model, STATED_SHARE) for estimate in estimates
        },
        "order": order,
        "margin": (needed[order[1]] - needed[order[0]]) / len(lam),
        "clean_over_velocity": (needed["v"] - needed["x"]) / len(lam),
        "enough": estimates[0].enough,
        "outcome": outcome,
        "confidence": outcomes.count(outcome) / len(outcomes),
        "variations": len(outcomes),
    }
    found["call"] = _call(found, float(lam.mean()))
    return {**found, "advice": [advise(found, lam, model, width) for width in widths]}


def variations(estimates: Sequence[Estimate], model: TrainingModel) -> list[Needed]:
    """Return what is needed under every combination of stated share, subspace, estimate and sampling error."""
    found = []
    random = np.random.default_rng(0)
    for estimate, replicate in itertools.product(estimates, range(REPLICATES)):
        lam = _replicate(estimate, replicate, random)
        unavoidable = unavoidable_risk(lam, model.times)
        for shared in (False, True):
            curves = _curves(lam, model, shared)
            found += [_needed(curves, unavoidable, share) for share in SHARES]
    return found


def _replicate(estimate: Estimate, replicate: int, random: np.random.Generator) -> Spectrum:
    lam = estimate.eigenvalues
    if replicate == 0:
        return lam
    if replicate == 1:
        return shrunk(lam, estimate.independent)
    error = random.standard_normal(len(lam)) * estimate.relative_error
    return np.asarray(np.sort(lam * np.exp(error))[::-1])


def _call(found: Mapping[str, Any], variance: float) -> Call:
    """Return which prediction is expected to win: one of them, both of x and v alike, or that it cannot be said."""
    if not found["enough"]:
        return "undecided"
    if found["sphericity"] > ISOTROPIC and 1 / LIKE_NOISE < variance < LIKE_NOISE:
        return "even"
    outcome: Call = found["outcome"]
    return outcome if found["confidence"] >= DECIDED else "undecided"


def _outcome(needed: Needed, dimension: int) -> Call:
    """Return the prediction that needs least, or that clean and velocity prediction need about as much."""
    if abs(needed["v"] - needed["x"]) < HARDLY * dimension:
        return "even"
    return min(needed, key=lambda prediction: needed[prediction])


def advise(found: Mapping[str, Any], lam: Spectrum, model: TrainingModel, width: int) -> dict[str, Any]:
    """Return what a forecast means for a network of this width, in numbers and in words that one can act on.

    `loss_floor` is what the training loss of each prediction cannot fall below, since the last layer has fewer values
    than a token: the mean over elements, as it is logged.
    """
    dimension, order, needed = len(lam), found["order"], found["needed"][f"{STATED_SHARE:g}"]
    shares = {name: needed[name] / width for name in order}
    unit = model.noise_scale**2
    floor = {name: unit * width_floor(name, lam, model.times, width) / dimension for name in PREDICTIONS}
    words = [
        _verdict(found, shares),
        f"For an error within {STATED_SHARE:.0%} of what nobody can avoid, of {dimension} directions of a token "
        f"{_listed({name: _number(needed[name]) for name in order})} are needed; of a width of {width} that is "
        f"{', '.join(f'{shares[name]:.0%}' for name in order)}.",
    ]
    if width < dimension:
        told = ", ".join(f"{floor[name]:.2g} for {WORDS[name]}" for name in order if floor[name] >= HARDLY_ANY_LOSS)
        words.append(f"No network of width {width} can put out {dimension} directions: its loss stays above {told}.")
    return {"width": width, "width_share": shares, "loss_floor": floor, "words": " ".join(words)}


def _verdict(found: Mapping[str, Any], shares: Mapping[Prediction, float]) -> str:
    """Return the call in words."""
    call, (first, second) = found["call"], found["order"][:2]
    share = f"{found['confidence']:.0%} of {found['variations']} variations of the model"
    if call == "even" and found["outcome"] == "even":
        return f"Clean and velocity prediction need about as much ({share} agree): the choice should hardly matter."
    if call == "even":
        return "The space is nearly isotropic: the choice between clean and velocity should hardly matter."
    if call == "undecided":
        if not found["enough"]:
            return "There are too few latents to say which prediction wins."
        return f"The model does not say which prediction wins: {first} comes first, but only {share} agree."
    firm = f"{share} agree that it needs least, which says how firm the model is and not whether it is right."
    wide = " The network is wide for this space, so that the difference may be small."
    return f"Predict {first} ({WORDS[first]}): {firm}{wide if shares[second] < SMALL_LOAD else ''}"


def _listed(told: Mapping[Prediction, str]) -> str:
    return ", ".join(f"{WORDS[name]} {text}" for name, text in told.items())


def _number(rank: float) -> str:
    return f"{rank:,.0f}" if rank >= SHOWN_WHOLE else f"{rank:.3g}"


SHOWN_WHOLE = 100
HARDLY_ANY_LOSS = 1e-4
SMALL_LOAD = 0.02
"""Of the width: needs below this should not be felt."""
WORDS: dict[Prediction, str] = {"x": "the clean latent", "eps": "noise", "v": "velocity"}


def _curves(lam: Spectrum, model: TrainingModel, shared: bool) -> dict[Prediction, Float64[np.ndarray, " d_plus_1"]]:
    return {name: capacity_curve(name, lam, model.times, shared) for name in PREDICTIONS}


def _needed(curves: Mapping[Prediction, Float64[np.ndarray, " d_plus_1"]], unavoidable: float, share: float) -> Needed:
    return {name: required_rank(curve, share * unavoidable) for name, curve in curves.items()}
