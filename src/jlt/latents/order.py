"""The order in which training sees samples: a pure function of (seed, epoch, position).

Epoch e is the permutation that sorts `size` random 64-bit keys, the raw output of the counter-based Philox generator
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by (seed, e). Rejected alternatives:

- `Generator.permutation` and `torch.randperm`: their results may change with the library's version. The raw stream of
  a NumPy bit generator may not, so a run keeps its order after an upgrade.
- A format-preserving (Feistel) permutation needs no memory, but many rounds to be uniform. Sorted random keys reach
  every permutation with equal probability, at 16 bytes a sample and 0.1 s an epoch for a million samples.

A jump to any position has the same cost: it draws the one or two epochs of that batch and none before them. Drawing an
epoch is O(size log size), once in each process that reads from it; every other batch of that epoch is a slice.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Bool, Int64

# Separates this stream from any other that is keyed by (seed, small number).
_STREAM = int.from_bytes(b"order", "big")


class SampleOrder:
    """The endless sequence of samples and flips for `size` samples and a seed in [0, 2^64).

    Positions count from the start of training across epochs; each epoch holds every index once. Any process can read
    any position in any order, at the same cost.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one sample, got {size}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"the seed has to be in [0, 2^64), got {seed}")
        self.size = size
        self.seed = seed
        # Two epochs are kept, since a batch may span an epoch boundary.
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def indices(self, start: int, count: int) -> Int64[np.ndarray, " {count}"]:
        """Return the sample indices, 0..size-1, at positions start..start+count-1."""
        return self._slice(0, start, count).astype(np.int64, copy=False)

    def flips(self, start: int, count: int) -> Bool[np.ndarray, " {count}"]:
        """Return whether the samples at positions start..start+count-1 are flipped, each with probability 1/2."""
        return self._slice(1, start, count).astype(bool, copy=False)

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        key = np.array([self.seed, epoch], dtype=np.uint64)
        philox = np.random.Philox(key=key, counter=np.array([0, 0, 0, _STREAM], dtype=np.uint64))
        permutation = np.argsort(philox.random_raw(self.size), kind="stable")
        flips = philox.random_raw(self.size) >> np.uint64(63)
        return permutation, flips.astype(bool)

    def _slice(self, which: int, start: int, count: int) -> np.ndarray:
        if start < 0 or count < 0:
            raise ValueError(f"positions and counts are not negative, got {start} and {count}")
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, self.size)
            piece = self._epoch(epoch)[which][offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
