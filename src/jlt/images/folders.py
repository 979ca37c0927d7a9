"""A folder of class folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jlt.errors import JLTError
from jlt.images.reading import read_image
from jlt.images.source import ImageSource, require_index


class ClassFolders(ImageSource):
    """A folder with one folder per class (ImageNet's layout); images may be nested to any depth within a class.

    Every file that is not hidden counts as an image, whatever its suffix: a file that does not decode is a named error,
    never a missing image. Classes and files are sorted by name, and empty classes are kept. Links are followed within
    the folder. JLTError for one that leads out of it, or to a folder that is reached twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.name = self.folder.name
        with os.scandir(self.folder) as entries:
            folders = (entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
            self.class_names = tuple(sorted(folders))
        if not self.class_names:
            raise JLTError(f"{folder} holds no class folders: put the images of each class into their own folder.")
        listing, counts = bytearray(), []
        seen: set[str] = set()
        for class_name in self.class_names:
            files = sorted(_files_below(self.folder, class_name, seen))
            listing += b"".join(os.fsencode(file) + b"\0" for file in files)
            counts.append(len(files))
        if not listing:
            raise JLTError(f"{folder} holds {len(self.class_names)} class folders, but no file in any of them.")
        # One string of all names, and the class boundaries, keep millions of files small in memory and in a pickle.
        self._names = bytes(listing)
        self._ends = np.flatnonzero(np.frombuffer(listing, dtype=np.uint8) == 0)
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        require_index(index, self)
        label = int(np.searchsorted(self._starts, index, side="right")) - 1
        return read_image(self._path(index)), label

    def describe(self, index: int) -> str:
        """Return the path of the file."""
        return str(self._path(index))

    def identity(self) -> dict[str, Any]:
        """Return the folder, the count and the SHA-256 of all class and file names, but not of the content."""
        classes = b"".join(os.fsencode(name) + b"\0" for name in (*self.class_names, ""))
        listing = hashlib.sha256(classes + self._names).hexdigest()
        return {"kind": "folder", "path": str(self.folder), "count": len(self), "listing_sha256": listing}

    def _path(self, index: int) -> Path:
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self.folder / os.fsdecode(self._names[start : int(self._ends[index])])


def _files_below(root: Path, class_name: str, seen: set[str]) -> Iterator[str]:
    """Yield the files of a class by their path in `root`, and add its folders to those that were `seen`."""
    waiting = [class_name]
    while waiting:
        place = waiting.pop()
        real = os.path.realpath(root / place)
        if real in seen:
            raise JLTError(f"{root / place} is reached a second time, through a link: remove the link.")
        seen.add(real)
        _require_inside(root, place, real)
        with os.scandir(real) as entries:
            for entry in entries:
                inner = f"{place}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(inner)
                    continue
                if entry.is_symlink():
                    _require_inside(root, inner, os.path.realpath(entry.path))
                yield inner


def _require_inside(root: Path, place: str, real: str) -> None:
    if not real.startswith(f"{root}/".replace("//", "/")):
        raise JLTError(
            f"{root / place} is a link that leads out of {root}: replace it by what it links to, as cp -rL does."
        )
