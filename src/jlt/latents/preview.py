"""A look before a long wait: originals over their reconstructions from the latents as they will be stored."""

from __future__ import annotations

import numpy as np
import torch

from jlt.autoencoders.psnr import psnr
from jlt.errors import JLTError
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.images.decoding import PixelBatch, bad_image, load_batch
from jlt.latents.encoding_batch import encode_batch, exact_arithmetic
from jlt.latents.encoding_job import EncodingJob
from jlt.runtime.progress import inform
from jlt.storage.files import atomic_path

PREVIEW_NAME = "preview.png"
IMAGES = 8
FAR_BELOW = 10.0
"""Decibels."""
MIN_SIDE = 160


def preview(job: EncodingJob) -> float:
    """Write `preview.png` into the folder of the store and return the PSNR in dB over the images on it.

    The images are spread evenly over the source. JLTError if none of them can be used.
    """
    pixels, labels = _spread(job)
    with exact_arithmetic(job.config.threads):
        encoded = encode_batch(job, pixels)
        reconstructed = job.autoencoder.decode(encoded.latents["latents"].float()).cpu()
    originals = torch.from_numpy(pixels.pixels).permute(0, 3, 1, 2) / 127.5 - 1
    overall = psnr(originals, reconstructed)
    captions = [
        f"{label}\n{psnr(original[None], other[None]):.1f} dB"
        for label, original, other in zip(labels, originals, reconstructed, strict=True)
    ]
    decoded = ((reconstructed + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    path = job.out / PREVIEW_NAME
    words = SheetText(title=_title(job, overall), captions=[""] * len(captions) + captions)
    sheet = draw_sheet(np.concatenate((pixels.pixels, decoded)), len(captions), words, MIN_SIDE)
    with atomic_path(path) as temporary:
        sheet.save(temporary)
    inform(f"{path}: {len(captions)} images over their reconstructions, {overall:.1f} dB.")
    promised = job.autoencoder.held_out_psnr
    if promised and overall < promised - FAR_BELOW:
        inform(f"The autoencoder's makers measured {promised:.1f} dB: these are not the images that it was made for.")
    return overall


def _title(job: EncodingJob, overall: float) -> str:
    config = job.config
    how = f"{config.resolution} px, {config.precision}, stored as {config.dtype}"
    return f"{job.autoencoder.name}, {how}: originals above, reconstructions below, {overall:.1f} dB over all"


def _spread(job: EncodingJob) -> tuple[PixelBatch, list[str]]:
    """Return up to `IMAGES` usable images, from the start, the end and between, with their classes' names."""
    total = len(job.source)
    picks = sorted({round(place) for place in np.linspace(0, total - 1, IMAGES)})
    loaded = [load_batch(job.source, range(row, row + 1), job.config.resolution, job.config.exif) for row in picks]
    bad = [image for batch in loaded for image in batch.bad]
    if bad and job.config.on_bad_image == "stop":
        raise bad_image(bad[0])
    if len(bad) == len(loaded):
        loaded = [_first_usable(job)]
    index, labels, pixels = (
        np.concatenate([getattr(batch, name) for batch in loaded]) for name in ("index", "labels", "pixels")
    )
    names = [job.source.class_names[label] for label in labels.tolist()]
    return PixelBatch(range(0, total), index, labels, pixels, tuple(bad)), names


def _first_usable(job: EncodingJob) -> PixelBatch:
    for row in range(len(job.source)):
        batch = load_batch(job.source, range(row, row + 1), job.config.resolution, job.config.exif)
        if len(batch.index):
            return batch
    raise JLTError(f"None of the {len(job.source)} images of {job.source.name} can be used.")
