"""A covariance spectrum in a few numbers: how many directions matter, and how unequal they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

Spectrum = Float64[np.ndarray, " d"]

THRESHOLDS = (1.0, 0.1, 0.01)
"""Variances to count directions below, in units of the noise's variance, which is 1 in every direction."""


@dataclass(frozen=True)
class ShareBelow:
    """The directions whose variance is below a threshold: how many, and their share of the total variance (0 to 1)."""

    directions: int
    variance_share: float


@dataclass(frozen=True)
class SpectrumSummary:
    """Summaries of the eigenvalues lam_1 >= ... >= lam_d >= 0; all but `share_below` do not change with their scale."""

    effective_rank: float
    participation_ratio: float
    anisotropy: float | None
    sphericity: float
    share_below: dict[str, ShareBelow]


def eigenvalues_descending(covariance: Float64[np.ndarray, "d d"]) -> Spectrum:
    """Return the eigenvalues of a covariance, largest first; negative rounding residue becomes 0."""
    return descending(np.linalg.eigvalsh(covariance))


def descending(eigenvalues: Spectrum) -> Spectrum:
    """Return eigenvalues of a covariance largest first; negative rounding residue becomes 0."""
    return np.ascontiguousarray(np.sort(eigenvalues)[::-1].clip(min=0.0))


def summarise(eigenvalues: Spectrum) -> SpectrumSummary:
    """Summarise a spectrum; ValueError where every eigenvalue is 0.

    effective_rank: exp of the entropy of lam / sum(lam) (Roy and Vetterli 2007).
    participation_ratio: sum(lam)^2 / sum(lam^2).
    anisotropy: largest over smallest eigenvalue; None (infinite) where the smallest is 0 to the rounding of latents.
    sphericity: geometric over arithmetic mean of the eigenvalues (Mauchly 1940); 1 is isotropic, 0 degenerate. Unlike
        anisotropy it hears every eigenvalue, and -log(sphericity) is twice the Kullback-Leibler divergence per
        direction from N(0, Sigma) to the isotropic Gaussian of the same total variance.
    """
    total = float(eigenvalues.sum())
    if total <= 0:
        raise ValueError("a spectrum of zeros has no summary")
    share = eigenvalues / total
    positive = share[share > 0]
    # Below this an eigenvalue is what the latents' rounding to float32 left of a zero, and a ratio to it is noise.
    resolved = bool(eigenvalues.min() > eigenvalues.max() * len(eigenvalues) * np.finfo(np.float32).eps ** 2)
    return SpectrumSummary(
        effective_rank=float(np.exp(-(positive * np.log(positive)).sum())),
        participation_ratio=float(1 / (share**2).sum()),
        anisotropy=float(eigenvalues.max() / eigenvalues.min()) if resolved else None,
        sphericity=float(np.exp(np.log(eigenvalues).mean()) / eigenvalues.mean()) if resolved else 0.0,
        share_below={f"{threshold:g}": share_below(eigenvalues, threshold) for threshold in THRESHOLDS},
    )


def share_below(eigenvalues: Spectrum, threshold: float) -> ShareBelow:
    """Count the directions with a variance below the threshold, and their share of the total variance."""
    small = eigenvalues < threshold
    return ShareBelow(int(small.sum()), float(eigenvalues[small].sum() / eigenvalues.sum()))


def sampling_error(independent: float) -> float:
    """Return the relative standard error sqrt(2/n) of an eigenvalue estimated from n independent Gaussian samples.

    Asymptotic, for separated eigenvalues (Anderson 1963). Tokens of one image depend on each other: with n the images
    it is too cautious where they hardly do, and too bold only for distributions of heavier tails.
    """
    if independent < 1:
        raise ValueError("a sampling error needs at least one sample")
    return float(np.sqrt(2 / independent))


def error_by_rank(independent: float, count: int) -> Float64[np.ndarray, " d"]:
    """Return by how much eigenvalues from n samples are off, relatively, because sorting them spreads them out.

    Each is pulled down by about 1/n for every larger direction (the leading term of Lawley 1956 in a steep spectrum).
    """
    return np.arange(count) / independent


def shrunk(eigenvalues: Spectrum, independent: float) -> Spectrum:
    """Return a spectrum as drawn towards its mean as n Gaussian samples ask for (OAS: Chen et al. 2010).

    A steep spectrum or many samples leave it nearly as it is; few samples of an isotropic space become isotropic.
    """
    d, n = len(eigenvalues), independent
    squares, square_of_sum = float((eigenvalues**2).sum()), float(eigenvalues.sum()) ** 2
    apart = squares - square_of_sum / d
    if apart <= 0:
        return eigenvalues
    share = min(1.0, ((1 - 2 / d) * squares + square_of_sum) / ((n + 1 - 2 / d) * apart))
    return np.asarray((1 - share) * eigenvalues + share * eigenvalues.mean())
