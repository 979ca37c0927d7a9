"""Images to disk: numbered PNG, one .npz as ADM's evaluator reads, or a grid; and pictures of how images come about.

Any number of processes may share the work, and the same command resumes what was interrupted. The pictures are x^ along
the path, ways between two noises, and two checkpoints side by side.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from jlt.config import SampleFormat
from jlt.errors import JLTError, UsageError
from jlt.evaluation.image_files import SUFFIXES
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.runtime.environment import require_memory
from jlt.runtime.processes import Group, SingleProcess, require_same_arguments, stop_together
from jlt.runtime.progress import inform, track
from jlt.runtime.signals import until_stopped
from jlt.sampling.sampler import ImageBatch, ImageSampler, Start, batches_of, decode_to_uint8, labels_for
from jlt.sampling.solvers import network_evaluations
from jlt.storage.codec import Count, from_file, known_fields
from jlt.storage.files import atomic_path, read_marker
from jlt.storage.folders import Claim
from jlt.storage.rows import RowTable, remove_rows, require_space, unwritten
from jlt.storage.seals import is_intact, seal_file
from jlt.timesteps import sampling_grid

PROTOCOL = "protocol.json"
ARRAY = "samples.npz"
PNG_SHARE = 0.6
"""Size of a PNG of a photograph against its pixels, roughly: for the space that is required before the first."""
SPACE = {"png": PNG_SHARE, "npz": 2.0, "grid": 1.0}
"""Bytes on disk against those of the pixels, by format: an array is written next to the table of its images."""
MIN_SIDE = 96
"""Least side in pixels at which a sheet shows an image."""
COLUMNS = 8
"""Times of a strip before the image itself, and images from one noise to the next."""
TITLES = {
    "strip": "The clean image that the network predicts, on the way from noise",
    "interpolation": "From the noise of one image to that of the next, of the class of the first",
    "pairs": "Two checkpoints from the same noise",
}
Rows = UInt8[np.ndarray, "n columns s s 3"]


def save_samples(sampler: ImageSampler, out: Path, form: SampleFormat, group: Group | None = None) -> Path:
    """Draw all images of a sampler into a folder and return what was written.

    A folder that holds images of the same protocol is completed, also to a larger number. JLTError for one that holds
    anything else, or more images, and for a disk without space. Stopped when any process received a request to stop.
    """
    group = group or SingleProcess()
    arguments = {**sampler.protocol(), "format": form, "batch_size": sampler.config.batch_size}
    require_same_arguments(group, arguments, "draw")
    with contextlib.ExitStack() as held:
        place, work = group.on_rank0(lambda: _claim(held, sampler, out, form))
        if group.on_rank0(lambda: place.is_file() and _is_kept(place, work)):
            # A kill may have left its table.
            group.on_rank0(lambda: remove_rows(out))
            return place
        missing = group.on_rank0(lambda: _missing(sampler, place, work))
        with stop_together(group) as until_any_stopped:
            table = None if form == "png" else _open_table(sampler, out)
            share = missing[group.rank :: group.size]
            nfe = network_evaluations(sampler.config.solver, sampler.config.steps)
            title = f"sampling {sampler.config.num} images, {nfe} NFE each"
            for batch in track(until_any_stopped(sampler.batches(share)), title, total=len(share)):
                if table:
                    table.write(batch.start, {"images": batch.images.numpy(), "labels": batch.labels.numpy()})
                else:
                    _write_pngs(sampler, out, work, batch)
        group.on_rank0(lambda: _finish(sampler, place, work))
        return place


def _claim(held: contextlib.ExitStack, sampler: ImageSampler, out: Path, form: SampleFormat) -> tuple[Path, str]:
    """Reserve the folder for these images, and for no more of them than are requested.

    Return what will be written, and the identity of this sampling.
    """
    if form == "grid":
        require_memory(6 * sampler.config.num * sampler.resolution**2, f"A grid of {sampler.config.num:,} images")
    protocol = {**sampler.protocol(), "format": form, "class_names": sampler.class_names}
    marker = out / PROTOCOL
    stored = read_drawn(marker) if marker.is_file() else Drawn()
    begun = bool(stored.format)
    # A grid or an array is of all its images; a folder can be completed to more.
    more = form == "png" and (not begun or stored.count <= sampler.config.num)
    if more:
        # An evaluation of the folder would include an image that is none of those to be drawn.
        wanted = {_png_path(out, number).name for number in range(sampler.config.num)}
        found = {path.name for path in out.glob("[!.]*") if path.suffix.lower() in SUFFIXES}
        if foreign := sorted(found - wanted):
            raise JLTError(
                f"{out} holds {foreign[0]}, which is none of the {len(wanted)} images that were requested: remove it."
            )
    claim = Claim(out, PROTOCOL, protocol, free=("class_names", *(("count",) if more else ())))
    held.enter_context(claim.hold())
    place = {"png": out, "npz": out / ARRAY, "grid": out / "grid.png"}[form]
    if not begun:
        images = 3 * sampler.config.num * sampler.resolution**2
        require_space(out, int(SPACE[form] * images), f"{sampler.config.num} images")
    claim.begin()
    return place, read_marker(marker)[1]


@dataclass(frozen=True)
class Drawn:
    """What a `protocol.json` says of the images next to it that their reader needs."""

    count: Count = 0
    format: SampleFormat | None = None
    class_names: tuple[str, ...] = ()


def read_drawn(path: Path) -> Drawn:
    """Read a `protocol.json`; JLTError if it is damaged, or a value is not possible."""
    return from_file(Drawn, path, known_fields(Drawn, read_marker(path)[0]))


def _is_kept(path: Path, work: str) -> bool:
    """Return whether an existing file is the one that was drawn; otherwise it is drawn again, with a note."""
    if is_intact(path, path.name, work):
        return True
    inform(f"{path} is damaged or is no file of this sampling: it is drawn again.")
    return False


def _missing(sampler: ImageSampler, place: Path, work: str) -> list[range]:
    """Return the ranges of numbers whose images are not all intact; JLTError for a disk without space for them."""
    ranges = batches_of(sampler.config.num, sampler.config.batch_size)
    if not place.is_dir():
        table = _open_table(sampler, place.parent)
        if place.suffix == ".npz":
            # The table has its space already; the array is written next to it.
            require_space(place.parent, 3 * sampler.config.num * sampler.resolution**2, f"{place.name} and its images")
        return unwritten(ranges, table.written())
    paths = [_png_path(place, number) for number in range(sampler.config.num)]
    written = np.array([path.exists() and _is_kept(path, work) for path in paths])
    size = int(PNG_SHARE * 3 * sampler.resolution**2 * (~written).sum())
    require_space(place, size, f"{(~written).sum()} PNG images")
    return unwritten(ranges, written)


def _write_pngs(sampler: ImageSampler, out: Path, work: str, batch: ImageBatch) -> None:
    """Write the images of a batch that do not exist, or are damaged."""
    for offset, (image, label) in enumerate(zip(batch.images.numpy(), batch.labels.tolist(), strict=True)):
        path = _png_path(out, batch.start + offset)
        if not (path.exists() and is_intact(path, path.name, work)):
            info = PngInfo()
            info.add_text("label", str(label))
            info.add_text("classes", sampler.classes)
            with atomic_path(path) as temporary:
                Image.fromarray(image).save(temporary, pnginfo=info)
                seal_file(temporary, path.name, work)


def _png_path(out: Path, number: int) -> Path:
    return out / f"{number:06d}.png"


def _open_table(sampler: ImageSampler, out: Path) -> RowTable:
    image = (sampler.resolution, sampler.resolution, 3)
    return RowTable(out, {"images": (np.uint8, image), "labels": (np.int64, ())}, sampler.config.num)


def _finish(sampler: ImageSampler, place: Path, work: str) -> None:
    """Write the array or the grid of a full table, and remove the table; of PNG check that all exist."""
    if place.is_dir():
        if left := sum(map(len, _missing(sampler, place, work))):
            raise JLTError(f"{left} images are not in {place}: it must be a folder that all processes share.")
        return
    table = _open_table(sampler, place.parent)
    table.require_full()
    columns = table.read()
    if place.suffix == ".npz":
        with atomic_path(place) as temporary:
            np.savez(temporary, arr_0=columns["images"], arr_1=columns["labels"], classes=np.array(sampler.classes))
            seal_file(temporary, place.name, work)
    else:
        names = [sampler.class_name(label) for label in columns["labels"].tolist()]
        save_sheet(
            place,
            np.asarray(columns["images"]),
            math.ceil(math.sqrt(len(names))),
            SheetText(sampler.decoder_note, captions=names),
            work,
        )
    table.remove()


def save_sheet(path: Path, images: UInt8[np.ndarray, "n s s 3"], columns: int, text: SheetText, work: str = "") -> Path:
    """Write a sheet of images atomically, sealed as a file of a work with this identity, and return its path."""
    with atomic_path(path) as temporary:
        draw_sheet(images, columns, text, MIN_SIDE).save(temporary)
        seal_file(temporary, path.name, work)
    return path


def save_picture(samplers: Sequence[ImageSampler], out: Path, kind: str, names: Sequence[str] = ()) -> Path:
    """Draw `strip`, `interpolation` or `pairs` into a folder of its own, and return the picture.

    With two samplers each row is drawn of both, from the same noise and label; `names` labels them.
    JLTError for samplers whose noise is not the same, and for a folder that holds anything else.
    """
    first = samplers[0]
    if kind == "interpolation" and (first.config.num % 2 or first.config.batch_size % 2):
        raise UsageError("An interpolation leads from an image to the next one: --num and --batch-size must be even.")
    for other in samplers[1:]:
        require_same_noise(first, other)
    claim = Claim(out, PROTOCOL, {"picture": kind, "of": [sampler.protocol() for sampler in samplers]})
    with claim.hold():
        claim.begin()
        ranges = batches_of(first.config.num, first.config.batch_size)
        work = [(numbers, sampler) for numbers in ranges for sampler in samplers]
        drawing = until_stopped(DRAW_ROWS[kind](sampler, numbers) for numbers, sampler in work)
        rows = list(track(drawing, "drawing", len(work)))
        drawn = [np.concatenate(rows[index :: len(samplers)]) for index in range(len(samplers))]
        return _save(out / f"{kind}.png", first, drawn, kind, names)


def _save(path: Path, sampler: ImageSampler, drawn: Sequence[Rows], kind: str, names: Sequence[str]) -> Path:
    config = sampler.config
    labels = labels_for(config.labels, range(config.num), sampler.shape.num_classes, config.seed).tolist()
    classes = [sampler.class_name(label) for label in (labels[::2] if kind == "interpolation" else labels)]
    guidance = f", guidance {config.cfg_scale:g}" if config.cfg_scale != 1 else ""
    settings = f"{config.solver}, {config.steps} steps{guidance}, EMA {sampler.weights.identity['ema']}"
    settings += f", {sampler.decoder_note}" if sampler.decoder_note else ""
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

    def keep(t: float, z: Float[Tensor, "n c h w"], clean: Float[Tensor, "n c h w"]) -> None:  # noqa: ARG001
        if t in times:
            clean_at[t] = clean

    drawing = sampler.latent_sampler
    latents = drawing.flow(drawing.start(numbers), observe=keep)
    return _decoded(sampler, [*(clean_at[t] for t in times), latents])


def _interpolation(sampler: ImageSampler, numbers: range) -> Rows:
    """Return rows from the noise of an image to that of the next one, with the label of the first."""
    drawing = sampler.latent_sampler
    start = drawing.start(numbers)
    first, second = (
        Start(start.noise[part::2], start.labels[part::2], lambda k, part=part: start.fresh(k)[part::2])  # type: ignore[misc]
        for part in range(2)
    )
    return _decoded(sampler, [drawing.flow(between) for between in starts_between(first, second)])


def starts_between(a: Start, b: Start) -> list[Start]:
    """Return COLUMNS starts from a to b at equal distances, with the labels and the fresh noise of a."""
    shares = [column / (COLUMNS - 1) for column in range(COLUMNS)]
    return [Start(spherical(a.noise, b.noise, share), a.labels, a.fresh) for share in shares]


DRAW_ROWS: dict[str, Callable[[ImageSampler, range], Rows]] = {
    "strip": _strip,
    "interpolation": _interpolation,
    "pairs": lambda sampler, numbers: next(sampler.batches([numbers])).images.numpy()[:, None],
}


def _decoded(sampler: ImageSampler, columns: Sequence[Float[Tensor, "n c h w"]]) -> Rows:
    return torch.stack([decode_to_uint8(sampler.autoencoder, part) for part in columns], dim=1).cpu().numpy()


def spherical(a: Float[Tensor, "n *rest"], b: Float[Tensor, "n *rest"], share: float) -> Float[Tensor, "n *rest"]:
    """Return the noise at `share` (0..1) of the way from a to b.

    The weights are cosine and sine, so that the result of two independent normal variables has their distribution.
    """
    angle = share * math.pi / 2
    return math.cos(angle) * a + math.sin(angle) * b


def require_same_noise(a: ImageSampler, b: ImageSampler) -> None:
    """Raise JLTError unless the images of the same number begin with the same noise and label, at the same size."""
    for name, ours, theirs in (
        ("latents", a.shape, b.shape),
        ("noise_scale", a.checkpoint.config.noise_scale, b.checkpoint.config.noise_scale),
        ("pixels", a.resolution, b.resolution),
    ):
        if ours != theirs:
            raise JLTError(f"The two checkpoints do not draw from the same noise: {name} {ours} against {theirs}.")
