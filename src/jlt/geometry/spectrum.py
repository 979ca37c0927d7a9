"""A covariance spectrum in a few numbers: how many directions matter, and how unequal they are."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64

from jlt.results.geometry import ShareBelow, SpectrumSummary

Spectrum = Float64[np.ndarray, " d"]

THRESHOLDS = (1.0, 0.1, 0.01)
"""Variances to count directions below, in units of the noise's variance, which is 1 in every direction."""


def eigenvalues_descending(covariance: Float64[np.ndarray, "d d"]) -> Spectrum:
    """Return the eigenvalues of a covariance, largest first; negative rounding residue becomes 0."""
    return descending(np.linalg.eigvalsh(covariance))


def descending(eigenvalues: Spectrum) -> Spectrum:
    """Return eigenvalues of a covariance largest first; negative rounding residue becomes 0."""
    return np.ascontiguousarray(np.sort(eigenvalues)[::-1].clip(min=0.0))


def tabulated_ranks(count: int, points: int) -> Int64[np.ndarray, " r"]:
    """Return at most `points` of `count` indices, at equal distances, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, points).round().astype(np.int64))


def summarise(eigenvalues: Spectrum) -> SpectrumSummary:
    """Summarise eigenvalues lam_1 >= ... >= lam_d >= 0. All but `share_below` do not change with their scale."""
    total = float(eigenvalues.sum())
    if total <= 0:
        return SpectrumSummary()
    share = eigenvalues / total
    positive = share[share > 0]
    return SpectrumSummary(
        effective_rank=float(np.exp(-(positive * np.log(positive)).sum())),
        participation_ratio=float(1 / (share**2).sum()),
        anisotropy=float(eigenvalues.max() / eigenvalues.min()) if _resolved(eigenvalues) else None,
        sphericity=sphericity(eigenvalues),
        share_below={f"{threshold:g}": share_below(eigenvalues, threshold) for threshold in THRESHOLDS},
    )


def sphericity(eigenvalues: Spectrum) -> float:
    """Return the geometric over the arithmetic mean of eigenvalues (Mauchly 1940); 1 is isotropic, 0 degenerate.

    Unlike anisotropy it depends on every eigenvalue, and -log(sphericity) is twice the Kullback-Leibler divergence per
    direction from N(0, Sigma) to the isotropic Gaussian of the same total variance.
    """
    return float(np.exp(np.log(eigenvalues).mean()) / eigenvalues.mean()) if _resolved(eigenvalues) else 0.0


def _resolved(eigenvalues: Spectrum) -> bool:
    """Return whether the smallest eigenvalue is more than the rounding of latents to float32."""
    return bool(eigenvalues.min() > eigenvalues.max() * len(eigenvalues) * np.finfo(np.float32).eps ** 2)


def share_below(eigenvalues: Spectrum, threshold: float) -> ShareBelow:
    """Count the directions with a variance below the threshold, and their share of the total variance."""
    small = eigenvalues < threshold
    return ShareBelow(int(small.sum()), float(eigenvalues[small].sum() / eigenvalues.sum()))


def sampling_error(independent: float) -> float:
    """Return the relative standard error sqrt(2/n) of an eigenvalue estimated from n independent Gaussian samples.

    Asymptotic, for separated eigenvalues (Anderson 1963); too small for distributions of heavier tails.
    """
    if independent < 1:
        raise ValueError("a sampling error needs at least one sample")
    return float(np.sqrt(2 / independent))


def error_by_rank(independent: float, count: int) -> Float64[np.ndarray, " d"]:
    """Return the relative bias of eigenvalues from n samples, since sorting spreads them out.

    Each is about 1/n too small for every larger one (the leading term of Lawley 1956 in a steep spectrum).
    """
    return np.arange(count) / independent


def shrunk(eigenvalues: Spectrum, independent: float) -> Spectrum:
    """Return a spectrum moved towards its mean by the optimal share for n Gaussian samples (OAS: Chen et al. 2010).

    A steep spectrum or many samples hardly change; few samples of an isotropic space become isotropic.
    """
    d, n = len(eigenvalues), independent
    squares, square_of_sum = float((eigenvalues**2).sum()), float(eigenvalues.sum()) ** 2
    apart = squares - square_of_sum / d
    if apart <= 0:
        return eigenvalues
    share = min(1.0, ((1 - 2 / d) * squares + square_of_sum) / ((n + 1 - 2 / d) * apart))
    return np.asarray((1 - share) * eigenvalues + share * eigenvalues.mean())
