"""The order of samples in training, and batches that are each read during the computation before it."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from jlt.latents.store import LatentStore

DEPTH = 2
"""Buffers of one batch each: one is in use while the other is filled. More buffers would only smooth out occasional
slow reads; they cannot help where reading is slower than computing."""

ORDER_STREAM = int.from_bytes(b"order", "big")
"""Separates these random numbers from any others that are keyed by (seed, small number)."""


class SampleOrder:
    """The endless sequence of samples and flips for `size` samples and a seed in [0, 2^64): every index once an epoch.

    Positions count from the start of training across epochs. Epoch e is the permutation that sorts `size` random 64-bit
    keys: the raw output of the counter-based Philox generator (Salmon et al. 2011) keyed by (seed, e), which NumPy
    guarantees across versions. So any process can read any position in any order: it draws the one or two epochs of
    that batch and none before them.
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
        philox = np.random.Philox(key=key, counter=np.array([0, 0, 0, ORDER_STREAM], dtype=np.uint64))
        permutation = np.argsort(philox.random_raw(self.size), kind="stable")
        flips = philox.random_raw(self.size) >> np.uint64(63)
        return permutation, flips.astype(bool)

    def _slice(self, which: int, start: int, count: int) -> np.ndarray:
        if start < 0 or count < 0:
            raise ValueError(f"positions and counts are not negative, got {start} and {count}")
        pieces = [np.empty(0, dtype=np.int64)]
        while count > 0:
            epoch, offset = divmod(start, self.size)
            pieces.append(self._epoch(epoch)[which][offset : offset + count])
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)


@runtime_checkable
class Request(Protocol):
    """The request for one batch, such as the draws of a training step."""

    @property
    def indices(self) -> np.ndarray:
        """Positions in the store, int64, (n,)."""

    @property
    def flips(self) -> np.ndarray:
        """Whether to read each latent flipped, bool, (n,)."""


R = TypeVar("R", bound=Request)


def read_ahead(
    store: LatentStore, requests: Iterable[R], batch_size: int, device: torch.device | str = "cpu"
) -> Generator[tuple[R, Float[Tensor, "n c h w"], Int64[Tensor, " n"]], None, None]:
    """Yield each request with its latents, on the device in the stored dtype, and its labels, on the host.

    A thread draws the requests, of at most `batch_size` latents each, and reads into `DEPTH` buffers in turn. On a CPU
    the latents are such a buffer: they are valid until the next batch, so copy them to keep them. On CUDA they are the
    consumer's to keep: the pinned buffer is copied on the consumer's current stream, and reused after that copy.

    A run resumes at any step by starting its requests there. An error in the thread is raised in place of its batch.
    Closing the iterator ends the thread as soon as it has read its batch.
    """
    device, iterator = torch.device(device), iter(requests)

    def read(buffer: Tensor, copied: torch.cuda.Event | None = None) -> tuple[R, Tensor, Tensor] | None:
        if copied is not None:
            copied.synchronize()
        request = next(iterator, None)
        if request is None:
            return None
        _, labels = store.gather(request.indices, request.flips, buffer[: len(request.indices)])
        return request, buffer, labels

    reader = ThreadPoolExecutor(1, "jlt-reader")
    try:
        buffers = (store.empty(batch_size) for _ in range(DEPTH))
        waiting = deque(reader.submit(read, b.pin_memory() if device.type == "cuda" else b) for b in buffers)
        while (item := waiting.popleft().result()) is not None:
            request, buffer, labels = item
            latents = buffer[: len(labels)].to(device, non_blocking=True)
            if device.type == "cuda":
                waiting.append(reader.submit(read, buffer, torch.cuda.current_stream(device).record_event()))
                yield request, latents, labels
            else:
                yield request, latents, labels
                waiting.append(reader.submit(read, buffer))
    finally:
        reader.shutdown(cancel_futures=True)
