"""The contract of an image source, a selection of another source's images, and the decoding of one image file."""

from __future__ import annotations

import abc
import functools
import hashlib
import io
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image, UnidentifiedImageError

from jlt.errors import JLTError


class BadImageError(JLTError):
    """One image that cannot be used; `image` names it, `reason` says why. Encoding stops at it, or skips it."""

    def __init__(self, image: str, reason: str) -> None:
        # Both arguments go to the base class, so that the error can be pickled in a worker process.
        super().__init__(image, reason)
        self.image, self.reason = image, reason

    def __str__(self) -> str:
        return f"{self.image} {self.reason}: repair or remove it."


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


def read_image(path: Path, describe: Callable[[], str] | None = None) -> Image.Image:
    """Return the decoded image of a file as `decode_image` does; without `describe`, errors name the path."""
    describe = describe or (lambda: str(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # A read from a pipe would block for ever.
            raise BadImageError(describe(), "is not a file")
        data = path.read_bytes()
    except (FileNotFoundError, PermissionError, IsADirectoryError, ValueError) as error:
        raise BadImageError(describe(), f"cannot be read ({getattr(error, 'strerror', error)})") from error
    except OSError as error:
        # A fault of the disk or the network is no property of the image, so the image is not skipped.
        raise JLTError(f"{describe()} cannot be read ({error.strerror}).") from error
    return decode_image(data, describe)


def decode_image(data: bytes, describe: Callable[[], str]) -> Image.Image:
    """Return the first frame of an encoded image, in the file's own mode and size.

    BadImageError, with the text that `describe` returns, if it does not decode.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged EXIF, which does not change the pixels, and of sizes below its own limit.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_formats())
            image.load()
    except MemoryError:
        raise
    except Exception as error:
        # Decoders raise many types: OSError, SyntaxError, struct.error, ...
        reason = "holds no bytes" if not data else "is of no image format that Pillow knows"
        if not isinstance(error, UnidentifiedImageError):
            reason = f"does not decode as an image ({error})"
        raise BadImageError(describe(), reason) from error
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats that Pillow decodes by itself; for EPS it would start Ghostscript on the file."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


@dataclass(frozen=True)
class SkippedImage:
    """An image of the source that is not in the store, and the reason."""

    index: int
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
