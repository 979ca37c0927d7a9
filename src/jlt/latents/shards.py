"""One shard: the safetensors layout read and written row by row, so that only one batch is ever in memory.

The layout is 8 bytes (little-endian length), a JSON header with dtype, shape and byte range of each tensor, and the
tensors' bytes. The safetensors library writes whole tensors only. It reads through a memory map, which ends the process
(SIGBUS) if a file shrinks or a disk fails; here that is an error that names the file.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jlt.errors import JLTError

DTYPES = {"F16": "float16", "F32": "float32", "I32": "int32", "I64": "int64"}
"""The dtypes of a shard's tensors: their names in safetensors and in numpy."""
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
CACHE_LINE_BYTES = 64
ROWS_PER_COPY = 256
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Names, numpy dtypes and shapes of a shard's tensors."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a shard: its dtype as safetensors names it, its shape, and the offset of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, an element of the first dimension."""
        return math.prod(self.shape[1:]) * np.dtype(DTYPES[self.dtype]).itemsize


class ShardFile:
    """A shard opened for reading; any number of threads may read from it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Non-blocking, since opening a pipe would wait for ever.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise JLTError(f"{path} cannot be read ({error.strerror}).") from error
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise JLTError(f"{path} is not a file.")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on; JLTError if the file is too short or cannot be read."""
        try:
            read = os.preadv(self._descriptor, [buffer], offset)
            while 0 < read < len(buffer):
                more = os.preadv(self._descriptor, [buffer[read:]], offset + read)
                read = read + more if more else -1
        except OSError as error:
            raise JLTError(f"{self.path} cannot be read at byte {offset} ({error.strerror}).") from error
        if read != len(buffer):
            raise JLTError(f"{self.path} ends before byte {offset + len(buffer)}: it is truncated.")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._descriptor).st_size

    def read_entries(self) -> dict[str, TensorEntry]:
        """Parse the header; JLTError if it is not one, or does not describe every byte of this file once."""
        size = self.size
        prefix = bytearray(8)
        self.read_into(memoryview(prefix), 0)
        (length,) = struct.unpack("<Q", prefix)
        damaged = f"{self.path} is damaged or not a safetensors file"
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise JLTError(f"{damaged}: its header claims {length} bytes of {size}.")
        header = bytearray(length)
        self.read_into(memoryview(header), 8)
        try:
            fields = json.loads(header)
            fields.pop("__metadata__", None)
            end = 8 + length + _checked_end(fields)
            entries = {
                name: TensorEntry(field["dtype"], tuple(field["shape"]), 8 + length + field["data_offsets"][0])
                for name, field in fields.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise JLTError(f"{damaged}: its header does not parse.") from error
        if end != size:
            raise JLTError(f"{self.path} is damaged: its header describes {end} bytes and the file has {size}.")
        return entries

    def read_array(self, entry: TensorEntry) -> np.ndarray:
        """Return a whole tensor of integers (labels, index) as int64."""
        values = np.empty(entry.shape, DTYPES[entry.dtype])
        self.read_into(values.data.cast("B"), entry.offset)
        return values.astype(np.int64, copy=False)


def _checked_end(fields: dict[str, Any]) -> int:
    """Return the end of the last tensor; ValueError unless tensors are contiguous and of the size of their shape."""
    end = 0
    for field in sorted(fields.values(), key=lambda field: field["data_offsets"]):
        shape, (start, stop) = field["shape"], field["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError("sizes and offsets must be whole numbers")
        if start != end or stop < start:
            raise ValueError("tensors overlap or leave a gap")
        dtype = DTYPES.get(field["dtype"])
        if dtype is not None and stop - start != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError("a tensor's size differs from that of its shape")
        end = stop
    return end


class ShardWriter:
    """Writes the rows of a shard's tensors in any order into a new file; a context manager."""

    def __init__(self, path: Path, tensors: Layout) -> None:
        """Lay out the file for the tensors."""
        # Widest items first keeps every tensor aligned to its item size.
        order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name][0]).itemsize, name))
        fields, starts, end = {}, {}, 0
        for name in order:
            dtype, shape = tensors[name]
            starts[name], end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
            fields[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": (starts[name], end)}
        header = json.dumps(fields, separators=(",", ":")).encode()
        # Padded so that the largest tensor, the latents, starts on a cache line: the kernel copies it a third faster.
        largest = max(order, key=lambda name: math.prod(tensors[name][1]))
        header += b" " * (-(8 + len(header) + starts[largest]) % CACHE_LINE_BYTES)
        base = 8 + len(header)
        self._entries = {
            name: TensorEntry(SAFETENSORS_NAMES[dtype], shape, base + starts[name])
            for name, (dtype, shape) in tensors.items()
        }
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(header)) + header)
        self._file.truncate(base + end)

    def write(self, name: str, row: int, values: np.ndarray) -> None:
        """Write consecutive rows of the named tensor, starting at `row`; ValueError for another dtype or shape."""
        entry = self._entries[name]
        if values.shape[1:] != entry.shape[1:] or values.nbytes != len(values) * entry.row_bytes:
            raise ValueError(
                f"{name} takes rows of {entry.dtype} {entry.shape[1:]}, got {values.dtype} {values.shape[1:]}"
            )
        if row + len(values) > entry.shape[0]:
            raise ValueError(f"{name} has {entry.shape[0]} rows, got rows {row} to {row + len(values) - 1}")
        self._file.seek(entry.offset + row * entry.row_bytes)
        self._file.write(np.ascontiguousarray(values).data.cast("B"))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def keep_rows(path: Path, tensors: Layout) -> None:
    """Rewrite a shard to the first rows of its tensors, as many as the given shapes say."""
    shorter = path.with_name(f"{path.stem}.shorter{path.suffix}")
    shorter.unlink(missing_ok=True)
    try:
        file = ShardFile(path)
        entries = file.read_entries()
        with ShardWriter(shorter, tensors) as writer:
            for name, (dtype, shape) in tensors.items():
                entry = entries[name]
                for start in range(0, shape[0], ROWS_PER_COPY):
                    rows = np.empty((min(ROWS_PER_COPY, shape[0] - start), *shape[1:]), dtype)
                    file.read_into(rows.data.cast("B"), entry.offset + start * entry.row_bytes)
                    writer.write(name, start, rows)
        shorter.replace(path)
    finally:
        shorter.unlink(missing_ok=True)
