"""Images to disk: numbered PNG that can be continued, one .npz as ADM's evaluator reads, or a grid to look at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jlt.config import SampleFormat
from jlt.files import atomic_path, claim_folder
from jlt.progress import track
from jlt.sampling.sampler import ImageBatch, ImageSampler
from jlt.signals import until_stopped

PROTOCOL = "protocol.json"


def save_samples(sampler: ImageSampler, out: Path, form: SampleFormat) -> Path:
    """Draw all images of a sampler into a folder and return what was written.

    A folder that holds images of the same protocol is completed; one that holds anything else is a JLTError. Stopped
    when asked to end.
    """
    claim_folder(out, PROTOCOL, {**sampler.protocol(), "format": form})

    def done(images: range) -> bool:
        return form == "png" and all(png_path(out, number).exists() for number in images)

    total = math.ceil(sampler.config.num / sampler.config.batch_size)
    batches = track(until_stopped(sampler.batches(done)), "sampling", total=total)
    return {"png": _save_png, "npz": _save_npz, "grid": _save_grid}[form](batches, out)


def png_path(out: Path, number: int) -> Path:
    """Return where image `number` lies."""
    return out / f"{number:06d}.png"


def _save_png(batches: Iterable[ImageBatch], out: Path) -> Path:
    for batch in batches:
        for offset, image in enumerate(batch.images.numpy()):
            save_image(image, png_path(out, batch.start + offset))
    return out


def _save_npz(batches: Iterable[ImageBatch], out: Path) -> Path:
    images, labels = _collect(batches)
    path = out / "samples.npz"
    with atomic_path(path) as temporary:
        np.savez(temporary, arr_0=images, arr_1=labels)
    return path


def _save_grid(batches: Iterable[ImageBatch], out: Path) -> Path:
    images, _ = _collect(batches)
    path = out / "grid.png"
    save_image(image_grid(images, columns=math.ceil(math.sqrt(len(images)))), path)
    return path


def _collect(batches: Iterable[ImageBatch]) -> tuple[np.ndarray, np.ndarray]:
    parts = [(batch.images.numpy(), batch.labels.numpy()) for batch in batches]
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return images, labels


def save_image(image: UInt8[np.ndarray, "h w 3"], path: Path) -> None:
    """Write one PNG atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary)


def image_grid(
    images: UInt8[np.ndarray, "n h w 3"], columns: int, gap: int = 2, background: int = 255
) -> UInt8[np.ndarray, "hh ww 3"]:
    """Lay images out row by row with a gap of some pixels between them."""
    n, height, width, _ = images.shape
    rows = math.ceil(n / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), background, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid
