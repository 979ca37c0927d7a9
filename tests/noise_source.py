"""Images of noise, for processes that decode: they import this module, which imports no torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from typing import Any

import numpy as np
from PIL import Image

from jlt.images.source import ImageSource


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
