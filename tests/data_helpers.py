"""Shared by tests of data: a small source, a small autoencoder, a store of both, random images, a hostile pickle."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from noise_source import NoiseSource, noise_image
from torch import Tensor
from torch.nn import functional

from jlt.autoencoders.contract import Autoencoder
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode_source
from jlt.latents.manifest import StoreManifest


class PatchAutoencoder(Autoencoder):
    """Latents are the 4x4 patches of an image, 48 channels, times a scale; slow, or changed, on request."""

    name = "patches"
    channels = 48
    downsampling = 4
    device = torch.device("cpu")

    def __init__(
        self,
        scale: float = 3**0.5,
        kind: str = "scale",
        delay: float = 0.0,
        change: Callable[[Tensor], Tensor] = lambda latents: latents,
    ) -> None:
        self.scale, self.kind, self.delay, self.change = scale, kind, delay, change

    def encode(self, images: Tensor, noise_seeds: Sequence[int] | None = None) -> Tensor:
        time.sleep(self.delay)
        return self.change(functional.pixel_unshuffle(images, 4) * self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        return functional.pixel_shuffle(latents / self.scale, 4).clamp(-1, 1)

    def identity(self) -> dict[str, Any]:
        normalisation = {"kind": self.kind, "scale": self.scale}
        return {"name": self.name, "source": "test", "weights_sha256": None, "normalisation": normalisation}

    def to(self, device: torch.device | str) -> PatchAutoencoder:
        return self


CONFIG = EncodeConfig("noise", "patches", resolution=8, batch_size=4, shard_size=10, dtype="float32", workers=0)
SMALL_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "latent_channels": 4,
    "norm_num_groups": 4,
}
"""Settings of an AutoencoderKL, or of an AutoencoderKLFlux2: 4 pixels per position of a KL latent."""


def make_store(folder: Path, count: int = 37, **changes: Any) -> StoreManifest:
    return encode_source(NoiseSource(count), PatchAutoencoder(), dataclasses.replace(CONFIG, **changes), folder)


def expected_latents(index: int, flip: bool = False) -> np.ndarray:
    """The latent of image `index`, computed pixel by pixel rather than by the code under test."""
    pixels = noise_image(index).astype(np.float64) / 127.5 - 1
    if flip:
        pixels = pixels[:, ::-1]
    latents = np.empty((48, 2, 2))
    for channel in range(3):
        for dy in range(4):
            for dx in range(4):
                latents[channel * 16 + dy * 4 + dx] = pixels[dy::4, dx::4, channel] * 3**0.5
    return latents


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, height: int, width: int) -> Tensor:
    """Pixels 0..255, with channels last."""
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator(height))


def some_images(count: int = 3, height: int = 16, width: int = 24) -> Tensor:
    """Images in [-1, 1]."""
    return torch.rand(count, 3, height, width, generator=generator(1)) * 2 - 1


def save_kl(folder: Path, **config: Any) -> Any:
    """Save an AutoencoderKL of random weights whose posterior is neither narrow nor wide; return it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**SMALL_KL, **config).eval()
    # The last convolution of the encoder gives means and log variances; as initialised, all of them are near 0.
    vae.encoder.conv_out.weight.data *= 3
    vae.save_pretrained(folder)
    return vae


class Trap:
    """A pickle that creates the file `sprung` when it is opened."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sprung,)


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
