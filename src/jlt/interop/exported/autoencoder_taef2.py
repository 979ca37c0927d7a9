"""TAEF2 (Ollin Boer Bohan, `madebyollin/taef2`) as a model of diffusers."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from jlt.autoencoders.taef2 import PATCH_SIZE, Decoder, Encoder


class AutoencoderTAEF2(ModelMixin, ConfigMixin):
    """Both networks, under the names of the public file."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def encode(self, images: Float[Tensor, "n 3 hh ww"]) -> Float[Tensor, "n 128 h w"]:
        """Return the latents of images in [-1, 1], whose sides are multiples of 16."""
        return functional.pixel_unshuffle(self.encoder(images / 2 + 0.5), PATCH_SIZE)

    def decode(self, latents: Float[Tensor, "n 128 h w"]) -> DecoderOutput:
        """Return the images of latents in `sample`, nearly in [-1, 1]."""
        z = functional.pixel_shuffle(latents, PATCH_SIZE).contiguous(memory_format=torch.channels_last)
        return DecoderOutput(sample=2 * self.decoder(z) - 1)
