"""A preview before a long encoding: originals above their reconstructions from the latents as they will be stored."""

from __future__ import annotations

import numpy as np
import torch

from jlt.autoencoders.contract import psnr
from jlt.errors import JLTError
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.images.decoding import PixelBatch, bad_image, load_batch
from jlt.latents.encoding_job import EncodingJob, encode_batch
from jlt.runtime.arithmetic import exact_arithmetic
from jlt.runtime.progress import inform
from jlt.storage.files import atomic_path

PREVIEW_NAME = "preview.png"
IMAGES = 8
FAR_BELOW = 10.0
"""Decibels below the autoencoder's own measurement at which a warning is printed."""
MIN_SIDE = 160


def preview(job: EncodingJob) -> float:
    """Write `preview.png` into the folder of the store and return the PSNR in dB over its images.

    The images are spread evenly over the source. JLTError if none of them can be used.
    """
    pixels = _spread(job)
    with exact_arithmetic(job.config.threads):
        encoded = encode_batch(job, pixels)
        reconstructed = job.autoencoder.decode(encoded.latents["latents"].float()).cpu()
    originals = torch.from_numpy(pixels.pixels).permute(0, 3, 1, 2) / 127.5 - 1
    overall = psnr(originals, reconstructed)
    captions = [
        f"{job.source.class_names[label]}\n{psnr(original[None], other[None]):.1f} dB"
        for label, original, other in zip(pixels.labels.tolist(), originals, reconstructed, strict=True)
    ]
    config = job.config
    title = f"{job.autoencoder.name}, {config.resolution} px, {config.precision}, stored as {config.dtype}: "
    title += f"originals above, reconstructions below, {overall:.1f} dB over all"
    decoded = ((reconstructed + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    text = SheetText(title=title, captions=[""] * len(captions) + captions)
    sheet = draw_sheet(np.concatenate((pixels.pixels, decoded)), len(captions), text, MIN_SIDE)
    path = job.out / PREVIEW_NAME
    with atomic_path(path) as temporary:
        sheet.save(temporary)
    inform(f"{path}: {len(captions)} images above their reconstructions, {overall:.1f} dB.")
    stated = job.autoencoder.held_out_psnr
    if stated and overall < stated - FAR_BELOW:
        inform(f"The autoencoder's file states {stated:.1f} dB on its own images: it was not trained for these images.")
    return overall


def _spread(job: EncodingJob) -> PixelBatch:
    """Return up to `IMAGES` usable images, from the start, the end and between."""
    total, config = len(job.source), job.config

    def load(row: int) -> PixelBatch:
        return load_batch(job.source, range(row, row + 1), config.resolution, config.exif)

    loaded = [load(row) for row in sorted({round(place) for place in np.linspace(0, total - 1, IMAGES)})]
    bad = [image for batch in loaded for image in batch.bad]
    if bad and config.on_bad_image == "stop":
        raise bad_image(bad[0])
    if len(bad) == len(loaded):
        first = next((batch for batch in map(load, range(total)) if len(batch.index)), None)
        if first is None:
            raise JLTError(f"None of the {total} images of {job.source.name} can be used.")
        loaded = [first]
    index, labels, pixels = (
        np.concatenate([getattr(batch, name) for batch in loaded]) for name in ("index", "labels", "pixels")
    )
    return PixelBatch(range(total), index, labels, pixels, tuple(bad))
