"""Images into pixels, in worker processes: batches of cropped images, in order, read ahead of their use.

Nothing here imports torch, so a worker starts in a fraction of a second and takes little memory. Pixels come back
through pipes: shared memory is small by default in containers, and a worker that finds it full is simply killed.
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
from jlt.images.source import BadImageError, ImageSource, SkippedImage
from jlt.runtime.processes import notice_dead_workers, spawn_context
from jlt.runtime.signals import follow_parent, signals_blocked

BATCHES_AHEAD = 2
"""Batches in work or waiting per worker; with fewer, workers would idle while a slow image holds up its successors."""


@dataclass(frozen=True)
class PixelBatch:
    """The usable images among the source's positions `rows`, as pixels 0..255, and those that are not."""

    rows: range
    index: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    pixels: UInt8[np.ndarray, "n s s 3"]
    bad: tuple[SkippedImage, ...]


def load_pixels(
    source: ImageSource, index: int, size: int, exif: Exif
) -> tuple[UInt8[np.ndarray, "{size} {size} 3"], int]:
    """Return the centre crop of one image of a source, and its label; BadImageError if there is none to be had."""
    image, label = source[index]
    try:
        return centre_crop(image, size, exif), label
    except JLTError as error:
        raise BadImageError(source.describe(index), f"cannot be used ({error})") from error


def load_batch(source: ImageSource, rows: range, size: int, exif: Exif) -> PixelBatch:
    """Load the images at some positions of a source; those that do not decode are listed instead."""
    pixels = np.empty((len(rows), size, size, 3), dtype=np.uint8)
    index: list[int] = []
    labels: list[int] = []
    bad: list[SkippedImage] = []
    for row in rows:
        try:
            pixels[len(index)], label = load_pixels(source, row, size, exif)
        except BadImageError as error:
            bad.append(SkippedImage(row, error.image, error.reason))
        else:
            index.append(row)
            labels.append(label)
    usable = (np.array(index, dtype=np.int64), np.array(labels, dtype=np.int64), pixels[: len(index)])
    return PixelBatch(rows, *usable, tuple(bad))


def bad_image(found: SkippedImage) -> JLTError:
    """Return the error for an image that nobody asked to skip."""
    return JLTError(f"{found.image} {found.reason}: mend it, take it out, or encode with --on-bad-image skip.")


def load_batches(
    source: ImageSource, batches: Sequence[range], size: int, exif: Exif, workers: int
) -> Iterator[PixelBatch]:
    """Yield the pixels of each batch of positions, in order; with 0 workers they are decoded in this process."""
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
            "A process that decodes images ended: killed for want of memory (try fewer --workers), or unable to start "
            "(a script that encodes guards itself with `if __name__ == '__main__':`)."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_begun: tuple[ImageSource, int, Exif] | None = None


def _begin_worker(parent: int, source: ImageSource, size: int, exif: Exif) -> None:
    global _begun
    _begun = (source, size, exif)
    follow_parent(parent)


def _work(rows: range) -> PixelBatch:
    assert _begun is not None
    source, size, exif = _begun
    return load_batch(source, rows, size, exif)
