"""The linear-Gaussian model of the three targets: closed forms by direction and time (eq. 9-12 of docs/notation.md).

Symbols, used throughout the package:

    x ~ N(0, Sigma)         clean latent; the analysis is local and centred
    eps ~ N(0, I)           noise, of unit scale
    z = t x + (1-t) eps     noisy latent at time t in [0, 1], from noise (0) to data (1); eq. 1
    v = x - eps             velocity; eq. 2
    lam >= 0                one eigenvalue of Sigma: the variance of x along one eigen-direction
    D = t^2 lam + (1-t)^2   the variance of z along that direction

In the eigenbasis of Sigma the directions are independent, so each is a scalar regression of a target on z. All
functions broadcast lam against t, compute in float64 and raise ValueError for lam < 0, t outside [0, 1], and for
lam = 0 at t = 1, where z is constant and has no regression.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from jlt.config import Prediction
from jlt.prediction import mixture, slope

Array = Float64[np.ndarray, "..."]


def target_variance(prediction: Prediction, lam: Array | float, t: Array | float = 0.0) -> Array:
    """Return the variance of the target along a direction (eq. 9): alpha^2 lam + beta^2.

    It is lam for x, 1 for eps and lam + 1 for v, the unit floor of velocity; only targets of a skip depend on time.
    """
    alpha, beta = mixture(prediction, np.asarray(t, dtype=np.float64))
    return np.asarray(alpha**2 * _eigenvalues(lam) + beta**2)


def noisy_variance(lam: Array | float, t: Array | float) -> Array:
    """Return D = t^2 lam + (1-t)^2, the variance of z along a direction, positive."""
    lam, t = _eigenvalues(lam), np.asarray(t, dtype=np.float64)
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"times must be in [0, 1], got {t.min()} to {t.max()}")
    variance = np.asarray(t**2 * lam + (1 - t) ** 2)
    if not (variance > 0).all():
        raise ValueError("lam = 0 at t = 1: the noisy latent is constant there")
    return variance


def best_coefficient(prediction: Prediction, lam: Array | float, t: Array | float) -> Array:
    """Return the c that minimises E (target - c z)^2 along a direction (eq. 10): (alpha t lam + beta (1-t)) / D."""
    variance = noisy_variance(lam, t)
    lam, t = np.asarray(lam, dtype=np.float64), np.asarray(t, dtype=np.float64)
    alpha, beta = mixture(prediction, t)
    return np.asarray((alpha * t * lam + beta * (1 - t)) / variance)


def conditional_variance(prediction: Prediction, lam: Array | float, t: Array | float) -> Array:
    """Return Var(target | z) along a direction (eq. 11), m^2 lam / D: the error that no predictor goes below."""
    variance = noisy_variance(lam, t)
    return np.asarray(slope(prediction, np.asarray(t, dtype=np.float64)) ** 2 * lam / variance)


def explained_power(prediction: Prediction, lam: Array | float, t: Array | float) -> Array:
    """Return coefficient^2 D (eq. 12): the variance of the best prediction, which a network must output."""
    return np.asarray(best_coefficient(prediction, lam, t) ** 2 * noisy_variance(lam, t))


def _eigenvalues(lam: Array | float) -> Array:
    lam = np.asarray(lam, dtype=np.float64)
    if not (lam >= 0).all():
        raise ValueError(f"eigenvalues of a covariance are non-negative, got {lam.min()}")
    return lam
