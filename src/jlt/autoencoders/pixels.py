"""Images as their own latents, for diffusion in pixel space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from jlt.autoencoders.contract import Autoencoder


class PixelAutoencoder(Autoencoder):
    """The identity map: a latent is the image in [-1, 1], one position per pixel, not normalised."""

    name = "pixels"
    source = "built in"
    channels = 3
    downsampling = 1

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def encode(
        self,
        images: Float[Tensor, "n 3 h w"],
        noise_seeds: Sequence[int] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "n 3 h w"]:
        """Return the images themselves."""
        return images.to(self.device, torch.float32)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h w"]:
        """Return the latents clamped to [-1, 1]; JLTError unless they have 3 channels."""
        self.check_latents(latents)
        return latents.to(self.device, torch.float32).clamp(-1, 1)

    def to(self, device: torch.device | str) -> PixelAutoencoder:
        """Make encode and decode return their results on `device`."""
        self.device = torch.device(device)
        return self
