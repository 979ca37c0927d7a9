"""The velocity error of trained networks by eigen-direction of the tokens and by time, against eq. 11.

All networks get the same latents, noise and times, so their difference is known far better than each error by itself.
There are two optima for comparison. That of a token by itself is eq. 11 on its own spectrum; a network that uses all
tokens and the class may undercut it. That of whole latents as one Gaussian uses their full covariance where it is small
enough to be formed, else their covariance by spatial frequency, as if positions were a torus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from jlt.config import SampleConfig
from jlt.errors import JLTError
from jlt.experiments.sample_spectrum import Directions, decoder_sensitivity, sampled_states
from jlt.geometry.accumulate import Latents, Moments
from jlt.geometry.assemble import rows
from jlt.geometry.covariance import StationaryCovariance, TokenCovariance, frequencies, multiplicity
from jlt.geometry.gaussian import conditional_variance
from jlt.geometry.tokens import eigenbasis
from jlt.interop.importing import IMPORTED
from jlt.patches import patch_tokens, unpatchify
from jlt.ranges import Ranged
from jlt.results.geometry import Band, ErrorByDirection, ErrorDifference, NetworkError
from jlt.runtime.processes import Group, rank0_value, stop_together
from jlt.runtime.progress import bar
from jlt.runtime.random_numbers import derive_seed, normal_per_sample, random_subset
from jlt.sampling.guidance import NOISE_END, Denoiser
from jlt.sampling.sampler import LatentSampler, matching_autoencoder, open_weights
from jlt.storage.files import difference, format_difference
from jlt.training.averages import choose_name
from jlt.training.checkpoint import Checkpoint

MEASURED_TIMES = (NOISE_END, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""From the first time at which noise prediction has a velocity to one with little noise left."""
BATCH_SIZE = 128
DECODED = 16
"""Latents in which the decoder's sensitivity is measured."""
BANDS = ((0.0, 0.01), (0.01, 0.1), (0.1, 1.0), (1.0, None))
"""Directions by their variance, from..to, in units of the noise's; None is infinite."""


LATENTS = ("autoencoder", "source", "resolution")
"""What identifies the latents of a training."""
SPACE = ("name", "channels", "downsampling")
"""What identifies an autoencoder whose weights are unknown."""


@dataclass(frozen=True)
class Networks(Ranged):
    """Trained networks to be measured, their weights, and the number of latents."""

    checkpoints: Sequence[Checkpoint]
    num: int = 1024
    ema: str = ""
    """The weights; empty takes a run's first EMA."""
    samples: int = 0
    """Samples of each network that are compared with the data; 0 draws none, and loads no decoder."""
    steps: int = 50
    """Steps of their solver."""
    decoder: str | None = None
    """The decoder whose sensitivity is measured; by default the autoencoder of the latents."""

    @property
    def patch_size(self) -> int:
        """The patch size of all of them."""
        return self.checkpoints[0].config.network.patch_size

    @property
    def noise_scale(self) -> float:
        """The scale of the noise of all of them."""
        return self.checkpoints[0].config.noise_scale


@dataclass(frozen=True)
class Basis(Directions):
    """The eigen-directions of tokens, and the unavoidable error along each of them at each time."""

    optimum: Float64[np.ndarray, "t d"]
    whole_optimum: Float64[np.ndarray, "t d"]
    whole_estimate: Literal["exact", "stationary"]


def measure_error_by_direction(
    networks: Networks, store: Latents, moments: Moments | None, device: str, group: Group, seed: int = 0
) -> ErrorByDirection:
    """Return the errors of networks by time and direction, in all processes, which share the work.

    `moments` are those of the store for the networks' patch size, in the first process; None in the others. `num`
    latents are drawn from the store, the same for all networks and any number of processes.
    """
    basis = group.on_rank0(lambda: measure_basis(rank0_value(moments), networks.patch_size, networks.noise_scale))
    numbers = random_subset(len(store), networks.num)
    autoencoder = None
    if networks.samples:
        # Before the first sample: its weights may be missing.
        run = networks.checkpoints[0].run
        autoencoder = matching_autoencoder(store.identity()["autoencoder"], None, device, networks.decoder, run)
    found = []
    for checkpoint in networks.checkpoints:
        weights = open_weights(checkpoint, networks.ema, device)
        errors = velocity_errors(weights.denoiser, store, numbers, basis, seed, device, group)
        states = None
        if networks.samples:
            settings = SampleConfig(num=networks.samples, steps=networks.steps, batch_size=BATCH_SIZE, seed=seed)
            sampler = LatentSampler(weights.denoiser, store.shape, settings, device, basis.noise_scale)
            states = sampled_states(sampler, basis, group)
        found.append((checkpoint, weights.identity, errors, states))

    def assemble() -> ErrorByDirection:
        squares = [rank0_value(errors).squares for _, _, errors, _ in found]
        data = rank0_value(moments).stationary
        return ErrorByDirection(
            patch_size=networks.patch_size,
            latents=store.identity(),
            count=len(numbers),
            seed=seed,
            times=MEASURED_TIMES,
            eigenvalues=tuple(basis.eigenvalues.tolist()),
            optimum=rows(basis.optimum),
            whole_optimum=rows(basis.whole_optimum),
            whole_estimate=basis.whole_estimate,
            networks=tuple(
                replace(
                    network_error(checkpoint, identity, rank0_value(errors), basis),
                    samples=states.spectrum(data, networks.steps) if states else None,
                )
                for checkpoint, identity, errors, states in found
            ),
            beyond_the_first=tuple(
                ErrorDifference(*map(rows, _mean_and_error(errors - squares[0]))) for errors in squares[1:]
            ),
            decoder=decoder_sensitivity(autoencoder, store.gather(numbers[:DECODED])[0].float(), basis)
            if autoencoder
            else None,
        )

    return group.on_rank0(assemble)


def measure_basis(moments: Moments, patch_size: int, noise_scale: float = 1.0) -> Basis:
    """Return the directions of tokens with the optima of eq. 11, of tokens and of whole latents."""
    eigenvalues, vectors = eigenbasis(moments.tokens[patch_size])
    vectors, stationary, whole = vectors.cpu(), moments.stationary, moments.whole
    of_tokens = patch_size, noise_scale, eigenvalues, vectors, unavoidable_error(eigenvalues, noise_scale)
    if isinstance(whole, TokenCovariance):
        exact = whole_optimum(whole.covariance.cpu(), stationary.shape, patch_size, vectors, noise_scale)
        return Basis(*of_tokens, exact, "exact")
    return Basis(*of_tokens, stationary_optimum(stationary, patch_size, vectors, noise_scale), "stationary")


@dataclass(frozen=True)
class VelocityErrors:
    """Each latent's squared error along each direction, the mean over its tokens, and the calibration of the outputs.

    The calibration is the slope of the regression of v on v^ along a direction.
    """

    squares: Float64[Tensor, "t n d"]
    calibration: Float64[np.ndarray, "t d"]


def unavoidable_error(lam: Float64[np.ndarray, " d"], noise_scale: float) -> Float64[np.ndarray, "t d"]:
    """Return eq. 11 for velocity at all times, for noise of any scale: of x / s in units of s^2."""
    risk = conditional_variance("v", lam / noise_scale**2, np.array(MEASURED_TIMES)[:, None])
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
    return np.asarray(unavoidable_error(lam.clamp_min(0).cpu().numpy(), noise_scale) @ share)


def stationary_optimum(
    stationary: StationaryCovariance, patch_size: int, vectors: Float64[Tensor, "d d"], noise_scale: float
) -> Float64[np.ndarray, "t d"]:
    """Return eq. 11 for whole latents whose covariance depends on the distance of positions alone, along tokens.

    Spatial frequencies are then independent. A token's direction, placed anywhere in a latent, has coefficients at each
    of them, and the C x C matrix there gives its error.
    """
    height, width = stationary.shape[1:]
    tokens = torch.zeros(len(vectors), height * width // patch_size**2, len(vectors), dtype=torch.float64)
    tokens[:, 0] = vectors.T
    placed = frequencies(unpatchify(tokens, patch_size, height, width)).to(stationary.device)
    lam, w = torch.linalg.eigh(stationary.scatter / (stationary.images - 1))
    share = (placed.conj() @ w).abs().square()
    share *= torch.as_tensor(multiplicity(height, width), device=share.device)[:, None, None]
    risk = unavoidable_error(lam.clamp_min(0).flatten().cpu().numpy(), noise_scale)
    return np.asarray(risk @ share.transpose(1, 2).reshape(-1, len(vectors)).cpu().numpy())


@torch.inference_mode()
def velocity_errors(
    denoiser: Denoiser,
    store: Latents,
    numbers: Int64[np.ndarray, " n"],
    basis: Basis,
    seed: int,
    device: str,
    group: Group,
) -> VelocityErrors | None:
    """Return the errors of the velocity on the path between latents and noise, at every time.

    The processes share the latents; the first returns the errors of all, the others None. Stopped on request.
    """
    starts, found, seen = range(0, len(numbers), BATCH_SIZE), [], group.begin()
    with stop_together(group) as until_stopped, bar("measuring the networks", len(numbers)) as shown:
        for start in until_stopped(starts[group.rank :: group.size]):
            chosen = numbers[start : start + BATCH_SIZE]
            latents, labels = store.gather(chosen)
            x, labels = latents.to(device).float(), labels.to(device)
            seeds = [derive_seed(seed, "inside", number) for number in chosen.tolist()]
            eps = basis.noise_scale * normal_per_sample(seeds, x.shape[1:], device)
            target, errors, sums = basis.components(x - eps), [], []
            for t in MEASURED_TIMES:
                output = basis.components(denoiser.velocity(t * x + (1 - t) * eps, t, labels))
                errors.append((output - target).square().mean(1).cpu())
                moments = torch.stack((output, target, output.square(), output * target))
                sums.append(moments.mean(2).sum(1).cpu())
            found.append((start, torch.stack(errors), torch.stack(sums)))
            shown.show(group.add(seen, len(chosen)))
    whole = group.reduce_to_rank0(found, list.extend)
    if whole is None:
        return None
    _, parts, part_sums = zip(*sorted(whole, key=itemgetter(0)), strict=True)
    output, target, square, product = (sum(part_sums) / len(numbers)).unbind(1)
    slope = (product - output * target) / (square - output.square()).clamp_min(torch.finfo(torch.float64).tiny)
    return VelocityErrors(torch.cat(parts, dim=1), slope.numpy())


def _mean_and_error(values: Float64[Tensor, "t n d"]) -> tuple[Float64[np.ndarray, "t d"], Float64[np.ndarray, "t d"]]:
    return values.mean(1).numpy(), (values.std(1) / values.shape[1] ** 0.5).numpy()


def network_error(
    checkpoint: Checkpoint,
    identity: Mapping[str, Any],
    errors: VelocityErrors,
    basis: Basis,
) -> NetworkError:
    """Return the errors of one network: means over latents, and their sums over bands of directions."""
    mean, standard_error = _mean_and_error(errors.squares)
    lam = basis.eigenvalues / basis.noise_scale**2
    bands = []
    for low, high in BANDS:
        inside = (lam >= low) & (lam < (np.inf if high is None else high))
        if inside.any():
            error, beyond = (tuple(values[:, inside].sum(1).tolist()) for values in (mean, mean - basis.optimum))
            bands.append(Band(int(inside.sum()), error, beyond, low, high))
    return NetworkError(
        name=checkpoint.config.name,
        run=checkpoint.run.name,
        step=checkpoint.step,
        prediction=checkpoint.config.prediction,
        **identity,
        error=rows(mean),
        standard_error=rows(standard_error),
        bands=tuple(bands),
        calibration=rows(errors.calibration),
    )


def require_measurable(networks: Networks, store: Latents) -> None:
    """Raise JLTError for networks that cannot be compared on these latents, and for unknown weights."""
    require_comparable(networks.checkpoints, store)
    for checkpoint in networks.checkpoints:
        choose_name(checkpoint, networks.ema)


def require_comparable(checkpoints: Sequence[Checkpoint], store: Latents) -> None:
    """Raise JLTError for checkpoints of other latents, and for networks of different patch sizes or noise scales."""
    sizes = {checkpoint.config.network.patch_size for checkpoint in checkpoints}
    scales = {checkpoint.config.noise_scale for checkpoint in checkpoints}
    for values, what, shared in ((sizes, "patch sizes", "directions"), (scales, "noise scales", "noise")):
        if len(values) > 1:
            raise JLTError(f"Networks of different {what} have no common {shared}: {sorted(values)}.")
    for checkpoint in checkpoints:
        found, wanted = ({key: side[key] for key in LATENTS} for side in (checkpoint.latents, store.identity()))
        if IMPORTED in found["source"]:
            # The data and the weights of the autoencoder of an imported run are unknown.
            found, wanted = (
                {"resolution": side["resolution"], **{key: side["autoencoder"][key] for key in SPACE}}
                for side in (found, wanted)
            )
        if differences := difference(found, wanted):
            raise JLTError(f"{checkpoint.folder} was not trained on these latents: {format_difference(differences)}.")
