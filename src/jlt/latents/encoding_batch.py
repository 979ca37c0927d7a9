"""One batch of images on its way through the autoencoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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

    `latents` are by orientation, and so is `largest`, the largest absolute value of each latent before rounding.
    """

    rows: range
    index: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    latents: dict[str, Float[Tensor, "n c h w"]]
    largest: dict[str, Float[Tensor, " n"]]
    bad: tuple[SkippedImage, ...]


@contextlib.contextmanager
def exact_arithmetic(threads: int) -> Iterator[None]:
    """Compute, for the duration of a block, so that equal images give equal bits on equal devices.

    On a CPU the number of threads is part of it; on a GPU it means no TF32 and none but cuDNN's deterministic kernels.
    """
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    convolutions: Any = cudnn.conv  # type: ignore[attr-defined]
    before = torch.get_num_threads(), convolutions.fp32_precision, products.fp32_precision, cudnn.deterministic
    try:
        torch.set_num_threads(threads)
        convolutions.fp32_precision = products.fp32_precision = "ieee"
        cudnn.deterministic = True
        yield
    finally:
        torch.set_num_threads(before[0])
        convolutions.fp32_precision, products.fp32_precision, cudnn.deterministic = before[1:]


def encode_batch(job: EncodingJob, batch: PixelBatch) -> EncodedBatch:
    """Encode a batch of pixels in the orientations that are stored."""
    device = job.autoencoder.device
    # Channels stay last in memory, which is how the autoencoders' convolutions want them.
    images = torch.from_numpy(batch.pixels).to(device).float().div_(127.5).sub_(1).permute(0, 3, 1, 2)
    latents, largest = {}, {}
    for name in job.orientations:
        oriented = images.flip(3) if name == "latents_flip" else images
        exact = _encode_images(job, oriented, _noise_seeds(job, name, batch))
        latents[name] = exact.to(STORED_DTYPES[job.config.dtype][1])
        largest[name] = exact.abs().amax(dim=(1, 2, 3)) if len(exact) else exact.new_empty(0)
    return EncodedBatch(batch.rows, batch.index, batch.labels, latents, largest, batch.bad)


def _noise_seeds(job: EncodingJob, orientation: str, batch: PixelBatch) -> list[int] | None:
    """Return what a sampled posterior is drawn with: a function of the image's place in the source alone."""
    if job.autoencoder.posterior == "mode":
        return None
    return [derive_seed(0, orientation, index) for index in batch.index.tolist()]


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
    dtype = job.config.dtype
    largest = batch.largest[name]
    # Rounding keeps the order, so a latent is finite as stored if its largest value is.
    finite = torch.isfinite(largest.to(STORED_DTYPES[dtype][1]))
    if finite.all():
        return
    first = int(finite.logical_not().nonzero()[0, 0])
    bad = int(torch.isfinite(batch.latents[name][first]).logical_not().sum())
    raise JLTError(
        f"The latents of {job.source.describe(int(batch.index[first]))} are not finite in {dtype}: {bad} of "
        f"{batch.latents[name][first].numel()} values, largest {largest[first].item():.3g}; "
        "check the autoencoder's weights and its normalisation."
    )
