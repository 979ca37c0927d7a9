"""A folder of class folders, or of the images of one class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jlt.errors import JLTError, few
from jlt.images.reading import read_image
from jlt.images.source import ImageSource, require_index


class ClassFolders(ImageSource):
    """A folder with one folder per class (ImageNet's layout); images may be nested to any depth within a class.

    A folder without folders holds the images of one class, which has its name: data for training without classes.
    Every file that is not hidden counts as an image, whatever its suffix: a file that does not decode is a named error,
    never a missing image. Classes and files are sorted by name, and empty classes are kept. Links are followed within
    the folder. JLTError for one that leads out of it, or to a folder that is reached twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.name = self.folder.name
        with os.scandir(self.folder) as entries:
            found = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
        folders = sorted(name for name, is_folder in found.items() if is_folder)
        self.class_names = tuple(folders) or (self.name,)
        loose = sorted(name for name, is_folder in found.items() if not is_folder)
        listing, counts = bytearray(), []
        seen: set[str] = set()
        for class_name in self.class_names:
            below = _files_below(self.folder, class_name, seen) if folders else _links_checked(self.folder, loose)
            files = [os.fsencode(file) + b"\0" for file in sorted(below)]
            listing += b"".join(files)
            counts.append(len(files))
        if not listing:
            raise JLTError(f"{folder} holds no images: put those of each class into a folder of their own.")
        self.ignored = loose if folders else []
        self.empty = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
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

    def notes(self) -> list[str]:
        """Name the files outside of class folders, which are ignored, and classes without images."""
        texts = []
        if self.ignored:
            texts.append(f"{self.folder} holds {few(self.ignored)} outside of its class folders: ignored.")
        if self.empty:
            texts.append(f"Classes without images: {few(self.empty)}. Remove these folders if they are no classes.")
        return texts

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


SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def split_folders(folder: Path) -> list[str]:
    """Return the folders in a folder that look like splits of a collection, in place of classes; sorted."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    splits = sorted(name for name in names if name.lower() in SPLITS)
    return splits if len(splits) > 1 or len(splits) == len(names) else []


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


def _links_checked(root: Path, names: Iterable[str]) -> Iterator[str]:
    """Yield the names of files in `root`; JLTError for a link that leads out of it."""
    for name in names:
        if (root / name).is_symlink():
            _require_inside(root, name, os.path.realpath(root / name))
        yield name


def _require_inside(root: Path, place: str, real: str) -> None:
    if not real.startswith(f"{root}/".replace("//", "/")):
        raise JLTError(
            f"{root / place} is a link that leads out of {root}: replace it by what it links to, as cp -rL does."
        )
