"""Image sources by name or path."""

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
"""Kinds of sources that can be opened from their identity alone."""
SHARDED: dict[str, type[Parquet] | type[TarShards]] = {".parquet": Parquet, ".tar": TarShards}
"""Sources whose files hold many images each, by the suffix of these files."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip")


def open_source(spec: str, split: str | None = None, class_names: str | None = None) -> ImageSource:
    """Open the images that `spec` names.

    `spec` is `digits`, the bundled set; a .parquet or .tar file; a folder of such files, also in its subfolder `data`
    as in a clone of a Hub repository; or a folder of class folders. `./digits` is a folder, not the bundled set.
    `split` selects files of such a folder. `class_names` is a text file with one class name per line, for labels that
    are numbers. UsageError for an unknown `spec`, with the nearest names, or an option that does not apply; JLTError if
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
        _refuse("a folder of class folders", split=split, class_names=class_names)
        return ClassFolders(path)
    names = None if class_names is None else read_class_names(Path(class_names).expanduser())
    chosen = files if path.is_file() else choose_split(files, split)
    options = {"split": split, "class_names": class_names and str(absolute(Path(class_names).expanduser()))}
    given = {name: value for name, value in options.items() if value is not None}
    return SHARDED[files[0].suffix](path, chosen, names, given)


def reopen_source(identity: Mapping[str, Any]) -> ImageSource:
    """Open the source with this identity; JLTError if its images have changed or cannot be found."""
    if identity["kind"] not in REOPENED:
        raise JLTError(f"The images are not available: the latents name {identity['kind']!r} as their source.")
    spec = identity.get("path", identity["kind"])
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
    siblings = [str(other) for other in path.parent.glob("*/")] if path.parent.is_dir() else []
    if len(path.parts) == 1:
        siblings += BUNDLED
    return unknown_name("folder of images or bundled set", spec, siblings or BUNDLED)
