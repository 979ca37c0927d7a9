"""Pictures to look at: x^ along the path, ways between two noises, and two checkpoints side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from jlt.errors import JLTError
from jlt.images.contact_sheet import SheetText
from jlt.runtime.progress import track
from jlt.runtime.signals import until_stopped
from jlt.sampling.generate import Start, batches_of, decode_to_uint8, labels_for
from jlt.sampling.sampler import ImageSampler
from jlt.sampling.save import PROTOCOL, save_sheet
from jlt.storage.files import claim_folder, lock_folder
from jlt.timesteps import sampling_grid

COLUMNS = 8
"""Times of a strip before the image itself, and images from one noise to the next."""
TITLES = {
    "strip": "The clean image that the network predicts, on the way from noise",
    "interpolation": "From the noise of one image to that of the next",
    "pairs": "Two checkpoints from the same noise",
}
Rows = UInt8[np.ndarray, "n columns s s 3"]
DrawRows = Callable[[ImageSampler, range], Rows]


def save_picture(samplers: Sequence[ImageSampler], out: Path, kind: str, names: Sequence[str] = ()) -> Path:
    """Draw `strip`, `interpolation` or `pairs` into a folder of its own, and return the picture.

    With two samplers each row is drawn of both, from the same noise and label; `names` labels them.
    JLTError for samplers whose noise is not the same, and for a folder that holds anything else.
    """
    first = samplers[0]
    if kind == "interpolation" and (first.config.num % 2 or first.config.batch_size % 2):
        raise JLTError("An interpolation leads from an image to the next one: --num and --batch-size must be even.")
    for other in samplers[1:]:
        _require_same_noise(first, other)
    claim_folder(out, PROTOCOL, {"picture": kind, "of": [sampler.protocol() for sampler in samplers]})
    with lock_folder(out):
        ranges = batches_of(first.config.num, first.config.batch_size)
        work = [(numbers, sampler) for numbers in ranges for sampler in samplers]
        rows = [
            DRAW_ROWS[kind](sampler, numbers) for numbers, sampler in track(until_stopped(work), "drawing", len(work))
        ]
        drawn = [np.concatenate(rows[index :: len(samplers)]) for index in range(len(samplers))]
        return _save(out / f"{kind}.png", first, drawn, kind, names)


def _save(path: Path, sampler: ImageSampler, drawn: Sequence[Rows], kind: str, names: Sequence[str]) -> Path:
    config = sampler.config
    labels = labels_for(config.labels, range(config.num), sampler.shape.num_classes, config.seed).tolist()
    classes = [sampler.class_name(label) for label in (labels[::2] if kind == "interpolation" else labels)]
    guidance = f", guidance {config.cfg_scale:g}" if config.cfg_scale != 1 else ""
    settings = f"{config.solver}, {config.steps} steps{guidance}, EMA {sampler.weights.identity['ema']}"
    title = f"{TITLES[kind]} ({settings})"
    if kind == "pairs":
        # A column for each image, a row for each checkpoint.
        images = np.concatenate([rows[:, 0] for rows in drawn])
        return save_sheet(path, images, len(drawn[0]), SheetText(title, names, classes))
    images = np.stack(drawn, axis=1).reshape(-1, *drawn[0].shape[2:])
    rows = [f"{one}: {name}" for one in classes for name in names] if len(drawn) > 1 else classes
    columns = [*(f"t = {t:.2f}" for t in _strip_times(sampler)), "image"] if kind == "strip" else []
    return save_sheet(path, images, drawn[0].shape[1], SheetText(title, rows, columns))


def _strip_times(sampler: ImageSampler) -> list[float]:
    """Return the times of a strip: steps of the grid at equal distances, the first among them."""
    grid = sampling_grid(sampler.config)[:-1]
    return [grid[index * len(grid) // COLUMNS] for index in range(COLUMNS)] if len(grid) > COLUMNS else grid


def _strip(sampler: ImageSampler, numbers: range) -> Rows:
    """Return rows of x^ at the times of the strip, and the image."""
    clean_at: dict[float, Tensor] = {}
    times = _strip_times(sampler)

    def keep(t: float, clean: Float[Tensor, "n c h w"]) -> None:
        if t in times:
            clean_at[t] = clean

    drawing = sampler.latent_sampler
    latents = drawing.flow(drawing.start(numbers), on_clean=keep)
    return _decoded(sampler, [*(clean_at[t] for t in times), latents])


def _interpolation(sampler: ImageSampler, numbers: range) -> Rows:
    """Return rows from the noise of an image to that of the next one, with the label of the first."""
    drawing = sampler.latent_sampler
    start = drawing.start(numbers)
    noise, labels = start.noise, start.labels[::2]

    def latents(share: float) -> Tensor:
        return drawing.flow(Start(spherical(noise[::2], noise[1::2], share), labels, lambda k: start.fresh(k)[::2]))

    return _decoded(sampler, [latents(column / (COLUMNS - 1)) for column in range(COLUMNS)])


def _pairs(sampler: ImageSampler, numbers: range) -> Rows:
    (batch,) = sampler.batches([numbers])
    return batch.images.numpy()[:, None]


DRAW_ROWS: dict[str, DrawRows] = {"strip": _strip, "interpolation": _interpolation, "pairs": _pairs}


def _decoded(sampler: ImageSampler, columns: Sequence[Float[Tensor, "n c h w"]]) -> Rows:
    return torch.stack([decode_to_uint8(sampler.autoencoder, part) for part in columns], dim=1).cpu().numpy()


def spherical(a: Float[Tensor, "n *rest"], b: Float[Tensor, "n *rest"], share: float) -> Float[Tensor, "n *rest"]:
    """Return the noise at `share` (0..1) of the way from a to b.

    The weights are cosine and sine, so that the result of two independent normal variables has their distribution.
    """
    angle = share * math.pi / 2
    return math.cos(angle) * a + math.sin(angle) * b


def _require_same_noise(a: ImageSampler, b: ImageSampler) -> None:
    """Raise JLTError unless the images of the same number begin with the same noise and label, at the same size."""
    for name, ours, theirs in (
        ("latents", a.shape, b.shape),
        ("noise_scale", a.checkpoint.config.noise_scale, b.checkpoint.config.noise_scale),
        ("pixels", a.resolution, b.resolution),
    ):
        if ours != theirs:
            raise JLTError(f"The two checkpoints do not draw from the same noise: {name} {ours} against {theirs}.")
