"""A selection of the images of another source."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from jlt.images.source import ImageSource, require_index


class Selected(ImageSource):
    """The images of `source` at the given positions, in that order; a position may occur more than once."""

    def __init__(self, source: ImageSource, positions: Int64[np.ndarray, " n"]) -> None:
        self.source, self.positions = source, positions
        self.name, self.class_names, self.in_memory = source.name, source.class_names, source.in_memory

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        require_index(index, self)
        return self.source[int(self.positions[index])]

    def describe(self, index: int) -> str:
        """Return the place of the image in the other source."""
        return self.source.describe(int(self.positions[index]))

    def identity(self) -> dict[str, Any]:
        """Return the identity of the other source, and the SHA-256 of the positions."""
        positions = hashlib.sha256(self.positions.astype("<i8").tobytes()).hexdigest()
        return {"kind": "selected", "count": len(self), "positions_sha256": positions, "of": self.source.identity()}
