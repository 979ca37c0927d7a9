"""FLUX.2's autoencoder through diffusers, at its own size and at the small bundled size.

Encoding takes the mode of the posterior, puts p x p positions into channels in the order
(B, C, H/p, p, W/p, p) -> (B, C, p, p, H/p, W/p), and normalises by the autoencoder's own batch-norm statistics,
(latent - running_mean) / sqrt(running_var + batch_norm_eps). Decoding is the exact reverse. p is 2 for FLUX.2.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from jlt.autoencoders.pretrained import Pretrained, PretrainedAutoencoder, load_pretrained


class Flux2Autoencoder(PretrainedAutoencoder):
    """A frozen `AutoencoderKLFlux2` of any size."""

    def __init__(self, pretrained: Pretrained, name: str) -> None:
        super().__init__(pretrained, name)
        config = self._vae.config
        self._patch_size: int = config.patch_size[0]
        self.channels = self._vae.bn.num_features
        self.downsampling = self._patch_size * 2 ** (len(config.block_out_channels) - 1)

    def normalise(self, z: Float[Tensor, "n z zh zw"]) -> Float[Tensor, "n c h w"]:
        """Return (packed z - running_mean) / sqrt(running_var + eps)."""
        mean, std = self._moments()
        return (functional.pixel_unshuffle(z, self._patch_size) - mean) / std

    def denormalise(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n z zh zw"]:
        """Return z, unpacked from latents * sqrt(running_var + eps) + running_mean."""
        mean, std = self._moments()
        return functional.pixel_shuffle(latents * std + mean, self._patch_size)

    def normalisation(self) -> dict[str, Any]:
        """Return eps; the running statistics are among the weights."""
        return {"kind": "batch_norm", "eps": self._vae.bn.eps}

    def _moments(self) -> tuple[Float[Tensor, "1 c 1 1"], Float[Tensor, "1 c 1 1"]]:
        mean, variance = self._vae.bn.running_mean, self._vae.bn.running_var
        return mean.float().view(1, -1, 1, 1), (variance.float() + self._vae.bn.eps).sqrt().view(1, -1, 1, 1)


def load_flux2(name: str, path: str) -> Flux2Autoencoder:
    """Load an `AutoencoderKLFlux2` from a folder or Hub id; JLTError as `load_pretrained`."""
    from diffusers import AutoencoderKLFlux2

    return Flux2Autoencoder(load_pretrained(AutoencoderKLFlux2, path), name)
