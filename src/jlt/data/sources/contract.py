"""What an image source is here, and how a file becomes an image."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

from PIL import Image

from jlt.errors import JLTError


class BadImageError(JLTError):
    """One image that cannot be used; `image` says which, `reason` why. Encoding stops there, or goes on without it."""

    def __init__(self, image: str, reason: str) -> None:
        # Both arguments are handed on, so that the error survives the way out of a worker process.
        super().__init__(image, reason)
        self.image, self.reason = image, reason

    def __str__(self) -> str:
        return f"{self.image} {self.reason}: mend it, take it out, or encode with --on-bad-image skip."


class ImageSource(abc.ABC):
    """A fixed sequence of labelled images, whose labels index `class_names`.

    Sources go to worker processes, so they pickle small and open their files when they are first read from.
    `in_memory` says that reading an image costs nothing worth a process of its own.
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


def read_image(path: Path) -> Image.Image:
    """Return a fully decoded image in the file's own mode and size; BadImageError names a file that does not decode."""
    try:
        # A copy is detached from its file, which formats with several frames would keep open.
        with path.open("rb") as file:
            return Image.open(file).copy()
    except Exception as error:
        # Decoders raise whatever their format's parsing trips over (OSError, SyntaxError, struct.error, ...).
        raise BadImageError(str(path), f"does not decode as an image ({error})") from error
