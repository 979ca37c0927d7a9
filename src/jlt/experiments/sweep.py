"""Which guidance and which average of the weights a checkpoint is best sampled with: a search, then a confirmation.

Few images of one seed find the region, more of them the best setting, and images of another seed give its number: the
smallest of many noisy numbers is biased, so a number of the search is not one to report.

A sweep folder holds `plan.json`, `points/` with a file for every measurement, and `sweep.json` at the end. Run the same
command again to resume. `.drawn/` holds the features of images while the search may still add to them.
"""

from __future__ import annotations

import contextlib
import datetime
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jlt.config import SampleConfig
from jlt.errors import JLTError, UsageError
from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.reference import Reference, open_reference
from jlt.experiments.checkpoint_evaluation import evaluate_sampler, warn_if_few
from jlt.experiments.search import ERRORS, GROWTH, Measured, Round, Stage, SweepConfig, images_after, search, to_confirm
from jlt.results.evaluation import LOWER_IS_BETTER, Evaluation
from jlt.results.files import read_result, write_result
from jlt.results.sweep import (
    Behind,
    ConfirmationImages,
    SearchImages,
    Setting,
    Sweep,
    SweepAxes,
    SweepPoint,
    SweepStage,
    SweptCheckpoint,
)
from jlt.runtime.environment import machine, versions
from jlt.runtime.processes import Group, require_same_arguments
from jlt.runtime.progress import format_seconds, inform
from jlt.runtime.signals import Stopped, stop_on_signal
from jlt.sampling.sampler import ImageSampler, check_guidance, check_guide, open_sampler, with_config
from jlt.storage.codec import to_json
from jlt.storage.files import claim_folder, lock_folder, require_unlinked
from jlt.storage.rows import require_space
from jlt.training.averages import choose_name
from jlt.training.checkpoint import Checkpoint, open_checkpoint


@dataclass
class Sweeper:
    """Measures settings, each measurement once: those that the folder holds are read, others are drawn and kept."""

    config: SweepConfig
    out: Path
    sampler: ImageSampler
    reference: Reference
    extractor: FeatureExtractor
    group: Group
    stop: Any
    """True after a request to stop."""
    images: int = 0
    """Images drawn by this process, in so many `seconds`."""
    seconds: float = 0.0

    def measure(self, round_: Round, settings: Sequence[Setting], num: int) -> list[Measured]:
        """Measure settings by the images of the search, adding to those of the stage before."""
        # A halving has the images of the stage before.
        fresh = num - num // GROWTH if round_.kind == "halving" else num
        after = images_after(self.config, len(settings), num, round_)
        return self._all(f"{round_.kind} {round_.number}", settings, num, self.config.sample.seed, fresh, after)

    def confirm(self, points: Sequence[Measured]) -> list[Measured]:
        """Measure settings by all images of the other seed."""
        num, settings = self.config.sample.num, [point.setting for point in points]
        found = self._all("confirmation", settings, num, self.config.confirm_seed, num, 0)
        if self.group.rank == 0:
            warn_if_few(found[0].result.metrics, self.extractor)
        return found

    def _all(
        self, name: str, settings: Sequence[Setting], num: int, seed: int, fresh: int, after: int
    ) -> list[Measured]:
        """Measure settings on `num` images, `fresh` of them new, with `after` images to draw after all of them."""
        found = []
        for place, setting in enumerate(settings, 1):
            point = self.one(setting, num, seed, fresh)
            found.append(point)
            images_left = (len(settings) - place) * fresh + after
            if self.group.rank == 0:
                error = f" ± {point.error:.2g}" if point.error else ""
                left = f"; {format_seconds(images_left * self.seconds / self.images)} left" if self.images else ""
                value = f"{self.config.metric} {point.value:.4g}{error} ({num} images{left if images_left else ''})"
                inform(f"{name}, {place} of {len(settings)}: {setting.name}: {value}")
        return found

    def one(self, setting: Setting, num: int, seed: int, fresh: int) -> Measured:
        """Return a measurement, from its file if there is one; Stopped if any process is to stop."""
        if any(self.group.gather(bool(self.stop))):
            raise Stopped("Stopped on request.")
        path = self.out / "points" / f"{setting.name}-seed{seed}-num{num}.json"
        result = self.group.on_rank0(lambda: read_result(Evaluation, path) if path.exists() else None)
        if result is None:
            began = time.monotonic()
            self.sampler = with_config(self.sampler, self.config.sample_config(setting, num, seed))
            place = self._drawn(setting, seed)
            result = evaluate_sampler(self.sampler, self.reference, self.extractor, place, self.group, keep=True)
            self.group.on_rank0(lambda: write_result(path, result))
            self.images += fresh
            self.seconds += time.monotonic() - began
        return self._measured(setting, num, seed, result)

    def _measured(self, setting: Setting, num: int, seed: int, result: Evaluation) -> Measured:
        metric, value = self.config.metric, result.metrics[self.config.metric]
        if value is None:
            raise JLTError(f"{metric} cannot be measured with these features and this reference: choose another.")
        point = Measured(setting, num, seed, value, 0.0, metric in LOWER_IS_BETTER, result)
        # Only this metric has a standard error; others are compared without one.
        if metric != "frechet_distance" or result.jackknife is None:
            return point
        error, parts = result.metrics.frechet_distance_error or 0.0, result.jackknife
        return replace(point, error=error, without=parts.frechet_distance, sizes=parts.sizes)

    def drop(self, setting: Setting) -> None:
        """Remove the features of a setting that the search dropped."""
        self.group.on_rank0(lambda: shutil.rmtree(self._drawn(setting, self.config.sample.seed), ignore_errors=True))

    def _drawn(self, setting: Setting, seed: int) -> Path:
        folder = self.out / ".drawn" / f"{setting.name}-seed{seed}"
        require_unlinked(self.out, folder)
        return folder


def sweep(
    config: SweepConfig,
    path: Path,
    real_images: str,
    extractor: FeatureExtractor,
    out: Path | None,
    device: str,
    group: Group,
    autoencoder_path: str | None = None,
    command: str = "jlt sweep",
    features_path: Path | None = None,
) -> tuple[Path, Sweep]:
    """Search, confirm, and return the folder and what its `sweep.json` holds; the same call resumes.

    JLTError before the first image for settings that cannot be drawn, a reference that does not fit, a folder of
    different arguments, processes with different arguments, or a disk without room for the first and the last stages.
    The stages between may need more room, and check it then. Stopped if any process is to stop.
    """
    checkpoint = open_checkpoint(path)
    out = out or sweep_folder(checkpoint)
    for setting in config.settings():
        wanted = config.sample_config(setting, config.coarse_num, 0)
        check_guidance(checkpoint.config, wanted)
        if wanted.autoguided:
            check_guide(checkpoint, wanted)
    for ema in config.ema:
        # It refuses an unknown name.
        choose_name(checkpoint, ema)
    first = config.sample_config(config.settings()[0], config.coarse_num, config.sample.seed)
    sampler = open_sampler(checkpoint, first, device, autoencoder_path)
    reference = open_reference(real_images, extractor, sampler.resolution, group=group)
    plan = {
        "schema": Sweep.SCHEMA,
        "sweep": to_json(config),
        "checkpoint": checkpoint.sha256,
        "autoencoder": sampler.autoencoder.identity(),
        "extractor": extractor.identity(),
        "reference": reference.identity(),
        "versions": versions(),
    }
    require_same_arguments(group, plan, "search")
    group.on_rank0(lambda: claim_folder(out, "plan.json", plan, allowed={"report.html"}))
    with contextlib.ExitStack() as held:
        group.on_rank0(lambda: held.enter_context(lock_folder(out)))
        group.on_rank0(lambda: _require_room(config, extractor, out))
        sweeper = Sweeper(config, out, sampler, reference, extractor, group, held.enter_context(stop_on_signal()))
        stages = search(config, sweeper.measure, sweeper.drop)
        confirmed = sweeper.confirm(to_confirm(config, stages[-1]))
        best = config.sample_config(confirmed[0].setting, config.sample.num, config.confirm_seed)
        sources = {
            "checkpoint": checkpoint.folder,
            "reference": real_images,
            "features": extractor.name,
            "features_path": features_path,
            "autoencoder_path": autoencoder_path,
        }
        commands = command, evaluate_command(sources, best)
        result = describe(config, checkpoint, stages, confirmed, machine(device), *commands)
        group.on_rank0(lambda: write_result(out / Sweep.FILE, result))
        group.on_rank0(lambda: shutil.rmtree(out / ".drawn", ignore_errors=True))
    return out, result


def sweep_folder(checkpoint: Checkpoint) -> Path:
    """Return where a run keeps the sweep of a checkpoint; JLTError for a checkpoint outside of a run."""
    if not (checkpoint.run / "config.json").is_file():
        raise UsageError(f"{checkpoint.folder} is not in a run folder: name a folder for the sweep with --out.")
    return checkpoint.run / "sweeps" / checkpoint.folder.name


def _require_room(config: SweepConfig, extractor: FeatureExtractor, out: Path) -> None:
    values = extractor.dimension + (extractor.num_classes or 0) + (extractor.spatial_dimension or 0)
    first = len(config.settings()) * config.coarse_num
    images = max(first, (1 + 2 * config.refine + config.confirm) * config.sample.num)
    require_space(out, images * (4 * values + 12), f"The features of {images} images")


def evaluate_command(sources: Mapping[str, Any], sample: SampleConfig) -> str:
    """Return the command that measures one setting of a checkpoint; `sources` are its other options."""
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


def describe(
    config: SweepConfig,
    checkpoint: Checkpoint,
    stages: Sequence[Stage],
    confirmed: Sequence[Measured],
    machine: dict[str, Any],
    command: str,
    reproduce: str,
) -> Sweep:
    """Return what `sweep.json` holds of the measurements."""
    shown = stages[-1].measured[0]
    return Sweep(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        machine=machine,
        latents=checkpoint.latents,
        title=f"Sweep of {checkpoint.config.name} at step {checkpoint.step:,}",
        checkpoint=SweptCheckpoint(checkpoint.step, checkpoint.sha256),
        metric=config.metric,
        lower_is_better=shown.lower_is_better,
        axes=SweepAxes(config.cfg_scale, config.cfg_interval, config.ema),
        search=SearchImages(config.sample.seed, config.coarse_num, shown.num),
        confirmation=ConfirmationImages(config.confirm_seed, config.sample.num),
        choice=replace(_described([shown])[0], protocol=None),
        confirmed=_described(confirmed),
        stages=tuple(
            SweepStage(stage.round.kind, stage.measured[0].num, stage.kept, _described(stage.measured))
            for stage in stages
        ),
        reproduce=reproduce,
        growth=GROWTH,
        errors=ERRORS,
    )


def _described(points: Sequence[Measured]) -> tuple[SweepPoint, ...]:
    """Return measurements with the difference of each from the first, the best."""
    best = points[0]
    return tuple(
        SweepPoint(
            **vars(point.setting),
            num=point.num,
            seed=point.seed,
            value=point.value,
            error=point.error or None,
            behind=None if point is best else Behind(point.cost - best.cost, point.difference_error(best) or None),
            metrics=point.result.metrics,
            protocol=point.result.protocol,
        )
        for point in points
    )


def resolve_ema(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[str, ...]:
    """Return the requested averages of the weights, by default all that are stored, else the weights themselves."""
    return tuple(names) or tuple(checkpoint.ema_names()) or ("none",)
