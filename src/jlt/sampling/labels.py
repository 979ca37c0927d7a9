"""Labels of numbered images: rules for any number of images, and classes by their numbers or names."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from jlt.errors import JLTError, UsageError, unknown_name
from jlt.runtime.random_numbers import generator
from jlt.storage.weights import ASSETS

RULES = ("equal", "random")
"""Rules that are no list of classes."""
NAMELESS = re.compile(r"n\d{8}|\d+")
"""A name of WordNet, as ImageNet's folders have it, or a number: a name that says nothing to a reader."""

SYNONYMS = re.compile(r",.*| \(n\d{8}\)$")
"""What follows the first synonym, or distinguishes two classes of one name."""


def labels_for(rule: str, indices: Sequence[int], num_classes: int, seed: int) -> Int[Tensor, "n"]:
    """Return the labels of numbered images: `equal` counts per class, `random`, or a list that repeats."""
    if rule == "equal":
        return torch.tensor([index % num_classes for index in indices])
    if rule == "random":
        draws = [torch.randint(num_classes, (), generator=generator(seed, "label", index)) for index in indices]
        return torch.stack(draws)
    try:
        labels = [int(part) for part in rule.split(",")]
    except ValueError:
        raise UsageError(f"labels must be equal, random or a list such as 3,7,7, not {rule!r}.") from None
    if outside := [label for label in labels if not 0 <= label < num_classes]:
        raise JLTError(f"There is no class {outside[0]}: the network knows the classes 0 to {num_classes - 1}.")
    return torch.tensor([labels[index % len(labels)] for index in indices])


def number_labels(rule: str, class_names: Sequence[str], num_classes: int) -> str:
    """Return a rule whose classes are numbers: `tench,goldfish` becomes `0,1`; UsageError for an unknown name.

    A name that contains a comma is known by what precedes it.
    """
    if rule in RULES:
        return rule
    parts = [part.strip() for part in rule.split(",")]
    if all(map(_is_number, parts)):
        return rule
    return ",".join(str(class_number(part, class_names, num_classes, RULES)) for part in parts)


def class_number(
    label: SupportsIndex | str, class_names: Sequence[str], num_classes: int, rules: Sequence[str] = ()
) -> int:
    """Return the number of a class, 0..num_classes-1, from its number or name.

    Upper and lower case are the same, and the first of several synonyms suffices: `Tench` is `tench, Tinca tinca`. A
    text of digits is a number, also where it is the name of a class. 1,000 classes without readable names are
    ImageNet's. UsageError for an unknown name, with the nearest ones and `rules`, for a name of several classes, and
    for what is neither a whole number nor a name; JLTError for a number out of range.
    """
    if not isinstance(label, str) or _is_number(label):
        return int(labels_for(str(_whole(label)), range(1), num_classes, 0))
    folded = label.strip().casefold()
    names = readable_names(class_names, num_classes)
    short = [SYNONYMS.sub("", name) for name in names]
    # A whole name goes before a synonym.
    for known in (class_names, names, short):
        numbers = [number for number, name in enumerate(known) if name.strip().casefold() == folded]
        if len(numbers) > 1:
            listed = " and ".join(map(str, numbers))
            raise UsageError(f"{label!r} is the name of the classes {listed}: name one by its number.")
        if numbers:
            return numbers[0]
    if not names:
        last = num_classes - 1
        raise UsageError(f"There is no class named {label!r}: these classes have no names, only numbers 0 to {last}.")
    raise unknown_name("class", label, (*short, *rules))


def readable_names(class_names: Sequence[str], num_classes: int) -> Sequence[str]:
    """Return the names of classes; those of ImageNet for 1,000 classes whose names are missing, numbers or wnids."""
    if num_classes == 1000 and all(map(NAMELESS.fullmatch, class_names)):
        return (ASSETS / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return class_names


def _whole(label: Any) -> int:
    try:
        return int(label) if isinstance(label, str) else operator.index(label)
    except TypeError:
        raise UsageError(f"A class is a whole number or a name, not {label!r:.40}.") from None


def _is_number(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True
