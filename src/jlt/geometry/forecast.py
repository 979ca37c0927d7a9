"""Which prediction a latent space favours, before any training: the capacity that each needs (eq. 13).

The claim is that of two predictions the one that needs fewer directions for the same error is the better one, the more
so the larger a share of the network's width that is. A prediction needs the rank from which on its excess risk is
within a stated share of the unavoidable risk (eq. 11).

The assumptions behind the order are varied: the stated share, whether directions may change over time, the estimate of
the covariance, and its sampling error. The confidence is the share of the variations with the same outcome. It measures
how sure the model is, not whether the model is right; only training measures that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from jlt.config import PREDICTIONS, Prediction
from jlt.geometry.capacity import (
    Curve,
    capacity_curve,
    required_rank,
    training_times,
    unavoidable_risk,
    width_floor,
)
from jlt.geometry.spectrum import Spectrum, shrunk, sphericity, tabulated_ranks
from jlt.results.geometry import Advice, Outcome, TokenForecast, TrainingModel

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

Needed = dict[Prediction, float]


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


def needed_ranks(lam: Spectrum, model: TrainingModel, share: float, shared: bool = False) -> Needed:
    """Return the rank that each prediction needs for an excess risk of `share` times the unavoidable one."""
    return _needed(_curves(lam, model, shared), unavoidable_risk(lam, training_times(model)), share)


def forecast(estimates: Sequence[Estimate], model: TrainingModel, widths: Sequence[int]) -> TokenForecast:
    """Return the capacity curves of the first estimate, the directions that each prediction needs, and the outcome."""
    lam, enough = estimates[0].eigenvalues, estimates[0].enough
    unavoidable = unavoidable_risk(lam, training_times(model))
    curves, curves_one_subspace = (_curves(lam, model, shared) for shared in (False, True))
    needed = _needed(curves, unavoidable, STATED_SHARE)
    order = sorted(PREDICTIONS, key=lambda prediction: needed[prediction])
    outcome = _outcome(needed, len(lam))
    outcomes = [_outcome(varied, len(lam)) for varied in variations(estimates, model)]
    confidence = outcomes.count(outcome) / len(outcomes)
    ranks = tabulated_ranks(len(curves["x"]), TABULATED_RANKS)
    return TokenForecast(
        order=tuple(order),
        margin=(needed[order[1]] - needed[order[0]]) / len(lam),
        clean_over_velocity=(needed["v"] - needed["x"]) / len(lam),
        call=_call(lam, outcome, confidence) if enough else "undecided",
        outcome=outcome,
        confidence=confidence,
        sphericity=sphericity(lam),
        stated_share=STATED_SHARE,
        needed={f"{share:g}": _needed(curves, unavoidable, share) for share in SHARES},
        advice=tuple(_advice(needed, lam, model, width) for width in widths),
        unavoidable_risk=unavoidable,
        ranks=tuple(ranks.tolist()),
        curves={name: tuple(curve[ranks].tolist()) for name, curve in curves.items()},
        curves_one_subspace={name: tuple(curve[ranks].tolist()) for name, curve in curves_one_subspace.items()},
        needed_by_estimate={
            estimate.name: needed_ranks(estimate.eigenvalues, model, STATED_SHARE) for estimate in estimates
        },
        enough=enough,
        variations=len(outcomes),
    )


def variations(estimates: Sequence[Estimate], model: TrainingModel) -> list[Needed]:
    """Return the needs under every combination of stated share, subspace, estimate and sampling error."""
    found = []
    random = np.random.default_rng(0)
    for estimate, replicate in itertools.product(estimates, range(REPLICATES)):
        lam = _replicate(estimate, replicate, random)
        unavoidable = unavoidable_risk(lam, training_times(model))
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


def _outcome(needed: Needed, dimension: int) -> Outcome:
    if abs(needed["v"] - needed["x"]) < EVEN_MARGIN * dimension:
        return "even"
    return min(needed, key=lambda prediction: needed[prediction])


def _call(lam: Spectrum, outcome: Outcome, confidence: float) -> Outcome:
    if sphericity(lam) > ISOTROPIC and 1 / LIKE_NOISE < lam.mean() < LIKE_NOISE:
        return "even"
    return outcome if confidence >= MIN_CONFIDENCE else "undecided"


def _advice(needed: Needed, lam: Spectrum, model: TrainingModel, width: int) -> Advice:
    times, unit = training_times(model), model.noise_scale**2
    return Advice(
        width,
        width_share={name: rank / width for name, rank in needed.items()},
        loss_floor={name: unit * width_floor(name, lam, times, width) / len(lam) for name in PREDICTIONS},
    )


def _curves(lam: Spectrum, model: TrainingModel, shared: bool) -> dict[Prediction, Curve]:
    return {name: capacity_curve(name, lam, training_times(model), shared) for name in PREDICTIONS}


def _needed(curves: Mapping[Prediction, Curve], unavoidable: float, share: float) -> Needed:
    return {name: required_rank(curve, share * unavoidable) for name, curve in curves.items()}
