"""Sources by name or path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlt.errors import JLTError, UsageError, unknown_name
from jlt.images.digits import Digits
from jlt.images.folders import ClassFolders
from jlt.images.labels import read_class_names
from jlt.images.parquet import Parquet
from jlt.images.source import ImageSource, absolute
from jlt.images.splits import choose_split
from jlt.images.tar import TarShards

BUNDLED = ("digits",)
REOPENED = (*BUNDLED, "folder", "parquet", "tar")
"""Kinds of sources that their identity alone leads back to."""
SHARDED: dict[str, type[Parquet] | type[TarShards]] = {".parquet": Parquet, ".tar": TarShards}
"""Sources that are made of files with many images each, by the ending of these files."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip")


def open_source(spec: str, split: str | None = None, class_names: str | None = None) -> ImageSource:
    """Open the images that `spec` names.

    That is `digits`, the bundled set; a .parquet or .tar file; a folder of such files, which may lie in its folder
    `data`, as in a clone of a Hub repository; or a folder of class folders. `split` chooses among the files of such a
    folder; `class_names` is a text file with one class name a line, for parquet and tar files whose labels are numbers.
    A folder that is called as a bundled set is meant by writing it as a path (`./digits`). UsageError if there is
    nothing of that name, with the nearest names, or if an option does not apply; JLTError if it does not open.
    """
    if spec == "digits":
        _refuse("the bundled digits", split=split, class_names=class_names)
        return Digits()
    path = Path(spec).expanduser()
    if path.is_file():
        _refuse("a single file", split=split)
        files = [_require_sharded(path)]
    elif path.is_dir():
        files = _sharded_files(path)
    else:
        raise _unknown_path(spec, path)
    if not files:
        _refuse("a folder of class folders", split=split, class_names=class_names)
        return ClassFolders(path)
    names = None if class_names is None else read_class_names(Path(class_names).expanduser())
    chosen = files if path.is_file() else choose_split(files, split)
    options = {"split": split, "class_names": class_names and str(absolute(Path(class_names).expanduser()))}
    given = {name: value for name, value in options.items() if value is not None}
    return SHARDED[files[0].suffix](path, chosen, names, given)


def reopen_source(identity: Mapping[str, Any]) -> ImageSource:
    """Open the source that an identity describes; JLTError if it is no longer what it was."""
    if identity["kind"] not in REOPENED:
        raise JLTError(f"The images themselves are not at hand: the latents say {identity['kind']!r} of their origin.")
    words = identity.get("path", identity["kind"])
    source = open_source(words, identity.get("split"), identity.get("class_names"))
    if source.identity() != identity:
        raise JLTError(f"The images in {words} changed since they were encoded.")
    return source


def _require_sharded(file: Path) -> Path:
    _refuse_compressed([file])
    if file.suffix not in SHARDED:
        raise JLTError(f"{file} is a file that ends in neither .parquet nor .tar: give a folder of class folders.")
    return file


def _sharded_files(folder: Path) -> list[Path]:
    """The .parquet or .tar files of a folder, or of the folder `data` in it."""
    for place in (folder, folder / "data"):
        entries = [entry for entry in place.glob("*") if not entry.name.startswith(".")]
        files = [entry for entry in entries if entry.suffix in SHARDED and not entry.is_dir()]
        if len({file.suffix for file in files}) > 1:
            raise JLTError(f"{place} holds both .parquet and .tar files: give one kind a folder of its own.")
        # Beside class folders an archive is what they were unpacked from.
        if files or not any(entry.is_dir() for entry in entries):
            _refuse_compressed(entries)
        if files:
            return files
    return []


def _refuse_compressed(files: list[Path]) -> None:
    for file in files:
        if file.name.endswith(COMPRESSED):
            raise JLTError(f"{file} is compressed: decompress it first, images are read from where they lie in a file.")


def _refuse(kind: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise UsageError(f"--{option.replace('_', '-')} has no meaning for {kind}: leave it out.")


def _unknown_path(spec: str, path: Path) -> UsageError:
    siblings = [str(other) for other in path.parent.glob("*/")] if path.parent.is_dir() else []
    if len(path.parts) == 1:
        siblings += BUNDLED
    return unknown_name("folder of images or bundled set", spec, siblings or BUNDLED)
