"""Images to disk: numbered PNG, one .npz as ADM's evaluator reads, or a grid to look at.

Any number of processes may share the work, and the same words continue what was interrupted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jlt.config import SampleFormat
from jlt.errors import JLTError
from jlt.evaluation.image_files import SUFFIXES
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.runtime.processes import Group, SingleProcess, require_same_arguments, stop_together
from jlt.runtime.progress import track
from jlt.sampling.generate import batches_of
from jlt.sampling.sampler import ImageBatch, ImageSampler
from jlt.sampling.solvers import network_evaluations
from jlt.storage.files import atomic_path, claim_folder, lock_folder, read_json
from jlt.storage.rows import RowTable, remove_rows, require_space, unwritten

PROTOCOL = "protocol.json"
ARRAY = "samples.npz"
PNG_SHARE = 0.6
"""Size of a PNG of a photograph against its pixels, roughly: for the room that is asked for before the first."""
GRID_SIDE = 96
"""Images of a grid are at least so large."""


def save_samples(sampler: ImageSampler, out: Path, form: SampleFormat, group: Group | None = None) -> Path:
    """Draw all images of a sampler into a folder and return what was written.

    A folder that holds images of the same protocol is completed, also to a larger number; JLTError for one that holds
    anything else, or more images, and for a disk without room. Stopped when any process was asked to end.
    """
    group = group or SingleProcess()
    require_same_arguments(
        group, {**sampler.protocol(), "format": form, "batch_size": sampler.config.batch_size}, "draw"
    )
    with contextlib.ExitStack() as held:
        place = group.on_rank0(lambda: _claim(held, sampler, out, form))
        if group.on_rank0(lambda: _finished(place)):
            return place
        missing = group.on_rank0(lambda: _missing(sampler, place))
        with stop_together(group) as until_stopped:
            keep = _keep_png(sampler, out) if form == "png" else _keep_row(_open_table(sampler, out))
            share = missing[group.rank :: group.size]
            for batch in track(until_stopped(sampler.batches(share)), _what(sampler), total=len(share)):
                keep(batch)
        group.on_rank0(lambda: _finish(sampler, place))
        return place


def _what(sampler: ImageSampler) -> str:
    nfe = network_evaluations(sampler.config.solver, sampler.config.steps)
    return f"sampling {sampler.config.num} images, {nfe} NFE each"


def _claim(held: contextlib.ExitStack, sampler: ImageSampler, out: Path, form: SampleFormat) -> Path:
    """Make the folder the place of these images, and of no more of them than are asked for."""
    words, marker = {**sampler.protocol(), "format": form}, out / PROTOCOL
    stored = read_json(marker) if marker.is_file() else {}
    begun = "format" in stored
    if begun:
        # Whoever writes there goes on by the words that it began with.
        held.enter_context(lock_folder(out))
    # A grid or an array is of all its images; a folder can be completed to more.
    more = form == "png" and (not begun or stored["count"] <= sampler.config.num)
    if more:
        _require_none_beyond(out, sampler.config.num)
    claim_folder(out, PROTOCOL, words, free=("count",) if more else ())
    if not begun:
        held.enter_context(lock_folder(out))
    for path in out.glob(".*.partial.*"):
        path.unlink(missing_ok=True)
    return {"png": out, "npz": out / ARRAY, "grid": out / "grid.png"}[form]


def _require_none_beyond(out: Path, num: int) -> None:
    """Raise JLTError for an image that is none of those to be drawn: whoever measures the folder would take it in."""
    wanted = {png_path(out, number).name for number in range(num)}
    foreign = sorted(path.name for path in out.glob("*") if path.suffix.lower() in SUFFIXES and path.name not in wanted)
    visible = [name for name in foreign if not name.startswith(".")]
    if visible:
        raise JLTError(f"{out} holds {visible[0]}, which is none of the {num} images that were asked for: remove it.")


def _finished(place: Path) -> bool:
    """Whether the array or the grid is there; its table, which a kill may have left, is then removed."""
    if place.is_file():
        remove_rows(place.parent)
    return place.is_file()


def _missing(sampler: ImageSampler, place: Path) -> list[range]:
    """Return the ranges of numbers whose images are not all there; JLTError for a disk without room for them."""
    ranges = batches_of(sampler.config.num, sampler.config.batch_size)
    if not place.is_dir():
        table = _open_table(sampler, place.parent)
        if place.suffix == ".npz":
            # The table has its room; the array is made beside it.
            require_space(place.parent, 3 * sampler.config.num * sampler.resolution**2, f"{place.name} and its images")
        return unwritten(ranges, table.written())
    there = np.array([png_path(place, number).exists() for number in range(sampler.config.num)])
    size = int(PNG_SHARE * 3 * sampler.resolution**2 * (~there).sum())
    require_space(place, size, f"{(~there).sum()} PNG images")
    return unwritten(ranges, there)


Keep = Callable[[ImageBatch], None]


def _keep_png(sampler: ImageSampler, out: Path) -> Keep:
    """Return what writes the images of a batch that are not there."""

    def keep(batch: ImageBatch) -> None:
        for offset, (image, label) in enumerate(zip(batch.images.numpy(), batch.labels.tolist(), strict=True)):
            path = png_path(out, batch.start + offset)
            if not path.exists():
                save_image(image, path, {"label": str(label), "classes": sampler.classes})

    return keep


def _keep_row(table: RowTable) -> Keep:
    """Return what writes a batch into a table."""
    return lambda batch: table.write(batch.start, {"images": batch.images.numpy(), "labels": batch.labels.numpy()})


def png_path(out: Path, number: int) -> Path:
    """Return where image `number` lies."""
    return out / f"{number:06d}.png"


def _open_table(sampler: ImageSampler, out: Path) -> RowTable:
    image = (sampler.resolution, sampler.resolution, 3)
    return RowTable(out, {"images": (np.uint8, image), "labels": (np.int64, ())}, sampler.config.num)


def _finish(sampler: ImageSampler, place: Path) -> None:
    """Make the array or the grid of a full table, and remove the table; of PNG see that all are there."""
    if place.is_dir():
        if left := sum(map(len, _missing(sampler, place))):
            raise JLTError(f"{left} images are not in {place}: it must be a folder that all processes share.")
        return
    table = _open_table(sampler, place.parent)
    table.require_full()
    (_save_npz if place.suffix == ".npz" else _save_grid)(sampler, table.read(), place)
    table.remove()


def _save_npz(sampler: ImageSampler, columns: Mapping[str, np.ndarray], place: Path) -> None:
    with atomic_path(place) as temporary:
        np.savez(temporary, arr_0=columns["images"], arr_1=columns["labels"], classes=np.array(sampler.classes))


def _save_grid(sampler: ImageSampler, columns: Mapping[str, np.ndarray], place: Path) -> None:
    names = [class_name(sampler, label) for label in columns["labels"].tolist()]
    across = math.ceil(math.sqrt(len(names)))
    sheet = draw_sheet(np.asarray(columns["images"]), across, SheetText(captions=names), GRID_SIDE)
    with atomic_path(place) as temporary:
        sheet.save(temporary)


def class_name(sampler: ImageSampler, label: int) -> str:
    """Return the name of a class, or its number where the latents came without names."""
    names = sampler.checkpoint.latents.get("class_names") or []
    return names[label] if label < len(names) else str(label)


def save_image(image: UInt8[np.ndarray, "h w 3"], path: Path, words: Mapping[str, str]) -> None:
    """Write one PNG atomically, with words that tell what it shows."""
    info = PngInfo()
    for key, value in words.items():
        info.add_text(key, value)
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, pnginfo=info)
