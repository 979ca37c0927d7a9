"""From a checkpoint or from images to an evaluation: its numbers with their protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from jlt.config import NetworkConfig, SampleConfig
from jlt.errors import JLTError
from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.image_files import open_images
from jlt.evaluation.reference import (
    CHUNK,
    STATISTICS_SUFFIXES,
    Reference,
    check_reference,
    open_reference,
    reference_protocol,
)
from jlt.evaluation.suite import Columns, arrays_of, evaluate_images, measure, open_table, require_enough
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.images.registry import open_source, reopen_source
from jlt.images.source import ImageSource, Selected
from jlt.results.evaluation import Evaluation, Jackknife, Metrics, bias_text
from jlt.results.files import read_result, write_result
from jlt.runtime.environment import default_device, versions
from jlt.runtime.processes import Group, SingleProcess, require_same_arguments, stop_together
from jlt.runtime.progress import bar, inform
from jlt.runtime.signals import Stopped, stop_on_signal
from jlt.sampling.sampler import ImageBatch, ImageSampler, batches_of, open_sampler
from jlt.sampling.save import ARRAY, PROTOCOL, Drawn, read_drawn
from jlt.storage.codec import to_json
from jlt.storage.files import atomic_path, read_marker, work_of
from jlt.storage.folders import LOCK, lock_folder, remove_leftovers, remove_tree, require_unlinked
from jlt.storage.rows import RowTable, unwritten
from jlt.storage.seals import is_intact, seal_file
from jlt.training.checkpoint import Checkpoint, open_checkpoint, step_folder

BATCH_SIZE = 250
GRID_COLUMNS = 8
"""Samples of each class in a grid."""


def reference_of(
    latents: Mapping[str, Any],
    real_images: str | ImageSource,
    extractor: FeatureExtractor,
    resolution: int,
    group: Group | None = None,
) -> Reference:
    """Open the real images that samples are compared with, by default those that the latents were encoded from."""
    images = real_images or images_of(latents)
    return open_reference(images, extractor, resolution, latents.get("exif", "ignore"), group)


def images_of(latents: Mapping[str, Any]) -> ImageSource:
    """Return the images that latents were encoded from, by the identity of their store.

    JLTError if they are missing, changed since, or not all known.
    """
    try:
        source = reopen_source(latents["source"])
    except JLTError as error:
        raise JLTError(f"{error} Name real images with --reference.") from error
    skipped = latents.get("skipped", [])
    if len(source) - len(skipped) != latents["count"]:
        raise JLTError("The run does not record which images were skipped: name real images with --reference.")
    return Selected(source, np.delete(np.arange(len(source)), skipped)) if skipped else source


def evaluate_sampler(
    sampler: ImageSampler,
    reference: Reference,
    extractor: FeatureExtractor,
    place: Path | None = None,
    group: Group | None = None,
    keep: bool = False,
) -> Evaluation:
    """Draw, decode and measure, with no images on disk; return the evaluation, in all processes.

    The features stay in the folder `place` (a temporary one by default) until all are drawn: the same call resumes an
    interrupted one. With `keep` they stay afterwards too, for a later call with more images; no warning of few images
    is then printed. JLTError before the first image for a reference that does not fit, too few images or a disk
    without room.
    """
    group = group or SingleProcess()
    protocol = sampler_protocol(sampler, reference.identity(), extractor)
    require_same_arguments(group, {**protocol, "batch_size": sampler.config.batch_size}, "measure")
    check_reference(reference, extractor, sampler.resolution)
    require_enough(sampler.config.num)
    with contextlib.ExitStack() as held:
        if place is None:
            place = Path(group.on_rank0(lambda: held.enter_context(tempfile.TemporaryDirectory(prefix="jlt-"))))
        with drawn_features(sampler, extractor, place, group) as table:
            class_logits = extractor.class_logits(sampler.classes, sampler.class_names)
            with stop_on_signal() as stop:
                columns = Columns(**table.read(), class_logits=class_logits)
                metrics, left_out = group.on_rank0(lambda: measure(columns, reference, extractor))
            if any(group.gather(bool(stop))):
                raise Stopped("Stopped on request.")
            if not (keep or table.holds_more):
                group.on_rank0(lambda: _remove(table))
    if group.rank == 0 and not keep:
        warn_if_few(metrics, extractor)
    jackknife = Jackknife(tuple(left_out.without), tuple(left_out.sizes))
    return Evaluation(sampler.checkpoint.step, metrics, to_json(protocol), jackknife)


def table_folder(sampler: ImageSampler, extractor: FeatureExtractor, place: Path) -> Path:
    """Return the folder in `place` for the features of a sampler, the same for any number of images."""
    identity = {**sampler.protocol(), "count": None, "extractor": extractor.identity()}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return place / f"{sampler.checkpoint.folder.name}-{digest}"


@contextlib.contextmanager
def drawn_features(sampler: ImageSampler, extractor: FeatureExtractor, place: Path, group: Group) -> Iterator[RowTable]:
    """Draw the images that a table in `place` does not have yet, in all processes; yield the full table, locked.

    A table of fewer images grows to this many. Stopped if any process is to stop: the written rows stay, and the same
    call resumes. JLTError if another program draws into the same table, or if the processes do not share its folder.
    """
    folder, num = table_folder(sampler, extractor, place), sampler.config.num
    with contextlib.ExitStack() as held:

        def find() -> list[range]:
            held.enter_context(lock_folder(folder, place))
            written = open_table(folder, extractor, num).written()
            if written.any():
                inform(f"{written.sum()} of {len(written)} images were drawn before.")
            return unwritten(batches_of(num, sampler.config.batch_size), written)

        missing = group.on_rank0(find)
        images, drawn = sum(map(len, missing)), group.begin()
        with stop_together(group) as until_stopped, bar("sampling and measuring", images) as shown:
            table = open_table(folder, extractor, num)
            batches = until_stopped(sampler.batches(missing[group.rank :: group.size]))
            for start, pixels, labels in aligned(batches):
                table.write(start, {**arrays_of(extractor(pixels)), "labels": labels.numpy()})
                shown.show(group.add(drawn, len(labels)))
        group.on_rank0(table.require_full)
        yield table


def aligned(
    batches: Iterable[ImageBatch], size: int = CHUNK
) -> Iterator[tuple[int, UInt8[Tensor, "n h w 3"], Int64[Tensor, " n"]]]:
    """Yield the same numbered images cut at multiples of `size`, as far as they are consecutive.

    An extractor then gets the same batches as in `evaluate_images`, and so the same digits. Ranges that are no
    multiples of `size` and are shared among processes change the last digits.
    """
    waiting: ImageBatch | None = None
    for batch in batches:
        if waiting is not None and waiting.start + len(waiting.labels) == batch.start:
            images, labels = torch.cat((waiting.images, batch.images)), torch.cat((waiting.labels, batch.labels))
            batch = ImageBatch(waiting.start, images, labels)
        elif waiting is not None:
            yield waiting.start, waiting.images, waiting.labels
        end = batch.start + len(batch.labels)
        cuts = [batch.start, *range((batch.start // size + 1) * size, end + 1, size)]
        for cut, next_cut in pairwise(cuts):
            part = slice(cut - batch.start, next_cut - batch.start)
            yield cut, batch.images[part], batch.labels[part]
        rest = slice(cuts[-1] - batch.start, None)
        left = ImageBatch(cuts[-1], batch.images[rest], batch.labels[rest])
        waiting = left if len(left.labels) else None
    if waiting is not None:
        yield waiting.start, waiting.images, waiting.labels


def _remove(table: RowTable) -> None:
    """Remove a table that this process has locked, and the folder of tables if it was the last one."""
    table.remove()
    # The lock goes last: until then no other process begins here.
    (table.folder / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        table.folder.rmdir()
        table.folder.parent.rmdir()


def warn_if_few(metrics: Metrics, extractor: FeatureExtractor) -> None:
    """Print a warning if few images bias a Frechet distance."""
    if text := bias_text(metrics, extractor.dimension):
        inform(text)


def sampler_protocol(
    sampler: ImageSampler, reference: Mapping[str, Any], extractor: FeatureExtractor
) -> dict[str, Any]:
    """Return everything that decides what `evaluate_sampler` measures; `reference` is the identity of one."""
    return {**sampler.protocol(), "extractor": extractor.identity(), "reference": dict(reference)}


def evaluate_files(samples: Path, real_images: str, extractor: FeatureExtractor) -> Evaluation:
    """Measure the images of a folder or of an .npz against real images or their statistics."""
    images, drawn = open_images(samples), _drawn_by(samples)
    stated = read_drawn(drawn) if drawn else Drawn(count=len(images))
    if stated.count > len(images):
        raise JLTError(f"{samples} holds {len(images)} of {stated.count} images: finish the sampling first.")
    if stated.count < len(images):
        raise JLTError(f"{samples} holds {len(images)} images, but only {stated.count} were drawn: remove the others.")
    content, work = read_marker(drawn) if drawn else ({}, "")
    for path in images.paths if drawn else ():
        if not is_intact(path, path.name, work):
            raise JLTError(f"{path} is damaged or is no file of this sampling: run the same jlt sample again.")
    reference = open_reference(real_images, extractor, images.resolution)
    class_logits = extractor.class_logits(images.classes, stated.class_names)
    with stop_together(SingleProcess()) as until_stopped:
        batches = until_stopped(images.batches(BATCH_SIZE))
        metrics = evaluate_images(batches, reference, extractor, len(images), class_logits)
    warn_if_few(metrics, extractor)
    protocol = {
        "samples": str(samples),
        **({"drawn": {key: content[key] for key in content if key != "class_names"}} if drawn else {}),
        "count": metrics.count,
        "extractor": extractor.identity(),
        "reference": reference.identity(),
        "versions": versions(),
    }
    return Evaluation(None, metrics, to_json(protocol))


def _drawn_by(samples: Path) -> Path | None:
    """Return the file with the protocol by which images were drawn, None without one or if it is of another file."""
    path = (samples if samples.is_dir() else samples.parent) / PROTOCOL
    if not path.is_file() or not (samples.is_dir() or samples.name == ARRAY):
        return None
    return path if read_drawn(path).format == ("png" if samples.is_dir() else "npz") else None


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    real_images: str | ImageSource,
    extractor: FeatureExtractor,
    config: SampleConfig,
    autoencoder_path: str | None,
    group: Group | None = None,
) -> Evaluation:
    """Measure the samples of a checkpoint, and write the result into its run; a stored one is returned."""
    group = group or SingleProcess()
    require_enough(config.num)
    sampler = open_sampler(checkpoint, config, default_device(), autoencoder_path)
    run = checkpoint.run
    in_run = (run / "config.json").is_file()
    if in_run and (found := group.on_rank0(lambda: _stored(sampler, real_images, extractor))):
        return found
    reference = reference_of(checkpoint.latents, real_images, extractor, sampler.resolution, group)
    result = evaluate_sampler(sampler, reference, extractor, drawn_folder(run) if in_run else None, group)
    if in_run:
        group.on_rank0(lambda: _remove_orphans(run))
        group.on_rank0(lambda: write_evaluation(run, result))
    return result


def _stored(sampler: ImageSampler, real_images: str | ImageSource, extractor: FeatureExtractor) -> Evaluation | None:
    """Return the evaluation of this protocol that a run holds, without measuring its real images."""
    checkpoint = sampler.checkpoint
    if isinstance(real_images, str) and real_images.endswith(STATISTICS_SUFFIXES):
        reference = Reference.load(Path(real_images)).identity()
    else:
        source = open_source(real_images) if isinstance(real_images, str) else real_images
        exif = checkpoint.latents.get("exif", "ignore")
        reference = reference_protocol(source, extractor, sampler.resolution, exif)
    wanted = to_json(sampler_protocol(sampler, reference, extractor))
    for path in sorted(checkpoint.run.glob(f"evaluations/step_{checkpoint.step:07d}-*.json")):
        found = read_result(Evaluation, path)
        measured = {**found.protocol, "reference": {**found.protocol["reference"], **wanted["reference"]}}
        if found.protocol == measured == {**wanted, "reference": measured["reference"]}:
            inform(f"{path} holds this evaluation already.")
            return found
    return None


def drawn_folder(run: Path) -> Path:
    """Return where a run keeps the features of an evaluation that is not finished; JLTError if a link leads there."""
    folder = run / "evaluations" / ".drawn"
    require_unlinked(run, folder)
    return folder


def _remove_orphans(run: Path) -> None:
    """Remove the features of checkpoints that no longer exist."""
    for folder in drawn_folder(run).glob("step_*"):
        if not list(run.glob(f"*/{folder.name.rpartition('-')[0]}")):
            # A process that still measures them holds the lock.
            with contextlib.suppress(JLTError), lock_folder(folder, run):
                remove_tree(run, folder)
    with contextlib.suppress(OSError):
        drawn_folder(run).rmdir()


def evaluation_path(run: Path, step: int, protocol: Mapping[str, Any]) -> Path:
    """Return where a run keeps an evaluation: its name holds the step and a hash of the protocol."""
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]
    return run / "evaluations" / f"step_{step:07d}-{digest}.json"


def write_evaluation(run: Path, evaluation: Evaluation) -> Path:
    """Write an evaluation of a checkpoint into its run, and return its file."""
    path = evaluation_path(run, evaluation.step or 0, evaluation.protocol)
    remove_leftovers(path.parent, path.name)
    write_result(path, evaluation)
    return path


def evaluate_once(
    sampler: ImageSampler, reference: Reference, extractor: FeatureExtractor, group: Group
) -> tuple[Path, Evaluation] | None:
    """Measure a checkpoint and write the result into its run; None if its evaluation by this protocol exists.

    Evaluations of this step by other weights are removed: the run was deleted and trained again.
    """
    checkpoint, run = sampler.checkpoint, sampler.checkpoint.run
    drawn = drawn_folder(run)
    path = evaluation_path(run, checkpoint.step, sampler_protocol(sampler, reference.identity(), extractor))

    def exists() -> bool:
        for stored in run.glob(f"evaluations/step_{checkpoint.step:07d}-*.json"):
            if read_result(Evaluation, stored).protocol["checkpoint"] != checkpoint.sha256:
                stored.unlink()
        return path.exists()

    if group.on_rank0(exists):
        return None
    evaluation = evaluate_sampler(sampler, reference, extractor, drawn, group)
    return group.on_rank0(lambda: write_evaluation(run, evaluation)), evaluation


def evaluate_run(
    run: Path, steps: Iterable[int], real_images: str, extractor: FeatureExtractor, config: SampleConfig, device: str
) -> None:
    """Measure the checkpoints of a run at the given steps, except those already measured by this protocol."""
    reference: Reference | None = None
    # A linked folder is refused before anything is read.
    drawn_folder(run)
    for step in steps:
        sampler = open_sampler(open_checkpoint(step_folder(run, step)), config, device)
        reference = reference or open_reference(real_images, extractor, sampler.resolution)
        evaluate_once(sampler, reference, extractor, SingleProcess())


def grid_rows(network: NetworkConfig) -> int:
    """Return how many classes a grid of samples shows, a row each."""
    return min(10, network.num_classes)


def draw_grid(checkpoint: Checkpoint, config: SampleConfig, device: str, path: Path) -> None:
    """Draw a checkpoint's grid of samples: a row per class, from noise that is the same for every checkpoint."""
    num_classes = grid_rows(checkpoint.config.network)
    labels = [row for row in range(num_classes) for _ in range(GRID_COLUMNS)]
    settings = dataclasses.replace(config, num=len(labels), labels=",".join(map(str, labels)))
    sampler = open_sampler(checkpoint, settings, device)
    images = np.concatenate([batch.images.numpy() for batch in sampler.batches()])
    text = SheetText(sampler.decoder_note, rows=[sampler.class_name(label) for label in range(num_classes)])
    with atomic_path(path) as temporary:
        draw_sheet(images, GRID_COLUMNS, text).save(temporary)
        seal_file(temporary, path.name, work_of(checkpoint.run))
