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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from jlt.config import PREDICTIONS, LossSpace, Prediction, TimestepConfig
from jlt.errors import WrongWordsError
from jlt.geometry.capacity import Times, capacity_curve, required_rank, training_times, unavoidable_risk, width_floor
from jlt.geometry.spectrum import Spectrum, summarise

STATED_SHARE = 0.05
"""Excess risk over unavoidable risk that a predictor is allowed."""
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
REPLICATES = 5
"""Spectra drawn within their sampling error, for each estimate."""
HARDLY = 0.1
"""Of all directions: two predictions that need numbers so close are called even."""
ISOTROPIC = 0.9
"""Sphericity from which on a space has no directions without variance that velocity could suffer from."""
TABULATED_RANKS = 129

Needed = dict[Prediction, float]


@dataclass(frozen=True)
class Estimate:
    """A spectrum, by which estimate it was found, and how well each eigenvalue is known."""

    name: str
    eigenvalues: Spectrum
    relative_error: Float64[np.ndarray, " d"]


@dataclass(frozen=True)
class TimeModel:
    """The training that the forecast is for: its times, and a matched loss (clamp 0 in v is eq. 13 as it stands)."""

    timesteps: TimestepConfig
    t_eps: float
    loss_space: LossSpace = "v"

    def __post_init__(self) -> None:
        if not 0 <= self.t_eps < 0.5 or (self.t_eps == 0 and self.timesteps.distribution == "uniform"):
            raise WrongWordsError(
                "t_eps must lie in [0, 0.5), and above 0 for uniform times: without a clamp the risk of a clean "
                "prediction has no mean there."
            )

    @functools.cached_property
    def times(self) -> Times:
        """Return the quadrature of p(t), with the loss's weights."""
        return training_times(self.timesteps, self.t_eps, self.loss_space)


def needed_ranks(lam: Spectrum, model: TimeModel, share: float, shared: bool = False) -> Needed:
    """Return the rank that each prediction needs for an excess risk of `share` times what nobody can avoid."""
    return _needed(_curves(lam, model, shared), unavoidable_risk(lam, model.times), share)


def forecast(estimates: Sequence[Estimate], model: TimeModel, widths: Sequence[int]) -> dict[str, Any]:
    """Return the capacity curves of the first estimate, what each prediction needs, and advice for networks' widths.

    JSON values. `order` names predictions from the best; `margin` is by how many of all directions, as a share, the
    second needs more than the first; `confidence` is the share (0..1) of the variations with the same first.
    """
    lam = estimates[0].eigenvalues
    unavoidable = unavoidable_risk(lam, model.times)
    curves = {shared: _curves(lam, model, shared) for shared in (False, True)}
    ranks = np.unique(np.linspace(0, len(lam), TABULATED_RANKS).round().astype(np.int64))
    needed = _needed(curves[False], unavoidable, STATED_SHARE)
    order = sorted(PREDICTIONS, key=lambda prediction: needed[prediction])
    margin = (needed[order[1]] - needed[order[0]]) / len(lam)
    winners = [min(found, key=lambda prediction: found[prediction]) for found in variations(estimates, model)]
    confidence = winners.count(order[0]) / len(winners)
    clean = (needed["v"] - needed["x"]) / len(lam)
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
        "margin": margin,
        "clean_over_velocity": clean,
        "confidence": confidence,
        "variations": len(winners),
    }
    return {**found, "advice": [advise(found, lam, model, width) for width in widths]}


def variations(estimates: Sequence[Estimate], model: TimeModel) -> list[Needed]:
    """Return what is needed under every combination of stated share, subspace, estimate and sampling error."""
    found = []
    random = np.random.default_rng(0)
    for estimate, replicate in itertools.product(estimates, range(REPLICATES)):
        error = random.standard_normal(len(estimate.eigenvalues)) * estimate.relative_error if replicate else 0.0
        lam = np.sort(estimate.eigenvalues * np.exp(error))[::-1]
        unavoidable = unavoidable_risk(lam, model.times)
        for shared in (False, True):
            curves = _curves(lam, model, shared)
            found += [_needed(curves, unavoidable, share) for share in SHARES]
    return found


def advise(found: Mapping[str, Any], lam: Spectrum, model: TimeModel, width: int) -> dict[str, Any]:
    """Return what a forecast means for a network of this width, in numbers and in words that one can act on.

    `loss_floor` is what the training loss of each prediction cannot fall below, since the last layer has fewer values
    than a token: the mean over elements, as it is logged, in units of the noise's variance.
    """
    dimension, order = len(lam), found["order"]
    needed = found["needed"][f"{STATED_SHARE:g}"]
    close = abs(found["clean_over_velocity"]) < HARDLY
    shares = {name: needed[name] / width for name in order}
    told = ", ".join(f"{WORDS[name]} {needed[name]:.3g}" for name in order)
    words = (
        f"For an error within {STATED_SHARE:.0%} of what nobody can avoid, of {dimension} directions of a token "
        f"{told} are needed; of a width of {width} that is "
        f"{', '.join(f'{shares[name]:.0%}' for name in order)}."
    )
    first = order[0]
    if found["sphericity"] > ISOTROPIC:
        verdict = "The space is nearly isotropic: the choice between clean and velocity should hardly matter."
    elif close:
        verdict = "The needs of clean and velocity prediction are close: the choice should hardly matter."
    else:
        verdict = (
            f"Predict {first} ({WORDS[first]}): {found['confidence']:.0%} of {found['variations']} variations of the "
            "model agree that it needs least."
        )
        if shares[order[1]] < SMALL_LOAD:
            verdict += " The network is wide for this space, so that the difference may be small."
    floor = {name: width_floor(name, lam, model.times, width) / dimension for name in PREDICTIONS}
    if width < dimension:
        words += (
            f" No network of width {width} can put out {dimension} directions: its loss stays above "
            f"{', '.join(f'{_told(floor[name])} for {WORDS[name]}' for name in order)}."
        )
    even = close or found["sphericity"] > ISOTROPIC
    return {
        "width": width,
        "even": even,
        "width_share": shares,
        "loss_floor": floor,
        "words": f"{verdict} {words}",
    }


def _told(loss: float) -> str:
    return f"{loss:.2g}" if loss >= HARDLY_ANY_LOSS else "next to nothing"


HARDLY_ANY_LOSS = 1e-4
SMALL_LOAD = 0.02
"""Of the width: needs below this should not be felt."""
WORDS: dict[Prediction, str] = {"x": "the clean latent", "eps": "noise", "v": "velocity"}


def _curves(lam: Spectrum, model: TimeModel, shared: bool) -> dict[Prediction, Float64[np.ndarray, " d_plus_1"]]:
    return {name: capacity_curve(name, lam, model.times, shared) for name in PREDICTIONS}


def _needed(curves: Mapping[Prediction, Float64[np.ndarray, " d_plus_1"]], unavoidable: float, share: float) -> Needed:
    return {name: required_rank(curve, share * unavoidable) for name, curve in curves.items()}
