"""Images to disk: numbered PNG, one .npz as ADM's evaluator reads, or a grid to look at.

Any number of processes may share the work, and the same command resumes what was interrupted.
"""

from __future__ import annotations

import contextlib
import math
from functools import partial
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
"""Size of a PNG of a photograph against its pixels, roughly: for the space that is required before the first."""
MIN_SIDE = 96
"""Least side in pixels at which a sheet shows an image."""


def save_samples(sampler: ImageSampler, out: Path, form: SampleFormat, group: Group | None = None) -> Path:
    """Draw all images of a sampler into a folder and return what was written.

    A folder that holds images of the same protocol is completed, also to a larger number. JLTError for one that holds
    anything else, or more images, and for a disk without space. Stopped when any process received a request to stop.
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
            write = partial(_write_pngs, sampler, out)
            if form != "png":
                write = partial(_write_rows, _open_table(sampler, out))
            share = missing[group.rank :: group.size]
            nfe = network_evaluations(sampler.config.solver, sampler.config.steps)
            title = f"sampling {sampler.config.num} images, {nfe} NFE each"
            for batch in track(until_stopped(sampler.batches(share)), title, total=len(share)):
                write(batch)
        group.on_rank0(lambda: _finish(sampler, place))
        return place


def _claim(held: contextlib.ExitStack, sampler: ImageSampler, out: Path, form: SampleFormat) -> Path:
    """Reserve the folder for these images, and for no more of them than are requested."""
    protocol, marker = {**sampler.protocol(), "format": form}, out / PROTOCOL
    stored = read_json(marker) if marker.is_file() else {}
    begun = "format" in stored
    if begun:
        # Before the protocol changes: another process may be writing by the stored one.
        held.enter_context(lock_folder(out))
    # A grid or an array is of all its images; a folder can be completed to more.
    more = form == "png" and (not begun or stored["count"] <= sampler.config.num)
    if more:
        _require_none_beyond(out, sampler.config.num)
    claim_folder(out, PROTOCOL, protocol, free=("count",) if more else ())
    if not begun:
        held.enter_context(lock_folder(out))
    for path in out.glob(".*.partial.*"):
        path.unlink(missing_ok=True)
    return {"png": out, "npz": out / ARRAY, "grid": out / "grid.png"}[form]


def _require_none_beyond(out: Path, num: int) -> None:
    """Raise JLTError for an image that is none of those to be drawn: an evaluation of the folder would include it."""
    wanted = {_png_path(out, number).name for number in range(num)}
    foreign = sorted(path.name for path in out.glob("*") if path.suffix.lower() in SUFFIXES and path.name not in wanted)
    visible = [name for name in foreign if not name.startswith(".")]
    if visible:
        raise JLTError(f"{out} holds {visible[0]}, which is none of the {num} images that were requested: remove it.")


def _finished(place: Path) -> bool:
    """Whether the array or the grid exists; its table, which a kill may have left, is then removed."""
    if place.is_file():
        remove_rows(place.parent)
    return place.is_file()


def _missing(sampler: ImageSampler, place: Path) -> list[range]:
    """Return the ranges of numbers whose images do not all exist; JLTError for a disk without space for them."""
    ranges = batches_of(sampler.config.num, sampler.config.batch_size)
    if not place.is_dir():
        table = _open_table(sampler, place.parent)
        if place.suffix == ".npz":
            # The table has its space already; the array is written next to it.
            require_space(place.parent, 3 * sampler.config.num * sampler.resolution**2, f"{place.name} and its images")
        return unwritten(ranges, table.written())
    written = np.array([_png_path(place, number).exists() for number in range(sampler.config.num)])
    size = int(PNG_SHARE * 3 * sampler.resolution**2 * (~written).sum())
    require_space(place, size, f"{(~written).sum()} PNG images")
    return unwritten(ranges, written)


def _write_pngs(sampler: ImageSampler, out: Path, batch: ImageBatch) -> None:
    """Write the images of a batch that do not exist."""
    for offset, (image, label) in enumerate(zip(batch.images.numpy(), batch.labels.tolist(), strict=True)):
        path = _png_path(out, batch.start + offset)
        if not path.exists():
            info = PngInfo()
            info.add_text("label", str(label))
            info.add_text("classes", sampler.classes)
            with atomic_path(path) as temporary:
                Image.fromarray(image).save(temporary, pnginfo=info)


def _write_rows(table: RowTable, batch: ImageBatch) -> None:
    table.write(batch.start, {"images": batch.images.numpy(), "labels": batch.labels.numpy()})


def _png_path(out: Path, number: int) -> Path:
    return out / f"{number:06d}.png"


def _open_table(sampler: ImageSampler, out: Path) -> RowTable:
    image = (sampler.resolution, sampler.resolution, 3)
    return RowTable(out, {"images": (np.uint8, image), "labels": (np.int64, ())}, sampler.config.num)


def _finish(sampler: ImageSampler, place: Path) -> None:
    """Write the array or the grid of a full table, and remove the table; of PNG check that all exist."""
    if place.is_dir():
        if left := sum(map(len, _missing(sampler, place))):
            raise JLTError(f"{left} images are not in {place}: it must be a folder that all processes share.")
        return
    table = _open_table(sampler, place.parent)
    table.require_full()
    columns = table.read()
    if place.suffix == ".npz":
        with atomic_path(place) as temporary:
            np.savez(temporary, arr_0=columns["images"], arr_1=columns["labels"], classes=np.array(sampler.classes))
    else:
        names = [sampler.class_name(label) for label in columns["labels"].tolist()]
        save_sheet(place, np.asarray(columns["images"]), math.ceil(math.sqrt(len(names))), SheetText(captions=names))
    table.remove()


def save_sheet(path: Path, images: UInt8[np.ndarray, "n s s 3"], columns: int, text: SheetText) -> Path:
    """Write a sheet of images atomically, and return its path."""
    with atomic_path(path) as temporary:
        draw_sheet(images, columns, text, MIN_SIDE).save(temporary)
    return path
