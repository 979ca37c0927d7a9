"""The base of sources whose files hold many images each, and their labels as indices into class names."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jlt.errors import JLTError, UsageError
from jlt.images.source import ImageSource, absolute

MOST_CLASSES = 1_000_000
"""Larger labels are taken for something else, such as keys of a database."""


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return the lines of a text file, the name of class 0 first; blank lines at its end are ignored.

    JLTError if the file is not UTF-8, has a blank line before the last name, or holds no name or one name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise JLTError(f"{path} cannot be read as a text file of class names ({error}).") from error
    names = tuple(line.strip() for line in lines)
    if "" in names:
        blank = names.index("") + 1
        raise JLTError(f"{path} holds no name on line {blank}: write one name per line, class 0 first.")
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if seen.setdefault(name, number) != number:
            raise JLTError(f"{path} holds {name!r} on lines {seen[name]} and {number}: class names must differ.")
    return names


def no_class(image: str, label: int, limit: int = MOST_CLASSES) -> JLTError:
    """Return the error for an image whose label is not in 0..limit-1."""
    if label < 0:
        return JLTError(f"{image} has the label {label}, which is no class (a test split?): choose other images.")
    return JLTError(f"{image} has the label {label}, and labels go from 0 to {limit - 1}: correct it or the names.")


class ShardedSource(ImageSource):
    """Images in `files`; `path` is the user's argument, and `options` are the other arguments that select images.

    `listing_sha256` is the hash of class names, files, labels, and all sizes that can be read without an image.
    `_file_starts` are the positions of each file's first image, and the number of all.
    """

    kind: str
    listing_sha256: str
    _file_starts: Int[np.ndarray, " files_and_1"]
    _labels: Int[np.ndarray, " n"]

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        class_names: Sequence[str] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Read all labels; JLTError for damaged files, for files without images, and for labels that are no classes."""
        self.path = absolute(path)
        self.name = self.path.name
        self._files = [absolute(file) for file in files]
        for file in self._files:
            if not file.is_file():
                raise JLTError(f"{file} is not a file.")
        self._options = dict(options or {})
        self._read_listing(class_names)

    @abc.abstractmethod
    def _read_listing(self, class_names: Sequence[str] | None) -> None:
        """Set `_file_starts`, `listing_sha256`, and the classes by `_set_classes`."""

    def __len__(self) -> int:
        return int(self._file_starts[-1])

    def identity(self) -> dict[str, Any]:
        """Return kind, path, count, the hash of the listing, and the options."""
        facts = {"kind": self.kind, "path": str(self.path), "count": len(self), "listing_sha256": self.listing_sha256}
        return facts | self._options

    def _file_number(self, index: int) -> int:
        return int(np.searchsorted(self._file_starts, index, side="right")) - 1

    def _set_classes(
        self,
        labels: Int[np.ndarray, " n"],
        code_of: Collection[str],
        class_names: Sequence[str] | None,
        names_in_files: Sequence[str] | None,
    ) -> None:
        """Set the class names and the label of each image; JLTError for a label that is not the index of a class.

        `code_of` is empty where labels are numbers; the user's `class_names` or else `names_in_files` name these, or
        else "0", "1", ... up to the largest label. Where labels are strings, `code_of` lists them, and `labels` are
        positions in that list; the classes are then in alphabetical order.
        """
        if code_of:
            if class_names is not None:
                raise UsageError(f"--class-names does not apply to {self.path}: its labels are names already.")
            label_of = {name: label for label, name in enumerate(sorted(code_of))}
            self.class_names = tuple(label_of)
            self._labels = np.array([label_of[name] for name in code_of], dtype=np.int32)[labels]
            return
        names = class_names if class_names is not None else names_in_files
        limit = MOST_CLASSES if names is None else len(names)
        outside = np.flatnonzero((labels < 0) | (labels >= limit))
        if len(outside):
            raise no_class(self.describe(int(outside[0])), int(labels[outside[0]]), limit)
        self.class_names = tuple(map(str, range(int(labels.max()) + 1))) if names is None else tuple(names)
        self._labels = labels.astype(np.int32)
