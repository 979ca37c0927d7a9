"""What an image source is here, and how a file becomes an image."""

from __future__ import annotations

import abc
import functools
import io
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from jlt.errors import JLTError


class BadImageError(JLTError):
    """One image that cannot be used; `image` says which, `reason` why. Encoding stops there, or goes on without it."""

    def __init__(self, image: str, reason: str) -> None:
        # Both arguments are handed on, so that the error survives the way out of a worker process.
        super().__init__(image, reason)
        self.image, self.reason = image, reason

    def __str__(self) -> str:
        return f"{self.image} {self.reason}: mend it or take it out."


class ImageSource(abc.ABC):
    """A fixed sequence of labelled images, whose labels index `class_names`.

    Sources go to worker processes, so they pickle small and open their files when they are first read from. Within a
    process one thread reads at a time. `in_memory` says that reading an image costs nothing worth a process of its own.
    """

    name: str
    class_names: tuple[str, ...]
    in_memory: bool = False

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return the decoded image, in the mode and size of its file, and its label.

        BadImageError if it does not decode.
        """

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """Return where image `index` comes from, for messages."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what makes this sequence of images this one, as JSON values; equal sources have equal identities."""


def require_index(index: int, source: ImageSource) -> None:
    """Raise IndexError outside 0..count-1: counting from the end would find an image and miss its label."""
    if not 0 <= index < len(source):
        raise IndexError(f"image {index} of {len(source)}")


def absolute(path: Path) -> Path:
    """Return the absolute path of a folder or file; a link to a file keeps its name, as the Hub's cache needs."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def read_image(path: Path, describe: Callable[[], str] | None = None) -> Image.Image:
    """Return the decoded image of a file as `decode_image` does; without `describe` a BadImageError names the path."""
    describe = describe or (lambda: str(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # Reading from a pipe would wait for ever.
            raise BadImageError(describe(), "is not a file")
        data = path.read_bytes()
    except (FileNotFoundError, PermissionError, IsADirectoryError, ValueError) as error:
        raise BadImageError(describe(), f"cannot be read ({getattr(error, 'strerror', error)})") from error
    except OSError as error:
        # The disk's fault or the network's, which says nothing about the image: none is skipped for it.
        raise JLTError(f"{describe()} cannot be read ({error.strerror}).") from error
    return decode_image(data, describe)


def decode_image(data: bytes, describe: Callable[[], str]) -> Image.Image:
    """Return the first frame of the image that the bytes of a file hold, in the file's own mode and size.

    BadImageError, with what `describe` returns, where they do not decode.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged EXIF, which has no bearing on the pixels, and of sizes below its own limit.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_formats())
            image.load()
    except MemoryError:
        raise
    except Exception as error:
        # Decoders raise whatever their format's parsing trips over (OSError, SyntaxError, struct.error, ...).
        reason = "holds no bytes" if not data else "is of no image format that Pillow knows"
        if not isinstance(error, UnidentifiedImageError):
            reason = f"does not decode as an image ({error})"
        raise BadImageError(describe(), reason) from error
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats that Pillow decodes by itself: for EPS it would start another program on the file."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


@dataclass(frozen=True)
class SkippedImage:
    """An image of the source that is not in the store, and why."""

    index: int
    image: str
    reason: str
