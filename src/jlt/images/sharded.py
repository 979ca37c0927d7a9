"""The base of sources whose files hold many images each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jlt.errors import UsageError
from jlt.images.labels import numbered_classes, sorted_classes
from jlt.images.source import ImageSource, absolute


class ShardedSource(ImageSource):
    """Images in `files`; `path` is the user's argument, and `options` are the other arguments that select images.

    Subclasses set `_file_starts`, the position of each file's first image, and `listing_sha256`: the hash of class
    names, files, labels, and all sizes that can be read without an image.
    """

    kind: str
    listing_sha256: str
    _file_starts: Int[np.ndarray, " files_and_1"]
    _labels: Int[np.ndarray, " n"]

    def __init__(self, path: Path, files: Sequence[Path], options: Mapping[str, str] | None = None) -> None:
        self.path = absolute(path)
        self.name = self.path.name
        self._files = [absolute(file) for file in files]
        self._options = dict(options or {})

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
        """Set the class names and the label of each image.

        `code_of` is empty where labels are numbers; the user's `class_names` or else `names_in_files` name these. Where
        labels are strings, `code_of` lists them, and `labels` are positions in that list.
        """
        if not code_of:
            names = class_names if class_names is not None else names_in_files
            self.class_names, self._labels = numbered_classes(labels, names, self.describe), labels.astype(np.int32)
        elif class_names is None:
            self.class_names, self._labels = sorted_classes(labels, list(code_of))
        else:
            raise UsageError(f"--class-names does not apply to {self.path}: its labels are names already.")
