"""Rows of a large array, a block at a time, so that only a block of a mapped file is in memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

ROWS = 1024


def blocks(array: Shaped[np.ndarray, "n *_"], size: int = ROWS) -> Iterator[tuple[slice, Shaped[Tensor, "b *_"]]]:
    """Yield each range of rows with a copy of them as a tensor."""
    for start in range(0, len(array), size):
        rows = slice(start, min(start + size, len(array)))
        yield rows, torch.from_numpy(np.array(array[rows]))
        release(array)


def take(array: Shaped[np.ndarray, "n *_"], rows: Int64[np.ndarray, " m"]) -> Shaped[Tensor, "m *_"]:
    """Return a copy of the given rows as a tensor."""
    taken = np.empty((len(rows), *array.shape[1:]), dtype=array.dtype)
    for start in range(0, len(rows), ROWS):
        # The pages of each row come into memory whole.
        taken[start : start + ROWS] = array[rows[start : start + ROWS]]
        release(array)
    return torch.from_numpy(taken)


def release(array: Shaped[np.ndarray, "..."]) -> None:
    """Release the pages read from a file that is mapped read-only; they count as this process's memory until then."""
    if not isinstance(array, np.memmap) or array.mode != "r":
        return
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
