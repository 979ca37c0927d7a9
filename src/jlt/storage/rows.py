"""A table on disk whose rows several processes write by number, in any order, across restarts.

Each column is a file of plain rows. Another file holds a checksum of every row, written after the row, so an incomplete
or damaged row counts as not written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt32

from jlt.errors import JLTError
from jlt.storage.blocks import release
from jlt.storage.files import open_unlinked

CHECKS = ".checks"
SUFFIX = ".rows"
FREE_SHARE = 0.02
"""Share of the planned bytes that must stay free after them."""

Column = tuple[type[np.generic], tuple[int, ...]]
"""The type of a column's elements and the shape of one row."""


class RowTable:
    """Rows of named columns."""

    def __init__(self, folder: Path, columns: Mapping[str, Column], count: int) -> None:
        """Open a table of `count` rows, new, or with rows from before; JLTError if the disk has no room for it."""
        self.folder, self.columns, self.count = folder, dict(columns), count
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {self._path(name): self._row_bytes(name) * count for name in columns}
        sizes[folder / CHECKS] = 4 * count
        self.holds_more = any(path.exists() and path.stat().st_size > size for path, size in sizes.items())
        """Whether the files hold more rows, of a larger table."""
        missing = {path: size - (path.stat().st_size if path.exists() else 0) for path, size in sizes.items()}
        require_space(folder, sum(max(0, size) for size in missing.values()), f"{count} rows")
        for path, size in sizes.items():
            _reserve(path, size)

    def written(self) -> Bool[np.ndarray, " count"]:
        """Return which rows are complete; reads all of them."""
        checks = np.fromfile(self.folder / CHECKS, dtype=np.uint32, count=self.count)
        found = np.flatnonzero(checks)
        done = np.zeros(self.count, dtype=bool)
        columns = self.read()
        for start in range(0, len(found), 1024):
            rows = found[start : start + 1024]
            done[rows] = self._checksums([columns[name][rows] for name in self.columns]) == checks[rows]
            for column in columns.values():
                release(column)
        return done

    def write(self, start: int, values: Mapping[str, np.ndarray]) -> None:
        """Write consecutive rows, every column of them."""
        parts = []
        for name, (dtype, shape) in self.columns.items():
            part = np.ascontiguousarray(values[name], dtype=dtype)
            if part.shape[1:] != shape:
                raise ValueError(f"rows of {name} have the shape {part.shape[1:]}, not {shape}")
            _write_at(self._path(name), start * self._row_bytes(name), part)
            parts.append(part)
        _write_at(self.folder / CHECKS, 4 * start, self._checksums(parts))

    def read(self) -> dict[str, np.ndarray]:
        """Return the columns, mapped from disk and read-only."""
        return {
            name: np.memmap(self._path(name), dtype=dtype, mode="r", shape=(self.count, *shape))
            for name, (dtype, shape) in self.columns.items()
        }

    def require_full(self) -> None:
        """Raise JLTError if rows of other processes are missing."""
        missing = int((~self.written()).sum())
        if missing:
            raise JLTError(
                f"{missing} of {self.count} rows that other processes wrote are not in {self.folder}: "
                "all processes must share this folder."
            )

    def remove(self) -> None:
        """Remove the table's files, and its folder if nothing else is in it."""
        remove_rows(self.folder)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f".{name}{SUFFIX}"

    def _row_bytes(self, name: str) -> int:
        dtype, shape = self.columns[name]
        return np.dtype(dtype).itemsize * int(np.prod(shape))

    @staticmethod
    def _checksums(parts: list[np.ndarray]) -> UInt32[np.ndarray, " n"]:
        sums = np.empty(len(parts[0]), dtype=np.uint32)
        for row in range(len(sums)):
            check = 0
            for part in parts:
                check = zlib.crc32(np.ascontiguousarray(part[row]).tobytes(), check)
            # 0 marks a row that was not written.
            sums[row] = check or 1
        return sums


def remove_rows(folder: Path) -> None:
    """Remove the files of a table from a folder, if there is one."""
    for path in (*folder.glob(f".*{SUFFIX}"), folder / CHECKS):
        path.unlink(missing_ok=True)


def unwritten(ranges: Iterable[range], written: Bool[np.ndarray, " count"]) -> list[range]:
    """Return the ranges in which a row is missing."""
    return [part for part in ranges if not written[part.start : part.stop].all()]


def require_space(folder: Path, size: int, what: str) -> None:
    """Raise JLTError if the disk of a folder has no room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if size * (1 + FREE_SHARE) > free:
        raise JLTError(
            f"{what} take {size / 1e6:,.1f} MB in {folder}, and only {free / 1e6:,.1f} MB are free: make room first."
        )


def _reserve(path: Path, size: int) -> None:
    """Extend a file to this size with zeros, and reserve its space if the file system supports that."""
    descriptor = open_unlinked(path, os.O_RDWR | os.O_CREAT)
    try:
        before = os.fstat(descriptor).st_size
        if before >= size:
            return
        os.truncate(descriptor, size)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    # Otherwise the next start would take the file for one whose space is reserved.
                    os.truncate(descriptor, before)
                    raise
    finally:
        os.close(descriptor)


def _write_at(path: Path, offset: int, values: np.ndarray) -> None:
    # Not through a map, where a full disk kills the process with a signal.
    with os.fdopen(open_unlinked(path, os.O_RDWR), "r+b") as file:
        file.seek(offset)
        file.write(values.data.cast("B"))
