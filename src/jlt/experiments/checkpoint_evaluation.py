"""From a checkpoint or from images to a number with its protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jlt.config import SampleConfig
from jlt.errors import JLTError
from jlt.evaluation.evaluator import evaluate_images
from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.feature_table import columns_of
from jlt.evaluation.image_files import open_images
from jlt.evaluation.real_images import open_reference
from jlt.evaluation.reference import Reference, check_reference
from jlt.evaluation.suite import LeftOut, Metrics, measure, require_enough
from jlt.experiments.drawn_features import drawn_features
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.images.crop import Exif
from jlt.images.registry import reopen_source
from jlt.images.selected import Selected
from jlt.images.source import ImageSource
from jlt.latents.store import LatentStore
from jlt.report.wording import number
from jlt.runtime.environment import default_device, versions
from jlt.runtime.processes import Group, SingleProcess, require_same_arguments, stop_together
from jlt.runtime.progress import inform
from jlt.runtime.signals import Stopped, stop_on_signal
from jlt.sampling.sampler import ImageSampler, open_sampler
from jlt.sampling.save import ARRAY, PROTOCOL
from jlt.storage.files import LOCK, atomic_path, lock_folder, read_json, require_unlinked, write_json
from jlt.storage.rows import RowTable
from jlt.training.checkpoint import Checkpoint, open_checkpoint, step_folder

BATCH_SIZE = 250
IMAGES_PER_DIMENSION = 10
"""Fewer images than this for each dimension of the features get a warning."""
GRID_COLUMNS = 8
"""Samples of each class in a grid."""


def save_reference(
    path: Path, images: str | ImageSource, extractor: FeatureExtractor, resolution: int, exif: Exif = "ignore"
) -> None:
    """Write the statistics of a source of images once."""
    if not path.exists():
        open_reference(images, extractor, resolution, exif).save(path)


def images_of(store: LatentStore) -> ImageSource:
    """Return the images that a store was encoded from; JLTError if they are not at hand, or changed since."""
    try:
        source = reopen_source(store.manifest.source)
    except JLTError as error:
        raise JLTError(f"{error} Name real images with --reference.") from error
    skipped = [image.index for image in store.manifest.skipped]
    return Selected(source, np.delete(np.arange(len(source)), skipped)) if skipped else source


def evaluate_sampler(
    sampler: ImageSampler,
    reference: Reference,
    extractor: FeatureExtractor,
    place: Path | None = None,
    group: Group | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Draw, decode and measure, with no images on disk; return what an evaluation file holds, in all processes.

    The features lie in `place` (a folder of the system's where there is none) until all are drawn, so that the same
    call continues what was interrupted, and with `keep` beyond, so that a larger number continues a smaller one; the
    smaller is then no result, and nothing is said of its being made of few images.
    JLTError before the first image for a reference that does not fit, too few images or a disk without room.
    """
    group = group or SingleProcess()
    protocol = sampler_protocol(sampler, reference, extractor)
    require_same_arguments(group, {**protocol, "batch_size": sampler.config.batch_size}, "measure")
    check_reference(reference, extractor, sampler.resolution)
    require_enough(sampler.config.num)
    with contextlib.ExitStack() as held:
        if place is None:
            place = Path(group.on_rank0(lambda: held.enter_context(tempfile.TemporaryDirectory(prefix="jlt-"))))
        with drawn_features(sampler, extractor, place, group) as table:
            # Labels are compared with the extractor's classes where those are the same thing.
            labelled = sampler.classes == extractor.classes_of
            with stop_on_signal() as asked:
                metrics, left_out = group.on_rank0(lambda: measure(columns_of(table, labelled), reference, extractor))
            if any(group.gather(bool(asked))):
                raise Stopped("Stopped on request.")
            if not (keep or table.holds_more):
                group.on_rank0(lambda: _remove(table))
    if group.rank == 0 and not keep:
        warn_if_few(metrics, extractor)
    return {**_result(sampler.checkpoint.step, metrics, protocol), "jackknife": _jackknife(left_out)}


def _jackknife(left_out: LeftOut) -> dict[str, Any]:
    """Return what tells the error of a difference of two evaluations that start from the same noise."""
    return {"frechet_distance": list(left_out.without), "sizes": list(left_out.sizes)}


def _remove(table: RowTable) -> None:
    """Remove a table that this process has locked, and the folder of tables if it was the last one."""
    table.remove()
    # Last: until then nobody else begins here.
    (table.folder / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        table.folder.rmdir()
        table.folder.parent.rmdir()


def warn_if_few(metrics: Metrics, extractor: FeatureExtractor) -> None:
    """Say so where a Frechet distance is too large for want of images: its bias falls as dimension / count."""
    enough = IMAGES_PER_DIMENSION * extractor.dimension
    if metrics.count >= enough:
        return
    bias = metrics.frechet_distance_bias
    amount = "" if bias is None else f", by about {number(bias, 2)} of {number(metrics.frechet_distance)}"
    inform(
        f"A Frechet distance of {metrics.count} images in {extractor.dimension} dimensions is too large for want of "
        f"images{amount}: take {enough} or more."
    )


def sampler_protocol(sampler: ImageSampler, reference: Reference, extractor: FeatureExtractor) -> dict[str, Any]:
    """Return everything that decides what `evaluate_sampler` measures."""
    return {**sampler.protocol(), "extractor": extractor.identity(), "reference": reference.identity()}


def evaluate_files(samples: Path, reference_words: str, extractor: FeatureExtractor) -> dict[str, Any]:
    """Measure images that lie in a folder or in an .npz; return what an evaluation file holds."""
    images = open_images(samples)
    drawn = _drawn_by(samples)
    wanted = drawn.get("drawn", {}).get("count", len(images))
    if wanted > len(images):
        raise JLTError(f"{samples} holds {len(images)} images of {wanted} that were to be drawn: finish that first.")
    if wanted < len(images):
        raise JLTError(f"{samples} holds {len(images)} images, and {wanted} were drawn: others lie among them.")
    reference = open_reference(reference_words, extractor, images.resolution)
    # Labels say whose classes they are, if a program of ours wrote them; else they are taken for the extractor's own.
    labelled = extractor.classes_of is not None and images.classes in (None, extractor.classes_of)
    with stop_together(SingleProcess()) as until_stopped:
        batches = ((pixels, labels if labelled else None) for pixels, labels in images.batches(BATCH_SIZE))
        metrics = evaluate_images(until_stopped(batches), reference, extractor, len(images))
    warn_if_few(metrics, extractor)
    protocol = {
        "samples": str(samples),
        **drawn,
        "count": metrics.count,
        "extractor": extractor.identity(),
        "reference": reference.identity(),
        "versions": versions(),
    }
    return _result(None, metrics, protocol)


def _drawn_by(samples: Path) -> dict[str, Any]:
    """Return the protocol by which images were drawn, if they lie where it was left, under the names that it gives."""
    path = (samples if samples.is_dir() else samples.parent) / PROTOCOL
    drawn = read_json(path) if path.is_file() else {}
    ours = samples.is_dir() or (samples.name == ARRAY and drawn.get("format") == "npz")
    return {"drawn": drawn} if drawn and ours else {}


def evaluate_checkpoint(
    path: Path,
    reference_words: str,
    extractor: FeatureExtractor,
    config: SampleConfig,
    autoencoder_path: str | None,
    group: Group | None = None,
) -> dict[str, Any]:
    """Measure the samples of a run's newest checkpoint, or of a checkpoint, and write the result into its run."""
    group = group or SingleProcess()
    require_enough(config.num)
    checkpoint = open_checkpoint(path)
    sampler = open_sampler(checkpoint, config, default_device(), autoencoder_path)
    reference = open_reference(reference_words, extractor, sampler.resolution, group=group)
    run = checkpoint.run
    in_run = (run / "config.json").is_file()
    if in_run:
        group.on_rank0(lambda: _remove_orphans(run))
    result = evaluate_sampler(sampler, reference, extractor, drawn_folder(run) if in_run else None, group)
    if in_run:
        group.on_rank0(lambda: write_evaluation(run, result))
    return result


def drawn_folder(run: Path) -> Path:
    """Return where a run keeps the features of an evaluation that is not finished; JLTError if a link leads there."""
    folder = run / "evaluations" / ".drawn"
    require_unlinked(run, folder)
    return folder


def _remove_orphans(run: Path) -> None:
    """Remove the features of checkpoints that are gone: nobody will go on with them."""
    for folder in drawn_folder(run).glob("step_*"):
        if not list(run.glob(f"*/{folder.name.rpartition('-')[0]}")):
            # Whoever still measures them holds the lock.
            with contextlib.suppress(JLTError), lock_folder(folder, run):
                shutil.rmtree(folder)


def _result(step: int | None, metrics: Metrics, protocol: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "step": step, "metrics": dataclasses.asdict(metrics), "protocol": protocol}


def evaluation_path(run: Path, step: int, protocol: dict[str, Any]) -> Path:
    """Return where a run keeps an evaluation: the name tells the step and, by a hash, the protocol."""
    digest = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]
    return run / "evaluations" / f"step_{step:07d}-{digest}.json"


def write_evaluation(run: Path, result: dict[str, Any]) -> None:
    """Write an evaluation into its run."""
    write_json(evaluation_path(run, result["step"], result["protocol"]), result)


def evaluate_run(
    run: Path,
    steps: Iterable[int],
    reference_words: str,
    extractor: FeatureExtractor,
    config: SampleConfig,
    device: str,
) -> None:
    """Measure the checkpoints of a run at the given steps; those that were measured by this protocol are kept."""
    reference: Reference | None = None
    drawn = drawn_folder(run)
    for step in steps:
        sampler = open_sampler(open_checkpoint(step_folder(run, step)), config, device)
        reference = reference or open_reference(reference_words, extractor, sampler.resolution)
        remove_stale(run, sampler.checkpoint)
        if not evaluation_path(run, step, sampler_protocol(sampler, reference, extractor)).exists():
            write_evaluation(run, evaluate_sampler(sampler, reference, extractor, drawn))


def remove_stale(run: Path, checkpoint: Checkpoint) -> None:
    """Remove evaluations of this step that were made of other weights: a run was deleted and trained again."""
    for path in run.glob(f"evaluations/step_{checkpoint.step:07d}-*.json"):
        if read_json(path)["protocol"]["checkpoint"] != checkpoint.sha256:
            path.unlink()


def draw_grid(checkpoint: Checkpoint, config: SampleConfig, device: str, path: Path) -> None:
    """Draw a checkpoint's grid of samples: a row per class, from noise that is the same for every checkpoint."""
    num_classes = min(10, checkpoint.config.network.num_classes)
    labels = [row for row in range(num_classes) for _ in range(GRID_COLUMNS)]
    settings = dataclasses.replace(config, num=len(labels), labels=",".join(map(str, labels)))
    sampler = open_sampler(checkpoint, settings, device)
    images = np.concatenate([batch.images.numpy() for batch in sampler.batches()])
    words = SheetText(rows=[sampler.class_name(label) for label in range(num_classes)])
    with atomic_path(path) as temporary:
        draw_sheet(images, GRID_COLUMNS, words).save(temporary)
