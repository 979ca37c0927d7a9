"""Which files of a folder make up one set of images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jlt.errors import JLTError, UsageError, unknown_name

# train-00000-of-00294, as the Hub names parquet files; older ones end in a part of their hash.
_OF = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?")
# imagenet1k-train-0000, as webdataset names tar files, or 0000 alone.
_NUMBERED = re.compile(r"(?P<split>.*?)[-_.]?\d+")


def choose_split(files: Sequence[Path], split: str | None) -> list[Path]:
    """Return the files of one split in the order of their names.

    The split is what stands before the number in a file's name; a name without a number is a split of its own.
    UsageError if there are several splits and none was chosen, or not the chosen one. JLTError if the names say
    that files are missing, or are left over from another version.
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
    _require_whole(chosen, members)
    return members


def _split_of(file: Path) -> str:
    match = _OF.fullmatch(file.stem) or _NUMBERED.fullmatch(file.stem)
    return match["split"] if match else file.stem


def _require_whole(split: str, files: Sequence[Path]) -> None:
    matches = [match for file in files if (match := _OF.fullmatch(file.stem))]
    if not matches:
        return
    folder, counts = files[0].parent, {int(match["count"]) for match in matches}
    numbers = Counter(int(match["number"]) for match in matches)
    twice = [number for number, times in numbers.items() if times > 1]
    if len(counts) > 1 or len(matches) < len(files) or twice:
        raise JLTError(f"{folder} holds files of several versions of {split}: keep those of one. {_several(files)}")
    count = counts.pop()
    missing = sorted(set(range(count)) - set(numbers))
    if missing:
        names = [f"{split}-{number:0{len(matches[0]['number'])}d}" for number in missing]
        raise JLTError(f"{folder} lacks {len(missing)} of the {count} files of {split}: fetch {_few(names)}.")


def _several(files: Sequence[Path]) -> str:
    return f"They are {_few([file.name for file in files])}."


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
