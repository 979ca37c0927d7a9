"""Batches of a latent store, each read while the program computes with the one before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, runtime_checkable

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
        waiting = deque(reader.submit(read, _buffer(store, batch_size, device)) for _ in range(DEPTH))
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


def _buffer(store: LatentStore, batch_size: int, device: torch.device) -> Tensor:
    buffer = store.empty(batch_size)
    return buffer.pin_memory() if device.type == "cuda" else buffer
