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
    anisotropy: largest over smallest eigenvalue; None (infinite) where the smallest is 0 to float64 rounding.
    sphericity: geometric over arithmetic mean of the eigenvalues (Mauchly 1940); 1 is isotropic, 0 degenerate. Unlike
        anisotropy it hears every eigenvalue, and -log(sphericity) is twice the Kullback-Leibler divergence per
        direction from N(0, Sigma) to the isotropic Gaussian of the same total variance.
    """
    total = float(eigenvalues.sum())
    if total <= 0:
        raise ValueError("a spectrum of zeros has no summary")
    share = eigenvalues / total
    positive = share[share > 0]
    # Below this an eigenvalue is what rounding left of a zero, and a ratio to it is noise.
    resolved = bool(eigenvalues.min() > eigenvalues.max() * len(eigenvalues) * np.finfo(np.float64).eps)
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


def sampling_error(independent: int) -> float:
    """Return the relative standard error sqrt(2/n) of an eigenvalue estimated from n independent Gaussian samples.

    Asymptotic, for separated eigenvalues (Anderson 1963). Tokens of one image depend on each other, so n is the number
    of images: too cautious where they hardly do, never too bold.
    """
    if independent < 1:
        raise ValueError("a sampling error needs at least one sample")
    return float(np.sqrt(2 / independent))
