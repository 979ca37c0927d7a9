"""Which guidance and which average of the weights a checkpoint is best sampled with: a search, then a confirmation.

Few images of one seed find the region, more of them the best setting, and images of another seed give its number: the
smallest of many noisy numbers is biased, so a number of the search is not one to report.

A sweep folder (`measured_settings`) holds `sweep.json` at the end.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jlt.errors import JLTError
from jlt.experiments.checkpoint_evaluation import warn_if_few
from jlt.experiments.measured_settings import SettingsFolder, Subject, default_folder, settings_folder
from jlt.experiments.search import ERRORS, GROWTH, Measured, Round, Stage, SweepConfig, images_after, search, to_confirm
from jlt.results.evaluation import LOWER_IS_BETTER, Evaluation
from jlt.results.files import write_result
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
from jlt.runtime.environment import machine
from jlt.runtime.processes import Group
from jlt.runtime.progress import inform
from jlt.sampling.sampler import check_guidance, check_guide, with_numbered_labels
from jlt.storage.codec import to_json
from jlt.training.averages import choose_name
from jlt.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Sweeper:
    """Measures the settings of a sweep."""

    config: SweepConfig
    folder: SettingsFolder

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
        if self.folder.group.rank == 0:
            warn_if_few(found[0].result.metrics, self.folder.extractor)
        return found

    def _all(
        self, name: str, settings: Sequence[Setting], num: int, seed: int, fresh: int, after: int
    ) -> list[Measured]:
        """Measure settings on `num` images, `fresh` of them new, with `after` images to draw after all of them."""
        found = []
        for place, setting in enumerate(settings, 1):
            result = self.folder.measure(setting.name, self.config.sample_config(setting, num, seed), fresh)
            point = self._measured(setting, num, seed, result)
            found.append(point)
            if self.folder.group.rank == 0:
                error = f" ± {point.error:.2g}" if point.error else ""
                left = self.folder.time_left((len(settings) - place) * fresh + after)
                value = f"{self.config.metric} {point.value:.4g}{error} ({num} images{left})"
                inform(f"{name}, {place} of {len(settings)}: {setting.name}: {value}")
        return found

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
        self.folder.drop(setting.name, self.config.sample.seed)


def sweep(
    config: SweepConfig, subject: Subject, out: Path | None, device: str, group: Group, command: str = "jlt sweep"
) -> tuple[Path, Sweep]:
    """Search, confirm, and return the folder and what its `sweep.json` holds; the same call resumes.

    JLTError before the first image for settings that cannot be drawn, and as `settings_folder` raises it. The stages
    between the first and the last may need more room on the disk, and check it then. Stopped if any process is to stop.
    """
    checkpoint = subject.checkpoint
    out = out or default_folder(checkpoint, "sweep")
    config = replace(config, sample=with_numbered_labels(checkpoint, config.sample))
    for setting in config.settings():
        wanted = config.sample_config(setting, config.coarse_num, 0)
        check_guidance(checkpoint.config, wanted)
        if wanted.autoguided:
            check_guide(checkpoint, wanted)
    for ema in config.ema:
        # It refuses an unknown name.
        choose_name(checkpoint, ema)
    first = config.sample_config(config.settings()[0], config.coarse_num, config.sample.seed)
    plan = {"schema": Sweep.SCHEMA, "sweep": to_json(config)}
    images = max(
        len(config.settings()) * config.coarse_num, (1 + 2 * config.refine + config.confirm) * config.sample.num
    )
    with settings_folder(subject, first, out, plan, images, device, group) as folder:
        sweeper = Sweeper(config, folder)
        stages = search(config, sweeper.measure, sweeper.drop)
        confirmed = sweeper.confirm(to_confirm(config, stages[-1]))
        best = config.sample_config(confirmed[0].setting, config.sample.num, config.confirm_seed)
        commands = command, subject.evaluate_command(best)
        result = describe(config, checkpoint, stages, confirmed, machine(device), *commands)
        group.on_rank0(lambda: write_result(out / Sweep.FILE, result))
        folder.finish()
    return out, result


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
