"""The bundled digits."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jlt.images.source import ImageSource


class Digits(ImageSource):
    """The 1,797 handwritten digits (8x8, grey) that scikit-learn bundles: UCI ML hand-written digits, Alpaydin 1998."""

    name = "digits"
    class_names = tuple("0123456789")
    in_memory = True

    def __init__(self) -> None:
        self._pixels, self._labels = _load_digits()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[index]), int(self._labels[index])

    def describe(self, index: int) -> str:
        """Return the position in the set."""
        return f"digits image {index}"

    def identity(self) -> dict[str, Any]:
        """Return the count and the SHA-256 of all pixels and labels."""
        content = hashlib.sha256(self._pixels.tobytes() + self._labels.tobytes()).hexdigest()
        return {"kind": "digits", "count": len(self), "sha256": content}


@functools.cache
def _load_digits() -> tuple[UInt8[np.ndarray, "n 8 8"], UInt8[np.ndarray, " n"]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The scans hold 0..16; 255/16 scales them to the whole range of a byte.
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.uint8)
