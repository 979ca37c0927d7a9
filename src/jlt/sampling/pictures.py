"""Pictures to look at: x^ along the path, ways between two noises, and two checkpoints side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from jlt.errors import JLTError
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.runtime.progress import track
from jlt.runtime.signals import until_stopped
from jlt.sampling.generate import batches_of, decode_to_uint8, labels_for
from jlt.sampling.sampler import ImageSampler
from jlt.sampling.save import GRID_SIDE, PROTOCOL, class_name
from jlt.storage.files import atomic_path, claim_folder, lock_folder
from jlt.timesteps import sampling_grid

COLUMNS = 8
"""Times of a strip before the image itself, and images from one noise to the next."""
TITLES = {
    "strip": "What the network takes for the clean image, on the way from noise",
    "interpolation": "From the noise of one image to that of the next",
    "pairs": "Two checkpoints from the same noise",
}
Rows = UInt8[np.ndarray, "n columns s s 3"]
Row = Callable[[ImageSampler, range], Rows]


def save_picture(samplers: Sequence[ImageSampler], out: Path, kind: str, names: Sequence[str] = ()) -> Path:
    """Draw `strip`, `interpolation` or `pairs` into a folder of its own, and return the picture.

    With two samplers each row is drawn of both, from the same noise and label; `names` then tells them apart.
    JLTError for samplers whose noise is not the same, and for a folder that holds anything else.
    """
    first = samplers[0]
    if kind == "interpolation" and (first.config.num % 2 or first.config.batch_size % 2):
        raise JLTError("An interpolation leads from an image to the next one: --num and --batch-size must be even.")
    for other in samplers[1:]:
        require_same_noise(first, other)
    claim_folder(out, PROTOCOL, {"picture": kind, "of": [sampler.protocol() for sampler in samplers]})
    draw = ROWS[kind]
    with lock_folder(out):
        ranges = batches_of(first.config.num, first.config.batch_size)
        work = [(numbers, sampler) for numbers in ranges for sampler in samplers]
        rows = [draw(sampler, numbers) for numbers, sampler in track(until_stopped(work), "drawing", len(work))]
        drawn = [np.concatenate(rows[index :: len(samplers)]) for index in range(len(samplers))]
        path = out / f"{kind}.png"
        with atomic_path(path) as temporary:
            _sheet(first, drawn, kind, names).save(temporary)
    return path


def _sheet(sampler: ImageSampler, drawn: Sequence[Rows], kind: str, names: Sequence[str]) -> Image.Image:
    labels = labels_for(sampler.config.labels, range(sampler.config.num), _classes(sampler), sampler.config.seed)
    classes = [class_name(sampler, label) for label in labels.tolist()]
    title = f"{TITLES[kind]} ({_settings(sampler)})"
    if kind == "interpolation":
        classes = classes[::2]
    if kind == "pairs":
        # A column for each image, a row for each checkpoint.
        images = np.concatenate([rows[:, 0] for rows in drawn])
        return draw_sheet(images, len(drawn[0]), SheetText(title, names, classes), GRID_SIDE)
    images = np.stack(drawn, axis=1).reshape(-1, *drawn[0].shape[2:])
    rows = [f"{name}: {part}" if part else name for name in classes for part in (names if len(drawn) > 1 else [""])]
    columns = [*(f"t = {t:.2f}" for t in strip_times(sampler)), "image"] if kind == "strip" else []
    return draw_sheet(images, drawn[0].shape[1], SheetText(title, rows, columns), GRID_SIDE)


def _settings(sampler: ImageSampler) -> str:
    config = sampler.config
    guidance = f", guidance {config.cfg_scale:g}" if config.cfg_scale != 1 else ""
    return f"{config.solver}, {config.steps} steps{guidance}, EMA {sampler.weights.identity['ema']}"


def strip_times(sampler: ImageSampler) -> list[float]:
    """Return the times of a strip: steps of the grid at equal distances, the first among them."""
    grid = sampling_grid(sampler.config)[:-1]
    return [grid[index * len(grid) // COLUMNS] for index in range(COLUMNS)] if len(grid) > COLUMNS else grid


def _strip(sampler: ImageSampler, numbers: range) -> Rows:
    """Return rows of x^ at the times of the strip, and the image."""
    noise, labels, fresh = sampler.begin(numbers)
    found: dict[float, Tensor] = {}
    wanted = strip_times(sampler)

    def seen(t: float, clean: Float[Tensor, "n c h w"]) -> None:
        if t in wanted:
            found[t] = clean

    latents = sampler.flow(noise, labels, fresh, seen)
    parts = [decode_to_uint8(sampler.autoencoder, part) for part in (*(found[t] for t in wanted), latents)]
    return torch.stack(parts, dim=1).cpu().numpy()


def _interpolation(sampler: ImageSampler, numbers: range) -> Rows:
    """Return rows from the noise of an image to that of the next one, with the label of the first."""
    noise, labels, fresh = sampler.begin(numbers)
    columns = []
    for place in range(COLUMNS):
        between = spherical(noise[::2], noise[1::2], place / (COLUMNS - 1))
        part = sampler.flow(between, labels[::2], lambda k: fresh(k)[::2])
        columns.append(decode_to_uint8(sampler.autoencoder, part))
    return torch.stack(columns, dim=1).cpu().numpy()


def _pairs(sampler: ImageSampler, numbers: range) -> Rows:
    (batch,) = sampler.batches([numbers])
    return batch.images.numpy()[:, None]


ROWS: dict[str, Row] = {"strip": _strip, "interpolation": _interpolation, "pairs": _pairs}


def spherical(a: Float[Tensor, "n *rest"], b: Float[Tensor, "n *rest"], share: float) -> Float[Tensor, "n *rest"]:
    """Return the noise that lies `share` (0..1) of the way from a to b.

    The weights are cosine and sine: what lies between two independent normal variables is normal with their variance.
    """
    angle = share * math.pi / 2
    return math.cos(angle) * a + math.sin(angle) * b


def _classes(sampler: ImageSampler) -> int:
    return sampler.checkpoint.config.network.num_classes


def require_same_noise(a: ImageSampler, b: ImageSampler) -> None:
    """Raise JLTError unless the images of the same number begin with the same noise and label, at the same size."""
    for name, of in {
        "latents": lambda s: s.shape,
        "noise_scale": lambda s: s.checkpoint.config.noise_scale,
        "classes": _classes,
        "pixels": lambda s: s.resolution,
    }.items():
        if of(a) != of(b):
            raise JLTError(f"The two checkpoints do not draw from the same noise: {name} {of(a)} against {of(b)}.")
