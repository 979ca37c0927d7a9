"""Other coordinates of a latent space: an invertible linear map of its tokens, inverted before decoding.

In the eigenbasis of the tokens' covariance, the variances lam become proportional to lam^a: a = 0 whitens the space, 1
does not change it, larger a makes it steeper. The total variance is kept, so only the share of each direction changes.
Directions without variance, up to rounding, are kept: raising them would turn rounding errors into data. A network
trained in such coordinates learns the same data with another geometry.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from safetensors import safe_open
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.errors import JLTError
from jlt.patches import patch_tokens, unpatchify
from jlt.runtime.environment import device_of_float64
from jlt.storage.files import atomic_path, sha256_file
from jlt.storage.folders import path_inside
from jlt.storage.weights import write_tensors

SMALLEST = 1e-8
"""Share of the largest variance below which directions are kept; it is about the rounding of float16."""
STEEPEST = 1e4
"""Largest ratio of two directions' factors that float32 can invert to 0.001 of a value."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """token -> mean + matrix (token - mean), for the tokens of one patch size; `matrix` is symmetric and invertible."""

    patch_size: int
    anisotropy: float
    mean: Float64[Tensor, " d"]
    matrix: Float64[Tensor, "d d"]

    @classmethod
    def raised(
        cls, covariance: Float64[Tensor, "d d"], mean: Float64[Tensor, " d"], patch_size: int, anisotropy: float
    ) -> Coordinates:
        """Return the coordinates that raise a covariance's eigenvalues to a power and keep their sum.

        JLTError for a power that spreads the directions too far to be inverted in float32.
        """
        lam, vectors = torch.linalg.eigh(covariance)
        varying = lam > SMALLEST * lam[-1]
        raised = lam[varying] ** anisotropy
        factors = torch.ones_like(lam)
        factors[varying] = (raised * (lam[varying].sum() / raised.sum()) / lam[varying]).sqrt()
        ratio = float(factors.max() / factors.min())
        if ratio > STEEPEST:
            raise JLTError(
                f"Coordinates of anisotropy {anisotropy:g} at patch size {patch_size} scale directions by factors with "
                f"a ratio of {ratio:.2g}, which float32 cannot invert: choose a power nearer to 1."
            )
        return cls(patch_size, anisotropy, mean, (vectors * factors) @ vectors.T)

    def apply(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return latents in these coordinates, in float32."""
        return self._mapped(latents, self.matrix)

    def undo(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return latents in the autoencoder's own coordinates, in float32."""
        return self._mapped(latents, self._inverse)

    @functools.cached_property
    def _inverse(self) -> Float64[Tensor, "d d"]:
        return torch.linalg.inv(self.matrix)

    def _mapped(self, latents: Float[Tensor, "n c h w"], matrix: Float64[Tensor, "d d"]) -> Float[Tensor, "n c h w"]:
        tokens = patch_tokens(latents, self.patch_size).to(device_of_float64(str(latents.device)))
        mean, matrix = self.mean.to(tokens.device), matrix.to(tokens.device)
        # In float64, since the inverse of a steep spectrum magnifies rounding errors.
        mapped = mean + (tokens.double() - mean) @ matrix.T
        return unpatchify(mapped.float().to(latents.device), self.patch_size, *latents.shape[2:])

    def save(self, path: Path) -> None:
        """Write the map as safetensors."""
        metadata = {"patch_size": str(self.patch_size), "anisotropy": repr(self.anisotropy)}
        write_tensors(path, {"mean": self.mean, "matrix": self.matrix}, metadata)

    @classmethod
    def load(cls, path: Path) -> Coordinates:
        """Read a map; JLTError for a file that is missing or holds anything else."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                mean, matrix = file.get_tensor("mean"), file.get_tensor("matrix")
            return cls(int(metadata["patch_size"]), float(metadata["anisotropy"]), mean, matrix)
        except Exception as error:  # safetensors raises its own class, and others for missing files and tensors.
            raise JLTError(f"{path} holds no coordinates of a latent space ({error}).") from error


class CoordinateAutoencoder(Autoencoder):
    """An autoencoder whose latents are in other coordinates."""

    def __init__(self, inner: Autoencoder, folder: Path, source: str) -> None:
        """Read the coordinates from the file `source` in a folder; their hash is part of the identity."""
        # Earlier versions recorded full paths.
        path = Path(source) if Path(source).is_absolute() else path_inside(folder, source)
        self.inner, self.coordinates = inner, Coordinates.load(path)
        self.name, self.channels, self.downsampling = inner.name, inner.channels, inner.downsampling
        self.held_out_psnr, self.posterior = inner.held_out_psnr, inner.posterior
        self._coordinates_identity = {
            "source": source,
            "sha256": sha256_file(path),
            "patch_size": self.coordinates.patch_size,
            "anisotropy": self.coordinates.anisotropy,
        }

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The place of the weights."""
        return self.inner.device

    def encode(
        self, images: Float[Tensor, "n 3 hh ww"], noise_seeds: Sequence[int] | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Return the latents of images in these coordinates."""
        return self.coordinates.apply(self.inner.encode(images, noise_seeds))

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 hh ww"]:
        """Return the images of latents in these coordinates."""
        self.check_latents(latents)
        return self.inner.decode(self.coordinates.undo(latents))

    def identity(self) -> dict[str, Any]:
        """Return the identity of the autoencoder, whose normalisation also names the coordinates."""
        identity = self.inner.identity()
        normalisation = {**identity["normalisation"], "coordinates": dict(self._coordinates_identity)}
        return {**identity, "normalisation": normalisation}

    def to(self, device: torch.device | str) -> CoordinateAutoencoder:
        """Move the weights in place and return the autoencoder."""
        self.inner.to(device)
        return self


def coordinates_of(identity: Mapping[str, Any]) -> str | None:
    """Return the file of the coordinates in an autoencoder's identity, None where it has none."""
    normalisation = identity.get("normalisation")
    found = normalisation.get("coordinates") if isinstance(normalisation, dict) else None
    if found and not (isinstance(found, dict) and isinstance(found.get("source"), str)):
        raise JLTError(f"The coordinates of the latents name no file: {found}.")
    return found["source"] if found else None


def copy_coordinates(identity: Mapping[str, Any], source: Path, target: Path) -> None:
    """Copy the coordinates file that an identity names into another folder, unless that folder has it already."""
    name = coordinates_of(identity)
    if name and not Path(name).is_absolute() and not path_inside(target, name).exists():
        with atomic_path(target / name) as temporary:
            shutil.copyfile(path_inside(source, name), temporary)
