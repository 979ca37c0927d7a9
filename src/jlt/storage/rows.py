"""Rows on disk: a table that several processes write by number, in any order, across restarts; and blocks of arrays.

Each column of a table is a file of plain rows. Another file holds a checksum of every row, written after the row, so an
incomplete or damaged row counts as not written.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped, UInt32
from torch import Tensor

from jlt.errors import JLTError
from jlt.storage.folders import open_unlinked

BLOCK = 1024
"""Rows that are in memory at a time."""
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
        missing = [size - (path.stat().st_size if path.exists() else 0) for path, size in sizes.items()]
        self.holds_more = min(missing) < 0
        """Whether the files hold more rows, of a larger table."""
        require_space(folder, sum(max(0, size) for size in missing), f"{count} rows")
        for path, size in sizes.items():
            _reserve(path, size)

    def written(self) -> Bool[np.ndarray, " count"]:
        """Return which rows are complete; reads all of them."""
        checks = np.fromfile(self.folder / CHECKS, dtype=np.uint32, count=self.count)
        found = np.flatnonzero(checks)
        done = np.zeros(self.count, dtype=bool)
        columns = self.read()
        for start in range(0, len(found), BLOCK):
            rows = found[start : start + BLOCK]
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
        if missing := int((~self.written()).sum()):
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
        rows = (b"".join(part[row].tobytes() for part in parts) for row in range(len(parts[0])))
        # 0 marks a row that was not written.
        return np.array([zlib.crc32(row) or 1 for row in rows], dtype=np.uint32)


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
    with os.fdopen(open_unlinked(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
        before = path.stat().st_size
        if before >= size:
            return
        file.truncate(size)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                # Otherwise the next start would take the file for one whose space is reserved.
                file.truncate(before)
                raise


def _write_at(path: Path, offset: int, values: np.ndarray) -> None:
    # Not through a map, where a full disk kills the process with a signal.
    with os.fdopen(open_unlinked(path, os.O_RDWR), "r+b") as file:
        file.seek(offset)
        file.write(values.data.cast("B"))


def blocks(array: Shaped[np.ndarray, "n *_"], size: int = BLOCK) -> Iterator[tuple[slice, Shaped[Tensor, "b *_"]]]:
    """Yield each range of rows with a copy of them as a tensor."""
    for start in range(0, len(array), size):
        rows = slice(start, min(start + size, len(array)))
        yield rows, torch.from_numpy(np.array(array[rows]))
        release(array)


def take(array: Shaped[np.ndarray, "n *_"], rows: Int64[np.ndarray, " m"]) -> Shaped[Tensor, "m *_"]:
    """Return a copy of the given rows as a tensor."""
    taken = np.empty((len(rows), *array.shape[1:]), dtype=array.dtype)
    for start in range(0, len(rows), BLOCK):
        # The pages of each row come into memory whole.
        taken[start : start + BLOCK] = array[rows[start : start + BLOCK]]
        release(array)
    return torch.from_numpy(taken)


def release(array: Shaped[np.ndarray, "..."]) -> None:
    """Release the pages read from a file that is mapped read-only; they count as this process's memory until then."""
    base: Any = array if isinstance(array, np.memmap) and array.mode == "r" else None
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
