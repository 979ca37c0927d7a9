"""The autoencoders of Stable Diffusion 1 to 3, SDXL and FLUX.1: diffusers' `AutoencoderKL` and its scaling.

With the scaling factor s and the shift factor m of the model's configuration (0 where it has none), a latent is
(z - m) * s. With a mean and a standard deviation per channel in the configuration it is (z - mean) * s / std, as
diffusers' SDXL pipelines compute it. Decoding is the exact reverse.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jlt.autoencoders.contract import Posterior
from jlt.autoencoders.pretrained import Pretrained, PretrainedAutoencoder, load_pretrained
from jlt.errors import JLTError


class KLAutoencoder(PretrainedAutoencoder):
    """A frozen `AutoencoderKL` of any size, with the mode of its posterior or a sample as the latent."""

    def __init__(self, pretrained: Pretrained, name: str, posterior: Posterior) -> None:
        super().__init__(pretrained, name, posterior)
        config = self._vae.config
        self.channels = config.latent_channels
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self._mean, self._std = self._channel_moments()

    def normalise(self, z: Float[Tensor, "n z zh zw"]) -> Float[Tensor, "n z zh zw"]:
        """Return (z - mean) * scaling_factor / std."""
        return (z - self._mean.to(z.device)) * self._vae.config.scaling_factor / self._std.to(z.device)

    def denormalise(self, latents: Float[Tensor, "n z zh zw"]) -> Float[Tensor, "n z zh zw"]:
        """Return latents * std / scaling_factor + mean."""
        mean, std = self._mean.to(latents.device), self._std.to(latents.device)
        return latents * std / self._vae.config.scaling_factor + mean

    def normalisation(self) -> dict[str, Any]:
        """Return the factors of the configuration, and the mean and std per channel where these are used."""
        config = self._vae.config
        factors = {"kind": "scale", "scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor}
        if not self._has_channel_moments():
            return factors
        return {**factors, "mean": list(config.latents_mean), "std": list(config.latents_std)}

    def _has_channel_moments(self) -> bool:
        return self._vae.config.latents_mean is not None and self._vae.config.latents_std is not None

    def _channel_moments(self) -> tuple[Float[Tensor, "1 c 1 1"], Float[Tensor, "1 c 1 1"]]:
        config = self._vae.config
        if not self._has_channel_moments():
            ones = torch.ones(1, self.channels, 1, 1)
            return ones * (config.shift_factor or 0.0), ones
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        if not len(mean) == len(std) == self.channels:
            raise JLTError(
                f"{self.source} has {self.channels} latent channels but {len(mean)} means and {len(std)} deviations: "
                "its config.json is damaged."
            )
        return mean.float().view(1, -1, 1, 1), std.float().view(1, -1, 1, 1)


def load_kl(name: str, path: str, posterior: Posterior) -> KLAutoencoder:
    """Load an `AutoencoderKL` from a folder or Hub id; JLTError as `load_pretrained`."""
    from diffusers import AutoencoderKL

    return KLAutoencoder(load_pretrained(AutoencoderKL, path), name, posterior)
