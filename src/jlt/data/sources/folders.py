"""A folder of class folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jlt.data.sources.contract import ImageSource, read_image
from jlt.errors import JLTError


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
