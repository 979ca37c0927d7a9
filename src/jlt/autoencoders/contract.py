"""The contract of an autoencoder: images in [-1, 1] to normalised latents and back, and the error of the round trip."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from jlt.errors import JLTError
from jlt.storage.codec import Size, from_json, known_fields

Posterior = Literal["mode", "sample"]


@dataclass(frozen=True)
class Identity:
    """The part of an identity by which an autoencoder is found again, and its latents are decoded."""

    name: str
    source: str
    weights_sha256: str | None
    normalisation: Mapping[str, Any]
    channels: Size
    downsampling: Size


def require_identity(identity: Any) -> None:
    """Raise JLTError unless a value that a file holds has the form of an autoencoder's identity."""
    try:
        from_json(Identity, known_fields(Identity, identity))
    except JLTError as error:
        raise JLTError(f"The latents have no possible autoencoder: {error}") from error


class Autoencoder(abc.ABC):
    """A frozen codec between images and latents, whose channels have means near 0 and variances near 1.

    `source` is the origin of the weights, `device` their place, `channels` the channel count of a latent,
    `downsampling` the image pixels per latent position along one side. `held_out_psnr` is the PSNR in dB on held-out
    images that the weights' file states, or None. `posterior` selects the latent of an image: the `mode` of the codec's
    distribution, or a `sample`.
    """

    name: str
    source: str
    channels: int
    downsampling: int
    device: torch.device
    held_out_psnr: float | None = None
    posterior: Posterior = "mode"

    @abc.abstractmethod
    def encode(
        self, images: Float[Tensor, "n 3 hh ww"], noise_seeds: Sequence[int] | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Return the float32 latents of images in [-1, 1], on the autoencoder's device.

        `noise_seeds`, one per image, is required if `posterior` is "sample" and ignored otherwise. A latent depends on
        its image and its seed alone, not on the batch. JLTError if a side is no multiple of `downsampling`.
        """

    @abc.abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 hh ww"]:
        """Return float32 images clamped to [-1, 1], on the autoencoder's device; JLTError for a wrong channel count."""

    def identity(self) -> dict[str, Any]:
        """Return JSON values that identify the codec; equal identities give equal latents.

        The defaults are those of a codec without weights and without normalisation (`kind` is `none`).
        """
        return {
            "name": self.name,
            "source": self.source,
            "class": type(self).__name__,
            "weights_sha256": None,
            "normalisation": {"kind": "none"},
            "posterior": self.posterior,
            "channels": self.channels,
            "downsampling": self.downsampling,
        }

    @abc.abstractmethod
    def to(self, device: torch.device | str) -> Autoencoder:
        """Move the weights in place and return the autoencoder."""

    def check_images(self, images: Float[Tensor, "n 3 hh ww"]) -> None:
        """Raise JLTError if the sides of the images do not fit the latent grid."""
        height, width = images.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise JLTError(
                f"Images of {height}x{width} pixels do not fit the autoencoder {self.name!r}: "
                f"choose a resolution that is a multiple of {self.downsampling}."
            )

    def check_latents(self, latents: Float[Tensor, "n c h w"]) -> None:
        """Raise JLTError if the latents have another channel count than this autoencoder."""
        if latents.shape[1] != self.channels:
            raise JLTError(
                f"Latents with {latents.shape[1]} channels are not from the autoencoder {self.name!r}, "
                f"which has {self.channels}: decode them with the autoencoder named in the store's manifest."
            )


def psnr(images: Float[Tensor, "n 3 h w"], reconstructions: Float[Tensor, "n 3 h w"]) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [-1, 1], from the mean squared error over all of them.

    It is below the mean of the images' own ratios, in which easy images hide hard ones.
    """
    error = (images.double() - reconstructions.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)
