"""The autoencoder's pass over one batch of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jlt.errors import JLTError
from jlt.images.decoding import PixelBatch
from jlt.images.source import SkippedImage
from jlt.latents.encoding_job import EncodingJob
from jlt.latents.store import STORED_DTYPES
from jlt.runtime.random_numbers import derive_seed


@dataclass(frozen=True)
class EncodedBatch:
    """The latents of the usable images among the positions `rows`, in the stored dtype, on the autoencoder's device.

    The keys of `latents` and `largest` are orientations; `largest` is each latent's largest absolute value before
    rounding.
    """

    rows: range
    index: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    latents: dict[str, Float[Tensor, "n c h w"]]
    largest: dict[str, Float[Tensor, " n"]]
    bad: tuple[SkippedImage, ...]


def encode_batch(job: EncodingJob, batch: PixelBatch) -> EncodedBatch:
    """Encode a batch of pixels in the orientations that are stored."""
    # Channels stay last in memory, which is fastest for the autoencoders' convolutions.
    pixels = torch.from_numpy(batch.pixels).to(job.autoencoder.device)
    images = pixels.float().div_(127.5).sub_(1).permute(0, 3, 1, 2)
    latents, largest = {}, {}
    for name in job.orientations:
        seeds = None
        if job.autoencoder.posterior == "sample":
            # A function of the image's position in the source alone.
            seeds = [derive_seed(0, name, index) for index in batch.index.tolist()]
        exact = _encode_images(job, images.flip(3) if name == "latents_flip" else images, seeds)
        latents[name] = exact.to(STORED_DTYPES[job.config.dtype][1])
        largest[name] = exact.abs().amax(dim=(1, 2, 3)) if len(exact) else exact.new_empty(0)
    return EncodedBatch(batch.rows, batch.index, batch.labels, latents, largest, batch.bad)


def _encode_images(
    job: EncodingJob, images: Float[Tensor, "n 3 s s"], noise_seeds: list[int] | None
) -> Float[Tensor, "n c h w"]:
    expected = (len(images), job.autoencoder.channels, job.side, job.side)
    if not len(images):
        return images.new_empty(expected)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=job.config.precision == "bfloat16"):
        latents = job.autoencoder.encode(images, noise_seeds).float()
    if latents.shape != expected:
        raise ValueError(f"{job.autoencoder.name} gave latents {tuple(latents.shape)}, its sizes say {expected}")
    return latents


def require_finite(job: EncodingJob, batch: EncodedBatch, name: str) -> None:
    """Raise a JLTError that names the first image whose latent, as stored, holds infinities or NaN."""
    dtype, largest = job.config.dtype, batch.largest[name]
    # Rounding keeps the order, so a latent is finite as stored if its largest value is.
    finite = torch.isfinite(largest.to(STORED_DTYPES[dtype][1]))
    if finite.all():
        return
    first = int(finite.logical_not().nonzero()[0, 0])
    latent = batch.latents[name][first]
    bad = int(torch.isfinite(latent).logical_not().sum())
    raise JLTError(
        f"The latents of {job.source.describe(int(batch.index[first]))} are not finite in {dtype}: {bad} of "
        f"{latent.numel()} values, largest {largest[first].item():.3g}. "
        "Check the autoencoder's weights and its normalisation."
    )
