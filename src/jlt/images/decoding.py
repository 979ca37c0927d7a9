"""Images to pixels in worker processes: batches of cropped images, in order, decoded ahead of their use.

This module does not import torch, so a worker starts in a fraction of a second and takes little memory. Pixels come
back through pipes: containers often limit shared memory, and the system kills a worker that fills it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from jlt.errors import JLTError
from jlt.images.crop import Exif, centre_crop
from jlt.images.reading import BadImageError
from jlt.images.source import ImageSource, SkippedImage
from jlt.runtime.processes import local_world_size, notice_dead_workers, spawn_context
from jlt.runtime.signals import follow_parent, signals_blocked

BATCHES_AHEAD = 2
"""Batches in progress or waiting per worker; with fewer, a slow image would leave the other workers idle."""
MAX_WORKERS = 16


@dataclass(frozen=True)
class PixelBatch:
    """The usable images among the source's positions `rows`, as pixels 0..255, and the unusable ones in `bad`."""

    rows: range
    index: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    pixels: UInt8[np.ndarray, "n s s 3"]
    bad: tuple[SkippedImage, ...]


def load_batch(source: ImageSource, rows: range, size: int, exif: Exif) -> PixelBatch:
    """Load the centre crops of the images at some positions of a source, and list those that cannot be used."""
    pixels = np.empty((len(rows), size, size, 3), dtype=np.uint8)
    index: list[int] = []
    labels: list[int] = []
    bad: list[SkippedImage] = []
    for row in rows:
        try:
            image, label = source[row]
        except BadImageError as error:
            bad.append(SkippedImage(row, error.image, error.reason))
            continue
        try:
            pixels[len(index)] = centre_crop(image, size, exif)
        except JLTError as error:
            bad.append(SkippedImage(row, source.describe(row), f"cannot be used ({error})"))
        else:
            index.append(row)
            labels.append(label)
    usable = (np.array(index, dtype=np.int64), np.array(labels, dtype=np.int64), pixels[: len(index)])
    return PixelBatch(rows, *usable, tuple(bad))


def bad_image(image: SkippedImage) -> JLTError:
    """Return the error for an unusable image in an encoding that does not skip such images."""
    return JLTError(f"{image.image} {image.reason}: repair it, remove it, or encode with --on-bad-image skip.")


def default_workers(source: ImageSource, batches: int, batches_per_worker: int) -> int:
    """Return how many processes decode `batches` of a source: one per core, shared among torchrun's processes.

    0 where images are in memory, and fewer where a worker has less than `batches_per_worker` to do.
    """
    # Here, since it imports torch.
    from jlt.runtime.environment import cores

    if source.in_memory:
        return 0
    return min(MAX_WORKERS, max(1, cores() // local_world_size()), batches // batches_per_worker)


def load_batches(
    source: ImageSource, batches: Sequence[range], size: int, exif: Exif, workers: int
) -> Iterator[PixelBatch]:
    """Yield the pixels of each batch of positions, in order; with 0 workers this process decodes them.

    JLTError if a worker process dies, or an image cannot be read because of the disk or the network.
    """
    if workers == 0:
        yield from (load_batch(source, rows, size, exif) for rows in batches)
        return
    setup = (os.getpid(), source, size, exif)
    pool = ProcessPoolExecutor(workers, spawn_context(), initializer=_begin_worker, initargs=setup)
    waiting: deque[Future[PixelBatch]] = deque()
    try:
        for rows in batches:
            with signals_blocked():
                waiting.append(pool.submit(_work, rows))
            if len(waiting) > workers * BATCHES_AHEAD:
                yield waiting.popleft().result()
        notice_dead_workers(pool)
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise JLTError(
            "A process that decodes images ended. The system killed it for lack of memory (try fewer --workers), "
            "or it could not start (a script that encodes needs `if __name__ == '__main__':`)."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_setup: tuple[ImageSource, int, Exif] | None = None


def _begin_worker(parent: int, source: ImageSource, size: int, exif: Exif) -> None:
    global _setup
    _setup = (source, size, exif)
    follow_parent(parent)


def _work(rows: range) -> PixelBatch:
    assert _setup is not None
    source, size, exif = _setup
    return load_batch(source, rows, size, exif)
