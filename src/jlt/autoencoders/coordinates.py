"""Other coordinates of a latent space: an invertible linear map of its tokens, undone before anything is decoded.

In the eigenbasis of the tokens' covariance the variances lam become proportional to lam^a: 0 whitens the space, 1
leaves it as it is, more makes it steeper. The total variance stays, so that only the share of each direction changes.
Directions without variance, to rounding, stay as they are: to raise them would turn rounding into data.
A network that is trained in such coordinates sees the same data through another geometry.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder
from jlt.errors import JLTError
from jlt.patches import patch_tokens, unpatchify
from jlt.storage.files import atomic_path, sha256_file

SMALLEST = 1e-8
"""Of the largest variance: directions with less are left alone. Float16 rounds values to about this."""
STEEPEST = 1e4
"""Ratio of the factors of two directions beyond which float32 cannot be undone to 0.001 of a value."""


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
        """Return the coordinates in which a covariance has its eigenvalues raised to a power, of the same total.

        JLTError for a power that spreads the directions so far that latents could not be had back in float32.
        """
        lam, vectors = torch.linalg.eigh(covariance)
        varying = lam > SMALLEST * lam[-1]
        wanted = lam[varying] ** anisotropy
        factors = torch.ones_like(lam)
        factors[varying] = (wanted * (lam[varying].sum() / wanted.sum()) / lam[varying]).sqrt()
        apart = float(factors.max() / factors.min())
        if apart > STEEPEST:
            raise JLTError(
                f"In coordinates of anisotropy {anisotropy:g} at patch size {patch_size} some directions would count "
                f"{apart:.2g} times as much as others, which float32 cannot undo: choose a power nearer to 1."
            )
        return cls(patch_size, anisotropy, mean, (vectors * factors) @ vectors.T)

    def apply(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return latents in these coordinates, in float32."""
        return self._mapped(latents, self.matrix)

    def undo(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return latents as the autoencoder made them, in float32."""
        return self._mapped(latents, self._inverse)

    @functools.cached_property
    def _inverse(self) -> Float64[Tensor, "d d"]:
        return torch.linalg.inv(self.matrix)

    def _mapped(self, latents: Float[Tensor, "n c h w"], matrix: Float64[Tensor, "d d"]) -> Float[Tensor, "n c h w"]:
        tokens = patch_tokens(latents, self.patch_size)
        mean, matrix = self.mean.to(tokens.device), matrix.to(tokens.device)
        # In float64: an inverse of a steep spectrum magnifies what is rounded before it.
        mapped = mean + (tokens.double() - mean) @ matrix.T
        return unpatchify(mapped.float(), self.patch_size, *latents.shape[2:])

    def save(self, path: Path) -> None:
        """Write the map as safetensors."""
        words = {"patch_size": str(self.patch_size), "anisotropy": repr(self.anisotropy)}
        with atomic_path(path) as temporary:
            save_file({"mean": self.mean.contiguous(), "matrix": self.matrix.contiguous()}, temporary, words)

    @classmethod
    def load(cls, path: Path) -> Coordinates:
        """Read a map; JLTError for a file that is missing or holds anything else."""
        try:
            with safe_open(path, "pt") as file:
                words = file.metadata() or {}
                mean, matrix = file.get_tensor("mean"), file.get_tensor("matrix")
            return cls(int(words["patch_size"]), float(words["anisotropy"]), mean, matrix)
        except Exception as error:  # safetensors has an error class of its own, and others for what is missing
            raise JLTError(f"{path} holds no coordinates of a latent space ({error}).") from error


class CoordinateAutoencoder(Autoencoder):
    """An autoencoder whose latents are seen in other coordinates."""

    def __init__(self, inner: Autoencoder, path: Path) -> None:
        """`path` is where the coordinates lie; they are a part of the identity, by their hash."""
        self.inner, self.coordinates = inner, Coordinates.load(path)
        self.name, self.channels, self.downsampling = inner.name, inner.channels, inner.downsampling
        self.held_out_psnr, self.posterior = inner.held_out_psnr, inner.posterior
        self._words = {
            "source": str(path),
            "sha256": sha256_file(path),
            "patch_size": self.coordinates.patch_size,
            "anisotropy": self.coordinates.anisotropy,
        }

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the weights lie."""
        return self.inner.device

    def encode(
        self, images: Float[Tensor, "n 3 hh ww"], noise_seeds: Sequence[int] | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Return the latents of images in these coordinates."""
        return self.coordinates.apply(self.inner.encode(images, noise_seeds))

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 hh ww"]:
        """Return the images of latents that are given in these coordinates."""
        self.check_latents(latents)
        return self.inner.decode(self.coordinates.undo(latents))

    def identity(self) -> dict[str, Any]:
        """Return the identity of the autoencoder, whose normalisation also names the coordinates."""
        identity = self.inner.identity()
        return {**identity, "normalisation": {**identity["normalisation"], "coordinates": dict(self._words)}}

    def to(self, device: torch.device | str) -> CoordinateAutoencoder:
        """Move the weights in place and return the autoencoder."""
        self.inner.to(device)
        return self


def coordinates_of(identity: dict[str, Any]) -> Path | None:
    """Return where the coordinates lie that an identity names, None where it names none."""
    words = identity["normalisation"].get("coordinates") if isinstance(identity["normalisation"], dict) else None
    return Path(words["source"]) if words else None
