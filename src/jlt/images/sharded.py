"""What sources have in common that are made of files with many images each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlt.images.source import ImageSource, absolute


class ShardedSource(ImageSource):
    """Images in the given files; `path` is what the user named, and `options` what was chosen besides.

    `listing_sha256` is the hash of class names, files and labels, and of all sizes that are known without an image.
    """

    kind: str
    listing_sha256: str

    def __init__(self, path: Path, files: Sequence[Path], options: Mapping[str, str] | None = None) -> None:
        self.path = absolute(path)
        self.name = self.path.name
        self._files = [absolute(file) for file in files]
        self._options = dict(options or {})

    def identity(self) -> dict[str, Any]:
        """Return kind, path, count, the hash of the listing, and the options."""
        facts = {"kind": self.kind, "path": str(self.path), "count": len(self), "listing_sha256": self.listing_sha256}
        return facts | self._options
