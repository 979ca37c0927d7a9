"""The contract of an image source, and a selection of another source's images."""

from __future__ import annotations

import abc
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from jlt.storage.codec import Count


class ImageSource(abc.ABC):
    """A fixed sequence of labelled images; labels are indices into `class_names`.

    Sources are sent to worker processes, so they pickle small and open their files at the first read. Within a process
    one thread reads at a time. `in_memory` is True where reading is so cheap that worker processes do not pay off.
    """

    name: str
    class_names: tuple[str, ...]
    in_memory: bool = False

    def notes(self) -> list[str]:
        """Return sentences about what the user may not expect of these images."""
        return []

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return the decoded image, in the mode and size of its file, and its label; BadImageError if damaged."""

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """Return the place of image `index`, for messages."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return JSON values that identify this sequence of images; equal sources have equal identities."""


def require_index(index: int, source: ImageSource) -> None:
    """Raise IndexError outside 0..count-1: a negative index would find an image, but not its label."""
    if not 0 <= index < len(source):
        raise IndexError(f"image {index} of {len(source)}")


def absolute(path: Path) -> Path:
    """Return the absolute path of a folder or file; a link to a file keeps its name, as the Hub's cache needs."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


@dataclass(frozen=True)
class SkippedImage:
    """An image of the source that is not in the store, and the reason."""

    index: Count
    image: str
    reason: str


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
