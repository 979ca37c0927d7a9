"""Power-function averages of the weights, and any other length rebuilt from stored ones (Karras et al. 2024).

"Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, section 3 and appendix C.
Symbols:

    theta_k                weights after update k = 1, 2, ...
    t                      updates that an average has seen
    gamma >= 0             exponent of an average; 0 is the plain mean
    p(tau; t, gamma)       profile of an average: its density at the moment tau in [0, t]; integrates to 1
    sigma_rel              standard deviation of p over t, in (0, 12^-1/2): the average's length
    p_i, x_i, p_r          profiles of the stored averages, their coefficients, the profile to rebuild

    (A1)  p(tau; t, gamma) = (gamma+1) tau^gamma / t^(gamma+1)
    (A2)  sigma_rel = sqrt((gamma+1) / (gamma+3)) / (gamma+2)
    (A3)  average <- beta_t average + (1 - beta_t) theta_t,    beta_t = (1 - 1/t)^(gamma+1)
    (A4)  weight of theta_k in that average: (k^(gamma+1) - (k-1)^(gamma+1)) / t^(gamma+1), p's integral over [k-1, k]
    (A5)  ||p||^2 = (gamma+1)^2 / ((2 gamma+1) t), and for t_a <= t_b
          <p_a, p_b> / (||p_a|| ||p_b||)
              = sqrt((2 gamma_a+1) (2 gamma_b+1)) / (gamma_a+gamma_b+1) * (t_a/t_b)^(gamma_b+1/2)
    (A6)  x minimises ||sum_i x_i p_i - p_r|| with sum_i x_i = 1

The paper's least squares has no constraint. Without it, the coefficients add up to less than 1 where the stored
averages cover p_r badly, which shrinks all weights. With it, weights that do not change are rebuilt exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from jlt.errors import JLTError, UsageError

WIDEST = 12**-0.5
"""sigma_rel of the plain mean of all updates; a power-function average is narrower."""
SIGMA_REL = "sigma_rel="
"""How the name of a power-function average begins."""


class Snapshot(NamedTuple):
    """A stored average: the number of its updates (1 or more), and its length (A2)."""

    updates: int
    sigma_rel: float


class Combination(NamedTuple):
    """How to rebuild an average: one coefficient per snapshot, and the residual.

    residual: ||sum_i x_i p_i - p_r|| / ||p_r||, resolved down to 1e-7. It is the relative error for weights that are
    independent from update to update; the weights of a training change slowly, so their error is smaller.
    """

    coefficients: Float64[np.ndarray, " n"]
    residual: float


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Return the exponent of an average of this length, the inverse of A2; JLTError outside (0, 12^-1/2)."""
    if not 0 < sigma_rel < WIDEST:
        raise JLTError(f"sigma_rel must be between 0 and {WIDEST:.4f}, the plain mean; it is {sigma_rel}.")
    # With h = s (gamma+2) and s = sigma_rel, A2 is the cubic h^3 + s h^2 - h + s = 0. Its largest root in closed form,
    # shifted to y = h + s/3: y^3 = 3 a y - 2 b.
    a, b = (1 + sigma_rel**2 / 3) / 3, sigma_rel**3 / 27 + 2 * sigma_rel / 3
    y = 2 * math.sqrt(a) * math.cos(math.acos(-b / a**1.5) / 3)
    return (y - sigma_rel / 3) / sigma_rel - 2


def decay(updates: int, gamma: float) -> float:
    """Return beta_t in [0, 1), the factor of the average at update t = `updates` (A3).

    At t = 1 it is 0: an average needs no first value. ValueError for t < 1 or gamma < 0.
    """
    if not (updates >= 1 and gamma >= 0):
        raise ValueError(f"updates count from 1 and gamma from 0, got {updates} and {gamma}")
    return float(((updates - 1) / updates) ** (gamma + 1))


def cosines(rows: Sequence[Snapshot], columns: Sequence[Snapshot]) -> Float64[np.ndarray, "rows columns"]:
    """Return the cosine of the angle between every two profiles (A5), in (0, 1]: no power of t is ever formed."""
    t_a, gamma_a = (values[:, None] for values in _times_and_exponents(rows))
    t_b, gamma_b = _times_and_exponents(columns)
    gamma_later = np.where(t_a > t_b, gamma_a, gamma_b)
    overlap = np.exp(-(gamma_later + 0.5) * np.abs(np.log(t_a / t_b)))
    return np.sqrt((2 * gamma_a + 1) * (2 * gamma_b + 1)) / (gamma_a + gamma_b + 1) * overlap


def coefficients(snapshots: Sequence[Snapshot], target_updates: int, target_sigma_rel: float) -> Combination:
    """Return how to rebuild the average of length `target_sigma_rel` at update `target_updates` (A6).

    Snapshots may come in any order. A snapshot after the target gets 0, because it contains weights that the target
    cannot contain; so does a repeated one. A snapshot that equals the target gets 1, and all others 0. The residual is
    small at updates with snapshots, and large between them, where no stored average contains the latest weights.
    JLTError if no snapshot was taken up to the target or a length is outside (0, 12^-1/2); ValueError for updates
    below 1.
    """
    target = Snapshot(target_updates, target_sigma_rel)
    found = np.zeros(len(snapshots))
    if target in snapshots:
        found[snapshots.index(target)] = 1.0
        return Combination(found, 0.0)
    stored = list(dict.fromkeys(snapshot for snapshot in snapshots if snapshot.updates <= target.updates))
    if not stored:
        raise JLTError(f"No average was stored up to update {target_updates}, so none can be rebuilt there.")
    fitted, residual = _fit(stored, target)
    found[[snapshots.index(snapshot) for snapshot in stored]] = fitted
    return Combination(found, residual)


def reconstruct(
    stored: Iterable[tuple[float, Callable[[], Mapping[str, Tensor]]]],
) -> dict[str, Float32[Tensor, "..."]]:
    """Return the sum of coefficient times snapshot, tensor by tensor, in float32 on the CPU.

    stored: for each snapshot its coefficient and a function that reads it. They are read one after the other, and only
    if the coefficient is not 0. The sum is float64, since coefficients of either sign cancel; a single coefficient of 1
    returns the snapshot bit for bit. ValueError if all are 0, or if two snapshots differ in names or shapes.
    """
    total: dict[str, Tensor] = {}
    for coefficient, read in stored:
        if coefficient != 0:
            # In a function of its own, which lets go of a snapshot before the next one is read.
            _add(total, float(coefficient), read())
    if not total:
        raise ValueError("there is no snapshot with a coefficient other than 0")
    return {name: total.pop(name).float() for name in list(total)}


def _add(total: dict[str, Tensor], coefficient: float, values: Mapping[str, Tensor]) -> None:
    if not total:
        total.update({name: torch.zeros(value.shape, dtype=torch.float64) for name, value in values.items()})
    if {name: value.shape for name, value in values.items()} != {name: value.shape for name, value in total.items()}:
        raise ValueError("the snapshots differ in the names or shapes of their tensors")
    for name, value in values.items():
        total[name].add_(value.detach().cpu(), alpha=coefficient)


def parse_sigma_rel(name: str) -> float:
    """Return 0.07 for `sigma_rel=0.07`; UsageError, a JLTError, for anything else."""
    try:
        sigma_rel = float(name.removeprefix(SIGMA_REL)) if name.startswith(SIGMA_REL) else math.nan
        gamma_from_sigma_rel(sigma_rel)
    except (ValueError, JLTError) as error:
        raise UsageError(
            f"{name!r} does not name a length: write {SIGMA_REL}0.07, with a number between 0 and {WIDEST:.4f}."
        ) from error
    return sigma_rel


def format_sigma_rel(sigma_rel: float) -> str:
    """Return `sigma_rel=0.07` for 0.07, in as many digits as `parse_sigma_rel` needs to return the same number."""
    gamma_from_sigma_rel(sigma_rel)
    return f"{SIGMA_REL}{float(sigma_rel)!r}"


def _times_and_exponents(snapshots: Sequence[Snapshot]) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    times = np.array([snapshot.updates for snapshot in snapshots], dtype=np.float64)
    if not (times >= 1).all():
        raise ValueError(f"updates count from 1, got {times.min():.0f}")
    return times, np.array([gamma_from_sigma_rel(snapshot.sigma_rel) for snapshot in snapshots])


def _norms(snapshots: Sequence[Snapshot]) -> Float64[np.ndarray, " n"]:
    """Return ||p|| of each profile (A5)."""
    times, gammas = _times_and_exponents(snapshots)
    return (gammas + 1) / np.sqrt((2 * gammas + 1) * times)


def _fit(stored: Sequence[Snapshot], target: Snapshot) -> tuple[Float64[np.ndarray, " n"], float]:
    """Solve A6 for profiles of norm 1, whose coefficients are y_i = x_i ||p_i|| / ||p_r||, by a Lagrange multiplier."""
    gram, overlap = cosines(stored, stored), cosines(stored, [target])[:, 0]
    scale = _norms([target]) / _norms(stored)
    system = np.block([[gram, scale[:, None]], [scale[None, :], np.zeros((1, 1))]])
    # Nearly equal snapshots make it nearly singular; the smallest of all solutions then weights them equally.
    y = np.linalg.lstsq(system, np.append(overlap, 1.0), rcond=None)[0][:-1]
    squared = 1 - 2 * overlap @ y + y @ gram @ y
    return y * scale, math.sqrt(max(float(squared), 0.0))
