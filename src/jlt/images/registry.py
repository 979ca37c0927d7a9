"""Image sources by name or path, and the files of a folder that make up one split."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlt.errors import JLTError, UsageError, few, unknown_name
from jlt.images.digits import Digits
from jlt.images.folders import ClassFolders, split_folders
from jlt.images.parquet import Parquet
from jlt.images.sharded import ShardedSource, read_class_names
from jlt.images.source import ImageSource, absolute
from jlt.images.tar import TarShards
from jlt.storage.folders import path_inside

BUNDLED = ("digits",)
REOPENED = (*BUNDLED, "folder", "parquet", "tar")
"""Kinds of sources that can be opened from their identity alone."""
SHARDED: dict[str, type[ShardedSource]] = {".parquet": Parquet, ".tar": TarShards}
"""Sources whose files hold many images each, by the suffix of these files."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip")


def open_source(spec: str, split: str | None = None, class_names: str | None = None) -> ImageSource:
    """Open the images that `spec` names.

    `spec` is `digits`, the bundled set; a .parquet or .tar file; a folder of such files, also in its subfolder `data`
    as in a clone of a Hub repository; a folder of class folders; or a folder of images, which are of one class.
    `./digits` is a folder, not the bundled set. `split` selects files of such a folder, or one of its folders.
    `class_names` is a text file with one class name per line, for labels that
    are numbers. UsageError for a `spec` that does not exist, or an option that does not apply; JLTError if
    the images cannot be opened.
    """
    if spec == "digits":
        _refuse("the bundled digits", split=split, class_names=class_names)
        return Digits()
    path = Path(spec).expanduser()
    if path.is_file():
        _refuse("a single file", split=split)
        _refuse_compressed([path])
        if path.suffix not in SHARDED:
            raise JLTError(f"{path} ends in neither .parquet nor .tar: give such a file, or a folder of class folders.")
        files = [path]
    elif path.is_dir():
        files = _sharded_files(path)
    else:
        raise _unknown_path(spec, path)
    if not files:
        _refuse("a folder of class folders", class_names=class_names)
        if splits := split_folders(path):
            return ClassFolders(path_inside(path, _chosen(path, splits, split)))
        _refuse("a folder of class folders", split=split)
        return ClassFolders(path)
    names = None if class_names is None else read_class_names(Path(class_names).expanduser())
    chosen = files if path.is_file() else choose_split(files, split)
    options = {"split": split, "class_names": class_names and str(absolute(Path(class_names).expanduser()))}
    given = {name: value for name, value in options.items() if value is not None}
    return SHARDED[files[0].suffix](path, chosen, names, given)


def _chosen(folder: Path, splits: Sequence[str], split: str | None) -> str:
    if split is None:
        raise UsageError(f"{folder} holds splits, not classes ({', '.join(splits)}): choose one with --split.")
    if split not in splits:
        raise unknown_name("split", split, splits)
    return split


def reopen_source(identity: Mapping[str, Any]) -> ImageSource:
    """Open the source with this identity; JLTError if its images have changed or cannot be found."""
    kind = identity.get("kind")
    if not isinstance(kind, str) or kind not in REOPENED:
        raise JLTError(f"The images are not available: the latents name {kind!r} as their source.")
    spec = identity.get("path", kind)
    source = open_source(spec, identity.get("split"), identity.get("class_names"))
    if source.identity() != identity:
        raise JLTError(f"The images in {spec} changed since they were encoded.")
    return source


def _sharded_files(folder: Path) -> list[Path]:
    """Return the .parquet or .tar files of a folder, or of the folder `data` in it."""
    for place in (folder, folder / "data"):
        entries = [entry for entry in place.glob("*") if not entry.name.startswith(".")]
        files = [entry for entry in entries if entry.suffix in SHARDED and not entry.is_dir()]
        if len({file.suffix for file in files}) > 1:
            raise JLTError(f"{place} holds both .parquet and .tar files: move one kind to another folder.")
        # Next to class folders, an archive is the file that they were unpacked from.
        if files or not any(entry.is_dir() for entry in entries):
            _refuse_compressed(entries)
        if files:
            return files
    return []


def _refuse_compressed(files: list[Path]) -> None:
    for file in files:
        if file.name.endswith(COMPRESSED):
            raise JLTError(f"{file} is compressed: decompress it first.")


def _refuse(kind: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise UsageError(f"--{option.replace('_', '-')} does not apply to {kind}: leave it out.")


def _unknown_path(spec: str, path: Path) -> UsageError:
    # A path is not compared with the folders that exist: a similar name may mean other images.
    near = [name for name in BUNDLED if len(path.parts) == 1 and difflib.get_close_matches(spec, [name])]
    hint = f"did you mean {near[0]}?" if near else f"name a folder or file of images, or a bundled set: {BUNDLED[0]}."
    return UsageError(f"{spec} does not exist: {hint}")


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
        listing = few([file.name for file in files])
        raise JLTError(f"{folder} holds files of several versions of {split}: keep those of one. They are {listing}.")
    count = counts.pop()
    if missing := sorted(set(range(count)) - numbers):
        names = [f"{split}-{number:0{len(matches[0]['number'])}d}" for number in missing]
        raise JLTError(f"{folder} lacks {len(missing)} of the {count} files of {split}: download {few(names)}.")
