"""Shared by tests of encoding and of the latent store: a small source, a small autoencoder, a store of both."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from jlt.autoencoders.contract import Autoencoder
from jlt.images.source import ImageSource
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode_source
from jlt.latents.manifest import StoreManifest


class NoiseSource(ImageSource):
    """Images of seeded noise; image i has label i % 3."""

    name = "noise"
    class_names = ("a", "b", "c")

    def __init__(self, count: int, bad: Collection[int] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index in self.bad:
            return Image.new("F", (8, 8)), 0
        return Image.fromarray(noise_image(index)), index % 3

    def describe(self, index: int) -> str:
        return f"noise/{index}.png"

    def identity(self) -> dict[str, Any]:
        return {"kind": "noise", "count": self.count}


class LethalSource(NoiseSource):
    """Kills the process that reads image 20, as a full memory does."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def noise_image(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)


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
