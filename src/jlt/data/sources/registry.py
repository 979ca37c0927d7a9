"""Sources by name or path."""

from __future__ import annotations

from pathlib import Path

from jlt.data.sources.contract import ImageSource
from jlt.data.sources.digits import Digits
from jlt.data.sources.folders import ClassFolders
from jlt.errors import JLTError, unknown_name

BUNDLED = ("digits",)


def open_source(spec: str) -> ImageSource:
    """Open `digits`, the bundled set, or a folder of class folders; anything else is a JLTError with the nearest names.

    A folder that is called as a bundled set is meant by writing it as a path (`./digits`).
    """
    if spec == "digits":
        return Digits()
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return ClassFolders(folder)
    if folder.exists():
        raise JLTError(f"{spec} is a file: images are read from a folder of class folders, or from {BUNDLED[0]!r}.")
    siblings = [str(other) for other in folder.parent.glob("*/")] if folder.parent.is_dir() else []
    if len(folder.parts) == 1:
        siblings += BUNDLED
    raise unknown_name("folder of images or bundled set", spec, siblings or BUNDLED)
