"""From the labels in a collection's files to indices into a list of class names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jlt.errors import JLTError

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


def numbered_classes(
    labels: Int[np.ndarray, " n"], names: Sequence[str] | None, describe: Callable[[int], str]
) -> tuple[str, ...]:
    """Return the class names of labels that are numbers: `names`, or else "0", "1", ... up to the largest label.

    JLTError if a label is not the index of a class; it names the first such image as `describe` does.
    """
    limit = MOST_CLASSES if names is None else len(names)
    outside = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(outside):
        raise no_class(describe(int(outside[0])), int(labels[outside[0]]), limit)
    return tuple(names) if names is not None else tuple(str(number) for number in range(int(labels.max()) + 1))


def no_class(image: str, label: int, limit: int = MOST_CLASSES) -> JLTError:
    """Return the error for an image whose label is not in 0..limit-1."""
    if label < 0:
        return JLTError(f"{image} has the label {label}, which is no class (a test split?): choose other images.")
    return JLTError(f"{image} has the label {label}, and labels go from 0 to {limit - 1}: correct it or the names.")


def sorted_classes(codes: Int[np.ndarray, " n"], names: Sequence[str]) -> tuple[tuple[str, ...], Int[np.ndarray, " n"]]:
    """Return the class names in alphabetical order, and the label of each image, whose class is names[code]."""
    order = sorted(range(len(names)), key=names.__getitem__)
    label_of = np.empty(len(names), dtype=np.int32)
    label_of[order] = np.arange(len(names))
    return tuple(names[code] for code in order), label_of[codes]
