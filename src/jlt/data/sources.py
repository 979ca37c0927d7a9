"""Image sources: numbered, labelled images as they lie, with a stable class list; nothing is converted here."""

from __future__ import annotations

import abc
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jlt.errors import JLTError, unknown_name

BUNDLED = ("digits",)


class ImageSource(abc.ABC):
    """A fixed sequence of labelled images; `labels[i]` indexes `class_names`."""

    name: str
    class_names: tuple[str, ...]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return the decoded image, in the mode and size of its file, and its label; JLTError if it does not decode."""

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """Return where image `index` comes from, for messages."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what makes this sequence of images this one, as JSON values; equal sources have equal identities."""


class Digits(ImageSource):
    """The 1,797 handwritten digits (8x8, grey) that scikit-learn bundles: UCI ML hand-written digits, Alpaydin 1998."""

    name = "digits"
    class_names = tuple("0123456789")

    def __init__(self) -> None:
        self._pixels, self._labels = _load_digits()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[index]), int(self._labels[index])

    def describe(self, index: int) -> str:
        """Return the position among the digits."""
        return f"digits image {index}"

    def identity(self) -> dict[str, Any]:
        """Return the count and the SHA-256 of all pixels and labels."""
        content = hashlib.sha256(self._pixels.tobytes() + self._labels.tobytes()).hexdigest()
        return {"kind": "digits", "count": len(self), "sha256": content}


@functools.cache
def _load_digits() -> tuple[UInt8[np.ndarray, "n 8 8"], UInt8[np.ndarray, " n"]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The scans hold 0..16; 255/16 spreads them over the whole range of a byte.
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.uint8)


class ClassFolders(ImageSource):
    """A folder with one folder per class (ImageNet's layout); images may be nested to any depth within a class.

    Every file that is not hidden counts as an image, whatever its name ends in: what cannot be decoded is an error with
    a name rather than an image that is silently missing. Classes and files are sorted by name, empty classes are kept,
    links are followed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.name = self.folder.name
        with os.scandir(self.folder) as entries:
            self.class_names = tuple(sorted(entry.name for entry in entries if _is_class_folder(entry)))
        if not self.class_names:
            raise JLTError(f"{folder} holds no class folders: put the images of each class in a folder of its own.")
        self._files: list[str] = []
        starts = [0]
        for class_name in self.class_names:
            self._files += [f"{class_name}/{file}" for file in sorted(_files_below(self.folder / class_name))]
            starts.append(len(self._files))
        if not self._files:
            raise JLTError(f"{folder} holds {len(self.class_names)} class folders, and no file in any of them.")
        # A label per class boundary instead of one per image keeps a collection of millions small.
        self._starts = np.array(starts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        # Counting from the end would find the file and miss the label.
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        label = int(np.searchsorted(self._starts, index, side="right")) - 1
        return read_image(self.folder / self._files[index]), label

    def describe(self, index: int) -> str:
        """Return the path of the file."""
        return str(self.folder / self._files[index])

    def identity(self) -> dict[str, Any]:
        """Return the folder, the count and the SHA-256 of all class and file names, which leaves out the content."""
        listing = hashlib.sha256()
        for name in (*self.class_names, "", *self._files):
            listing.update(os.fsencode(name) + b"\0")
        count = len(self)
        return {"kind": "folder", "path": str(self.folder), "count": count, "listing_sha256": listing.hexdigest()}


def read_image(path: Path) -> Image.Image:
    """Return a fully decoded image in the file's own mode and size; JLTError names a file that does not decode."""
    try:
        # A copy is detached from its file, which formats with several frames would keep open.
        with path.open("rb") as file:
            return Image.open(file).copy()
    except Exception as error:
        # Decoders raise whatever their format's parsing trips over (OSError, SyntaxError, struct.error, ...).
        raise JLTError(f"{path} does not decode as an image ({error}): mend it or take it out.") from error


def _is_class_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _files_below(folder: Path, prefix: str = "", above: frozenset[str] = frozenset()) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        raise JLTError(f"{folder} links back to {real}, a folder that it lies in: remove the link.")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files_below(folder / entry.name, f"{prefix}{entry.name}/", above | {real})
            else:
                yield f"{prefix}{entry.name}"


def open_source(spec: str) -> ImageSource:
    """Open `digits`, the bundled set, or a folder of class folders; anything else is a JLTError with the nearest names.

    A folder that is called as a bundled set is meant by writing it as a path (`./digits`).
    """
    if spec == "digits":
        return Digits()
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return ClassFolders(folder)
    if folder.exists():
        raise JLTError(f"{spec} is a file: images are read from a folder of class folders, or from {BUNDLED[0]!r}.")
    siblings = [str(other) for other in folder.parent.glob("*/")] if folder.parent.is_dir() else []
    if len(folder.parts) == 1:
        siblings += BUNDLED
    raise unknown_name("folder of images or bundled set", spec, siblings or BUNDLED)
