"""Shared by tests of encoding and of the latent store: a small source, a small autoencoder, a store of both."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
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
    """Latents are the 4x4 patches of an image, 48 channels, times a scale; slow on request."""

    name = "patches"
    channels = 48
    downsampling = 4
    device = torch.device("cpu")

    def __init__(self, scale: float = 3**0.5, kind: str = "scale", delay: float = 0.0) -> None:
        self.scale, self.kind, self.delay = scale, kind, delay

    def encode(self, images: Tensor, noise_seeds: Sequence[int] | None = None) -> Tensor:
        time.sleep(self.delay)
        return functional.pixel_unshuffle(images, 4) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return functional.pixel_shuffle(latents / self.scale, 4).clamp(-1, 1)

    def identity(self) -> dict[str, Any]:
        normalisation = {"kind": self.kind, "scale": self.scale}
        return {"name": self.name, "source": "test", "weights_sha256": None, "normalisation": normalisation}

    def to(self, device: torch.device | str) -> PatchAutoencoder:
        return self


CONFIG = EncodeConfig(
    images="noise",
    autoencoder="patches",
    resolution=8,
    batch_size=4,
    shard_size=10,
    flips=True,
    dtype="float32",
    workers=0,
)


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


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
