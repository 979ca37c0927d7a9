"""From a checkpoint or from images to a number with its protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jlt.config import SampleConfig
from jlt.data.crop import Exif
from jlt.data.sources.contract import ImageSource
from jlt.data.sources.registry import reopen_source
from jlt.data.sources.selected import Selected
from jlt.data.store import LatentStore
from jlt.errors import JLTError
from jlt.evaluation.evaluate import Metrics, evaluate_images
from jlt.evaluation.features import FeatureExtractor, load_extractor
from jlt.evaluation.images import open_images
from jlt.evaluation.real import open_reference
from jlt.evaluation.reference import Reference
from jlt.files import read_json, write_json
from jlt.progress import say, track
from jlt.protocol import default_device, versions
from jlt.report.wording import number
from jlt.sampling.sampler import ImageSampler, open_sampler
from jlt.sampling.save import image_grid, save_image
from jlt.signals import until_stopped
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


def evaluate_sampler(sampler: ImageSampler, reference: Reference, extractor: FeatureExtractor) -> dict[str, Any]:
    """Draw, decode and measure, with no files in between; return what an evaluation file holds."""
    # Labels are compared with the extractor's classes where those are the same thing.
    labelled = sampler.checkpoint.latents["source"]["kind"] == extractor.classes_of
    total = math.ceil(sampler.config.num / sampler.config.batch_size)
    drawn = track(until_stopped(sampler.batches()), "sampling and measuring", total=total)
    batches = ((batch.images, batch.labels if labelled else None) for batch in drawn)
    metrics = evaluate_images(batches, reference, extractor)
    warn_if_few(metrics, extractor)
    return _result(sampler.checkpoint.step, metrics, sampler_protocol(sampler, reference, extractor))


def warn_if_few(metrics: Metrics, extractor: FeatureExtractor) -> None:
    """Say so where a Frechet distance is too large for want of images: its bias falls as dimension / count."""
    enough = IMAGES_PER_DIMENSION * extractor.dimension
    if metrics.count >= enough:
        return
    bias = metrics.frechet_distance_bias
    amount = "" if bias is None else f", by about {number(bias, 2)} of {number(metrics.frechet_distance)}"
    say(
        f"A Frechet distance of {metrics.count} images in {extractor.dimension} dimensions is too large for want of "
        f"images{amount}: take {enough} or more."
    )


def sampler_protocol(sampler: ImageSampler, reference: Reference, extractor: FeatureExtractor) -> dict[str, Any]:
    """Return everything that decides what `evaluate_sampler` measures."""
    return {**sampler.protocol(), "extractor": extractor.identity(), "reference": reference.identity()}


def evaluate_files(samples: Path, reference_words: str, extractor: FeatureExtractor) -> dict[str, Any]:
    """Measure images that lie in a folder or in an .npz; return what an evaluation file holds."""
    images = open_images(samples)
    reference = open_reference(reference_words, extractor, images.resolution)
    metrics = evaluate_images(images.batches(BATCH_SIZE), reference, extractor)
    warn_if_few(metrics, extractor)
    protocol = {
        "samples": str(samples),
        "count": metrics.count,
        "extractor": extractor.identity(),
        "reference": reference.identity(),
        "versions": versions(),
    }
    return _result(None, metrics, protocol)


def evaluate_checkpoint(
    path: Path, reference_words: str, extractor: FeatureExtractor, config: SampleConfig, autoencoder_path: str | None
) -> dict[str, Any]:
    """Measure the samples of a run's newest checkpoint, or of a checkpoint, and write the result into its run."""
    checkpoint = open_checkpoint(path)
    sampler = open_sampler(checkpoint, config, default_device(), autoencoder_path)
    reference = open_reference(reference_words, extractor, sampler.resolution)
    result = evaluate_sampler(sampler, reference, extractor)
    run = checkpoint.folder.parent.parent
    if (run / "config.json").is_file():
        write_evaluation(run, result)
    return result


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
    run: Path, steps: Iterable[int], reference_words: str, extractor_name: str, config: SampleConfig, device: str
) -> None:
    """Measure the checkpoints of a run at the given steps; those that were measured by this protocol are kept."""
    extractor = load_extractor(extractor_name)
    reference: Reference | None = None
    for step in steps:
        sampler = open_sampler(open_checkpoint(step_folder(run, step)), config, device)
        reference = reference or open_reference(reference_words, extractor, sampler.resolution)
        remove_stale(run, sampler.checkpoint)
        if not evaluation_path(run, step, sampler_protocol(sampler, reference, extractor)).exists():
            write_evaluation(run, evaluate_sampler(sampler, reference, extractor))


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
    images = np.concatenate([batch.images.numpy() for batch in open_sampler(checkpoint, settings, device).batches()])
    save_image(image_grid(images, GRID_COLUMNS), path)
