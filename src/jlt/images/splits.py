"""The files of a folder that make up one set of images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jlt.errors import JLTError, UsageError, unknown_name

# train-00000-of-00294, as the Hub names parquet files; older names end in a part of the file's hash.
_OF = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?")
# imagenet1k-train-0000, as webdataset names tar files, or 0000 alone.
_NUMBERED = re.compile(r"(?P<split>.*?)[-_.]?\d+")


def choose_split(files: Sequence[Path], split: str | None) -> list[Path]:
    """Return the files of one split in the order of their names.

    The split is the part of a file's name before the number; a name without a number is a split of its own. UsageError
    for an unknown split, or for several splits where none is chosen. JLTError if the names show that files are missing
    or belong to different versions.
    """
    found = Counter(_split_of(file) for file in files)
    folder = files[0].parent
    if split is None and len(found) > 1:
        listing = ", ".join(f"{name or 'no name'} ({count} files)" for name, count in sorted(found.items()))
        raise UsageError(
            f"{folder} holds several splits, {listing}: choose one with --split, "
            "or give the files of one set the same name before a number."
        )
    chosen = next(iter(found)) if split is None else split
    if chosen not in found:
        if set(found) == {""}:
            raise UsageError(f"The files in {folder} name no split: leave out --split.")
        raise unknown_name("split", chosen, sorted(filter(None, found)))
    members = sorted((file for file in files if _split_of(file) == chosen), key=lambda file: file.name)
    _require_complete(chosen, members)
    return members


def _split_of(file: Path) -> str:
    match = _OF.fullmatch(file.stem) or _NUMBERED.fullmatch(file.stem)
    return match["split"] if match else file.stem


def _require_complete(split: str, files: Sequence[Path]) -> None:
    matches = [match for file in files if (match := _OF.fullmatch(file.stem))]
    if not matches:
        return
    folder, counts = files[0].parent, {int(match["count"]) for match in matches}
    numbers = {int(match["number"]) for match in matches}
    if len(counts) > 1 or len(numbers) < len(files):
        listing = _few([file.name for file in files])
        raise JLTError(f"{folder} holds files of several versions of {split}: keep those of one. They are {listing}.")
    count = counts.pop()
    if missing := sorted(set(range(count)) - numbers):
        names = [f"{split}-{number:0{len(matches[0]['number'])}d}" for number in missing]
        raise JLTError(f"{folder} lacks {len(missing)} of the {count} files of {split}: download {_few(names)}.")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
