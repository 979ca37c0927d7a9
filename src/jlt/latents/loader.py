"""Batches of a latent store, each read while the program computes with the one before it."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jlt.latents.store import LatentStore

DEPTH = 2
"""Buffers of one batch each: one is in use while the other is filled. More buffers would only smooth out occasional
slow reads; they cannot help where reading is slower than computing."""


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
    device = torch.device(device)
    reader = _Reader(store, requests, [_buffer(store, batch_size, device) for _ in range(DEPTH)])
    reader.start()
    try:
        while (item := reader.filled.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            request, buffer, labels = item
            latents = buffer[: len(labels)].to(device, non_blocking=True)
            if device.type == "cuda":
                reader.free.put((buffer, torch.cuda.current_stream(device).record_event()))
                yield request, latents, labels
            else:
                yield request, latents, labels
                reader.free.put((buffer, None))
    finally:
        reader.stop()


def _buffer(store: LatentStore, batch_size: int, device: torch.device) -> Tensor:
    buffer = store.empty(batch_size)
    return buffer.pin_memory() if device.type == "cuda" else buffer


class _Reader(threading.Thread, Generic[R]):
    """Fills free buffers in the order of the requests; neither queue ever holds more items than there are buffers."""

    def __init__(self, store: LatentStore, requests: Iterable[R], buffers: list[Tensor]) -> None:
        # A daemon, so that an iterator that was not closed does not keep the process alive.
        super().__init__(name="jlt-reader", daemon=True)
        self._store, self._requests = store, requests
        self._stopping = False
        self.filled: SimpleQueue[tuple[R, Tensor, Tensor] | BaseException | None] = SimpleQueue()
        self.free: SimpleQueue[tuple[Tensor, torch.cuda.Event | None] | None] = SimpleQueue()
        for buffer in buffers:
            self.free.put((buffer, None))

    def run(self) -> None:
        try:
            for request in self._requests:
                item = self.free.get()
                if item is None or self._stopping:
                    return
                buffer, copied = item
                if copied is not None:
                    copied.synchronize()
                _, labels = self._store.gather(request.indices, request.flips, buffer[: len(request.indices)])
                self.filled.put((request, buffer, labels))
            self.filled.put(None)
        except BaseException as error:  # Any error, since the consumer waits for an item.
            self.filled.put(error)

    def stop(self) -> None:
        self._stopping = True
        self.free.put(None)
        self.join()
