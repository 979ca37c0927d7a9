"""A checkpoint measured at many settings of its sampler, each of them once, in a folder that resumes.

The folder holds `plan.json`, `points/` with a file for every measurement, and `.drawn/` with the features of images
while more images of a setting may follow.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jlt.config import SampleConfig
from jlt.errors import UsageError
from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.reference import Reference
from jlt.experiments.checkpoint_evaluation import evaluate_sampler, reference_of
from jlt.results.evaluation import Evaluation
from jlt.results.files import read_result, write_result
from jlt.runtime.environment import versions
from jlt.runtime.processes import Group, require_same_arguments
from jlt.runtime.progress import format_seconds
from jlt.runtime.signals import Stopped, stop_on_signal
from jlt.sampling.sampler import ImageSampler, open_sampler, with_config
from jlt.storage.folders import Claim, remove_tree, require_unlinked
from jlt.storage.rows import require_space
from jlt.training.checkpoint import Checkpoint

POINTS, DRAWN = "points", ".drawn"


@dataclass(frozen=True)
class Subject:
    """What is measured, and by what: a checkpoint against real images, in the features of an extractor."""

    checkpoint: Checkpoint
    real_images: str
    """Empty for the images of the checkpoint's latents."""
    extractor: FeatureExtractor
    features_path: Path | None = None
    autoencoder_path: str | None = None

    def evaluate_command(self, sample: SampleConfig) -> str:
        """Return the command that measures one setting."""
        sources = {
            "checkpoint": self.checkpoint.folder,
            "reference": self.real_images,
            "features": self.extractor.name,
            "features_path": self.features_path,
            "autoencoder_path": self.autoencoder_path,
        }
        options = {**sources, **vars(sample)}
        if sample.grid:
            # It replaces them.
            del options["steps"], options["shift"]
        arguments: list[Any] = ["jlt", "evaluate"]
        for option, value in options.items():
            if value is None or value is False or value in ("", ()):
                continue
            # A switch has no value.
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            arguments += [f"--{option.replace('_', '-')}", *values]
        return shlex.join(map(str, arguments))


@dataclass
class SettingsFolder:
    """Measures settings: measurements that the folder holds are read, others are drawn and kept."""

    out: Path
    sampler: ImageSampler
    reference: Reference
    extractor: FeatureExtractor
    group: Group
    stop: Any
    """True after a request to stop."""
    images: int = field(default=0, init=False)
    """Images drawn by this process, in so many `seconds`."""
    seconds: float = field(default=0.0, init=False)

    def measure(self, name: str, config: SampleConfig, fresh: int) -> Evaluation:
        """Return the evaluation of a setting, `fresh` of whose images are new; Stopped if any process is to stop."""
        if any(self.group.gather(bool(self.stop))):
            raise Stopped("Stopped on request.")
        path = self.out / POINTS / f"{name}-seed{config.seed}-num{config.num}.json"
        result = self.group.on_rank0(lambda: read_result(Evaluation, path) if path.exists() else None)
        if result is None:
            began = time.monotonic()
            self.sampler = with_config(self.sampler, config)
            place = self._drawn(name, config.seed)
            result = evaluate_sampler(self.sampler, self.reference, self.extractor, place, self.group, keep=True)
            self.group.on_rank0(lambda: write_result(path, result))
            self.images += fresh
            self.seconds += time.monotonic() - began
        return result

    def time_left(self, images: int) -> str:
        """Return how long so many images take, as the end of a progress line; empty if it is not known yet."""
        known = images and self.images
        return f"; {format_seconds(images * self.seconds / self.images)} left" if known else ""

    def drop(self, name: str, seed: int) -> None:
        """Remove the features of a setting that gets no more images."""
        self.group.on_rank0(lambda: remove_tree(self.out, self._drawn(name, seed)))

    def _drawn(self, name: str, seed: int) -> Path:
        return self.out / DRAWN / f"{name}-seed{seed}"

    def finish(self) -> None:
        """Remove all features."""
        self.group.on_rank0(lambda: remove_tree(self.out, self.out / DRAWN))


@contextlib.contextmanager
def settings_folder(
    subject: Subject,
    first: SampleConfig,
    out: Path,
    plan: Mapping[str, Any],
    images: int,
    device: str,
    group: Group,
) -> Iterator[SettingsFolder]:
    """Claim and lock a folder for the experiment `plan`, whose images begin with those of `first`.

    JLTError before the first image for a reference that does not fit, a folder of different arguments, processes with
    different arguments, or a disk without room for the features of so many `images`.
    """
    extractor = subject.extractor
    sampler = open_sampler(subject.checkpoint, first, device, subject.autoencoder_path)
    latents = subject.checkpoint.latents
    reference = reference_of(latents, subject.real_images, extractor, sampler.resolution, group)
    identity = {
        **plan,
        "checkpoint": subject.checkpoint.sha256,
        "autoencoder": sampler.autoencoder.identity(),
        "extractor": extractor.identity(),
        "reference": reference.identity(),
        "versions": versions(),
    }
    require_same_arguments(group, identity, "search")
    claim = Claim(out, "plan.json", identity, allowed={"report.html"})
    with contextlib.ExitStack() as held:
        group.on_rank0(lambda: held.enter_context(claim.hold()))
        group.on_rank0(lambda: _begin(claim, extractor, images))
        stop = held.enter_context(stop_on_signal())
        yield SettingsFolder(out, sampler, reference, extractor, group, stop)


def _begin(claim: Claim, extractor: FeatureExtractor, images: int) -> None:
    """Begin the work in a folder; JLTError if its own folders are links, or its disk has no room for the features."""
    for name in (DRAWN, POINTS):
        require_unlinked(claim.folder, claim.folder / name)
    values = extractor.dimension + (extractor.num_classes or 0) + (extractor.spatial_dimension or 0)
    require_space(claim.folder, images * (4 * values + 12), f"The features of {images} images")
    claim.begin()


def default_folder(checkpoint: Checkpoint, experiment: str) -> Path:
    """Return where a run keeps such an experiment on a checkpoint; UsageError for a checkpoint outside of a run."""
    if not (checkpoint.run / "config.json").is_file():
        raise UsageError(f"{checkpoint.folder} is not in a run folder: name a folder for the {experiment} with --out.")
    folder = checkpoint.run / f"{experiment}s" / checkpoint.folder.name
    require_unlinked(checkpoint.run, folder)
    return folder
