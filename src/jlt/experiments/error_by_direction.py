"""Where trained networks err: the velocity error by eigen-direction of the tokens and by time, against eq. 11.

All networks see the same latents, noise and times, so that what differs between them is known far better than each by
itself. Two optima are given beside: that of a token by itself (eq. 11 on its own spectrum), which a network that looks
at all tokens and the class may well undercut, and that of whole latents as one Gaussian: of their full covariance where
it is small enough to be formed, else of their covariance by spatial frequency, as if positions were a torus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from jlt.errors import JLTError, UsageError
from jlt.geometry.accumulate import Latents, Moments
from jlt.geometry.covariance import TokenCovariance
from jlt.geometry.gaussian import conditional_variance
from jlt.geometry.stationary import StationaryCovariance, frequencies, multiplicity
from jlt.geometry.tokens import eigenbasis
from jlt.patches import join_tokens, patch_tokens
from jlt.report.study import INSIDE_SCHEMA
from jlt.runtime.processes import Group, rank0_value, stop_together
from jlt.runtime.progress import bar
from jlt.runtime.random_numbers import derive_seed, normal_per_sample, random_subset
from jlt.sampling.guidance import NOISE_END, Denoiser
from jlt.sampling.sampler import open_weights
from jlt.storage.files import difference, format_difference
from jlt.training.checkpoint import Checkpoint

TIMES = (NOISE_END, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""From where noise prediction can be asked to where little noise is left."""
BATCH_SIZE = 128
BANDS = (
    ("with less than a hundredth of the noise's variance", 0.0, 0.01),
    ("with a hundredth to a tenth of it", 0.01, 0.1),
    ("with a tenth to all of it", 0.1, 1.0),
    ("with more than the noise", 1.0, np.inf),
)
"""Directions by their variance, from..to, in units of the noise's."""


WholeEstimate = Literal["exact", "stationary"]


@dataclass(frozen=True)
class Networks:
    """Trained networks that are looked into: with which of their weights, and on how many latents."""

    checkpoints: Sequence[Checkpoint]
    num: int = 1024
    ema: str = ""
    """Which weights; empty takes a run's first EMA."""

    def __post_init__(self) -> None:
        if self.num < 2:
            raise UsageError(f"--num must be 2 or more: errors of means need several latents, not {self.num}.")

    @property
    def patch_size(self) -> int:
        """The patch size of all of them."""
        return self.checkpoints[0].config.network.patch_size

    @property
    def noise_scale(self) -> float:
        """The scale of the noise of all of them."""
        return self.checkpoints[0].config.noise_scale


@dataclass(frozen=True)
class Basis:
    """The eigen-directions of tokens as columns, their variances, and what nobody can avoid in each at each time."""

    patch_size: int
    eigenvalues: Float64[np.ndarray, " d"]
    vectors: Float64[Tensor, "d d"]
    optimum: Float64[np.ndarray, "t d"]
    whole_optimum: Float64[np.ndarray, "t d"]
    whole_estimate: WholeEstimate


def measure_error_by_direction(
    networks: Networks, store: Latents, moments: Moments | None, device: str, group: Group, seed: int = 0
) -> dict[str, Any]:
    """Return the errors of networks by time and direction, as JSON values, in all processes, which share the work.

    `moments` are what the first process saw of the store, with the networks' patch size; the others have none. `num`
    latents are drawn from the store, the same for all networks and any number of processes.
    """
    scale = networks.noise_scale
    basis = group.on_rank0(lambda: measure_basis(rank0_value(moments), networks.patch_size, scale))
    numbers = random_subset(len(store), networks.num)
    found = []
    for checkpoint in networks.checkpoints:
        weights = open_weights(checkpoint, networks.ema, device)
        squares = squared_errors(weights.denoiser, store, numbers, basis, scale, seed, device, group)
        found.append((checkpoint, weights.identity, squares))

    def describe() -> dict[str, Any]:
        seen = [(checkpoint, identity, rank0_value(squares)) for checkpoint, identity, squares in found]
        first = seen[0][2]
        beyond = [_mean_and_error(squares - first) for _, _, squares in seen[1:]]
        return {
            "schema": INSIDE_SCHEMA,
            "patch_size": networks.patch_size,
            "latents": store.identity(),
            "count": len(numbers),
            "seed": seed,
            "times": list(TIMES),
            "eigenvalues": basis.eigenvalues.tolist(),
            "optimum": basis.optimum.tolist(),
            "whole_optimum": basis.whole_optimum.tolist(),
            "whole_estimate": basis.whole_estimate,
            "networks": [_describe(*network, basis, scale) for network in seen],
            "beyond_the_first": [{"difference": mean.tolist(), "error": error.tolist()} for mean, error in beyond],
        }

    return group.on_rank0(describe)


def measure_basis(moments: Moments, patch_size: int, noise_scale: float = 1.0) -> Basis:
    """Return the directions of tokens with the optima of eq. 11, of tokens and of whole latents."""
    eigenvalues, vectors = eigenbasis(moments.tokens[patch_size])
    vectors, stationary = vectors.cpu(), moments.stationary
    estimate: WholeEstimate
    if isinstance(moments.whole, TokenCovariance):
        covariance = moments.whole.covariance.cpu()
        estimate, whole = "exact", whole_optimum(covariance, stationary.shape, patch_size, vectors, noise_scale)
    else:
        estimate, whole = "stationary", stationary_optimum(stationary, patch_size, vectors, noise_scale)
    return Basis(patch_size, eigenvalues, vectors, _unavoidable(eigenvalues, noise_scale), whole, estimate)


def _unavoidable(lam: Float64[np.ndarray, " d"], noise_scale: float) -> Float64[np.ndarray, "t d"]:
    """Return eq. 11 for velocity at all times, for noise of any scale: of x / s in units of s^2."""
    risk = conditional_variance("v", lam / noise_scale**2, np.array(TIMES)[:, None])
    return np.asarray(noise_scale**2 * risk)


def whole_optimum(
    covariance: Float64[Tensor, "D D"],
    shape: tuple[int, int, int],
    patch_size: int,
    vectors: Float64[Tensor, "d d"],
    noise_scale: float,
) -> Float64[np.ndarray, "t d"]:
    """Return eq. 11 for whole latents as one Gaussian, as it appears along the directions of tokens.

    The unavoidable error has the eigen-directions w of the whole covariance and lam / D along them; along a token's
    direction it is the sum over w of that, times the mean over positions of the squared component of w there.
    """
    lam, w = torch.linalg.eigh(covariance)
    tokens = patch_tokens(w.T.reshape(-1, *shape), patch_size) @ vectors
    share = tokens.square().view(len(lam), -1, len(vectors)).mean(1).cpu().numpy()
    return np.asarray(_unavoidable(lam.clamp_min(0).cpu().numpy(), noise_scale) @ share)


def stationary_optimum(
    stationary: StationaryCovariance, patch_size: int, vectors: Float64[Tensor, "d d"], noise_scale: float
) -> Float64[np.ndarray, "t d"]:
    """Return eq. 11 for whole latents whose covariance depends on the distance of positions alone, along tokens.

    Spatial frequencies are independent of each other then. A token's direction, placed anywhere in a latent, has
    coefficients at each of them, and meets the error of the C x C matrix there.
    """
    height, width = stationary.shape[1:]
    tokens = torch.zeros(len(vectors), height * width // patch_size**2, len(vectors), dtype=torch.float64)
    tokens[:, 0] = vectors.T
    placed = frequencies(join_tokens(tokens.flatten(0, 1), patch_size, stationary.shape)).to(stationary.device)
    lam, w = torch.linalg.eigh(stationary.scatter / (stationary.images - 1))
    share = (placed.conj() @ w).abs().square()
    share *= torch.as_tensor(multiplicity(height, width), device=share.device)[:, None, None]
    risk = _unavoidable(lam.clamp_min(0).flatten().cpu().numpy(), noise_scale)
    return np.asarray(risk @ share.transpose(1, 2).reshape(-1, len(vectors)).cpu().numpy())


@torch.inference_mode()
def squared_errors(
    denoiser: Denoiser,
    store: Latents,
    numbers: Int64[np.ndarray, " n"],
    basis: Basis,
    noise_scale: float,
    seed: int,
    device: str,
    group: Group,
) -> Float64[Tensor, "t n d"] | None:
    """Return each latent's squared velocity error along each direction, the mean over its tokens, at every time.

    The processes share the latents; the first has them all in the end, the others None. Stopped when asked to end.
    """
    starts, found, seen = range(0, len(numbers), BATCH_SIZE), [], group.begin()
    with stop_together(group) as until_stopped, bar("looking inside", len(numbers)) as shown:
        for start in until_stopped(starts[group.rank :: group.size]):
            chosen = numbers[start : start + BATCH_SIZE]
            latents, labels = store.gather(chosen)
            x, labels = latents.to(device).float(), labels.to(device)
            seeds = [derive_seed(seed, "inside", number) for number in chosen.tolist()]
            eps = noise_scale * normal_per_sample(seeds, x.shape[1:], device)
            velocities = (denoiser.velocity(t * x + (1 - t) * eps, t, labels) for t in TIMES)
            errors = torch.stack([along(velocity - (x - eps), basis) for velocity in velocities])
            found.append((start, errors))
            shown.show(group.add(seen, len(chosen)))
    whole = group.reduce_to_rank0(found, list.extend)
    return None if whole is None else torch.cat([errors for _, errors in sorted(whole, key=itemgetter(0))], dim=1)


def along(error: Float[Tensor, "n c h w"], basis: Basis) -> Float64[Tensor, "n d"]:
    """Return the mean over tokens of the squared components of an error along the directions, on the CPU."""
    tokens = patch_tokens(error.double(), basis.patch_size) @ basis.vectors.to(error.device)
    return tokens.square().view(len(error), -1, len(basis.eigenvalues)).mean(1).cpu()


def _mean_and_error(values: Float64[Tensor, "t n d"]) -> tuple[Tensor, Tensor]:
    return values.mean(1), values.std(1) / values.shape[1] ** 0.5


def _describe(
    checkpoint: Checkpoint, identity: Any, squares: Float64[Tensor, "t n d"], basis: Basis, noise_scale: float
) -> dict[str, Any]:
    mean, error = _mean_and_error(squares)
    excess = mean.numpy() - basis.optimum
    lam = basis.eigenvalues / noise_scale**2
    return {
        "name": checkpoint.config.name,
        "run": checkpoint.run.name,
        "step": checkpoint.step,
        "prediction": checkpoint.config.prediction,
        **identity,
        "error": mean.tolist(),
        "standard_error": error.tolist(),
        "bands": [
            {
                "name": name,
                "directions": int(inside.sum()),
                "error": mean[:, inside].sum(1).tolist(),
                "beyond_optimum": excess[:, inside].sum(1).tolist(),
            }
            for name, low, high in BANDS
            if (inside := (lam >= low) & (lam < high)).any()
        ],
    }


def require_comparable(checkpoints: Sequence[Checkpoint], store: Latents) -> None:
    """Raise JLTError for checkpoints of other latents, and for networks of unlike patch sizes or scales of noise."""
    sizes = {checkpoint.config.network.patch_size for checkpoint in checkpoints}
    if len(sizes) > 1:
        raise JLTError(f"Networks of unlike patch sizes have no common directions: {sorted(sizes)}.")
    scales = {checkpoint.config.noise_scale for checkpoint in checkpoints}
    if len(scales) > 1:
        raise JLTError(f"Networks for noise of unlike scales see no common noise: {sorted(scales)}.")
    for checkpoint in checkpoints:
        wanted = {key: store.identity()[key] for key in ("autoencoder", "source", "resolution")}
        lines = difference({key: checkpoint.latents[key] for key in wanted}, wanted)
        if lines:
            raise JLTError(f"{checkpoint.folder} was not trained on these latents: {format_difference(lines)}.")
