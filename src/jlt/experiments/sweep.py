"""Which guidance and which average of the weights a checkpoint is best sampled with: a search, then a confirmation.

Few images of one seed find the region, more of them the best setting, and other images, of another seed, say how good
it is: the least of many noisy numbers is too small, so a number that was searched by is not one to report.

A sweep folder holds `plan.json`, `points/` with a file for every measurement, and `sweep.json` at the end; the same
words continue it. Features of images that are still to be continued lie in `.drawn/`.
"""

from __future__ import annotations

import contextlib
import datetime
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jlt.config import SampleConfig
from jlt.errors import JLTError, UsageError
from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.real_images import open_reference
from jlt.evaluation.reference import Reference
from jlt.evaluation.suite import Metrics
from jlt.experiments.checkpoint_evaluation import evaluate_sampler, warn_if_few
from jlt.experiments.search import (
    ERROR_OF,
    GROWTH,
    LOWER_IS_BETTER,
    RULE,
    Measured,
    Setting,
    Stage,
    SweepConfig,
    images_after,
    search,
    to_confirm,
)
from jlt.report.wording import with_error
from jlt.runtime.environment import machine, versions
from jlt.runtime.processes import Group, require_same_arguments
from jlt.runtime.progress import format_seconds, inform
from jlt.runtime.signals import Stopped, stop_on_signal
from jlt.sampling.sampler import ImageSampler, check_guidance, check_guide, open_sampler, with_config
from jlt.storage.codec import to_json
from jlt.storage.files import claim_folder, lock_folder, read_json, require_unlinked, write_json
from jlt.storage.rows import require_space
from jlt.training.averages import choose_name, require_ema
from jlt.training.checkpoint import Checkpoint, open_checkpoint

SCHEMA = 2


class Sweeper:
    """Measures settings, each measurement once: what lies in the folder is read, what does not is drawn and kept."""

    def __init__(
        self,
        config: SweepConfig,
        out: Path,
        sampler: ImageSampler,
        reference: Reference,
        extractor: FeatureExtractor,
        group: Group,
    ) -> None:
        self.config, self.out, self.group = config, out, group
        self._sampler, self._reference, self._extractor = sampler, reference, extractor
        self._asked: Any = False
        self._images, self._seconds = 0, 0.0

    def __enter__(self) -> Sweeper:
        self._held = contextlib.ExitStack()
        self._asked = self._held.enter_context(stop_on_signal())
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def measure(self, stage: str, settings: Sequence[Setting], num: int) -> list[Measured]:
        """Measure settings by the images of the search, continuing those of the stage before."""
        # Of the stages before this one, half as many images are there.
        fresh = num if stage.startswith(("coarse", "refinement")) else num - num // GROWTH
        after = images_after(self.config, len(settings), num, stage)
        found = []
        for place, setting in enumerate(settings):
            found.append(self.one(setting, num, self.config.sample.seed, fresh))
            left = (len(settings) - place - 1) * fresh + after
            self._tell(f"{stage}, {place + 1} of {len(settings)}", found[-1], left)
        return found

    def confirm(self, points: Sequence[Measured]) -> list[Measured]:
        """Measure settings by all images of the other seed."""
        num, found = self.config.sample.num, []
        for place, point in enumerate(points):
            found.append(self.one(point.setting, num, self.config.confirm_seed, num))
            self._tell(f"confirmation, {place + 1} of {len(points)}", found[-1], (len(points) - place - 1) * num)
        if self.group.rank == 0:
            warn_if_few(Metrics(**found[0].result["metrics"]), self._extractor)
        return found

    def one(self, setting: Setting, num: int, seed: int, fresh: int) -> Measured:
        """Return a measurement, from its file if it was made before; Stopped if any process was asked to end."""
        if any(self.group.gather(bool(self._asked))):
            raise Stopped("Stopped on request.")
        path = self.out / "points" / f"{setting.name}-seed{seed}-num{num}.json"
        result = self.group.on_rank0(lambda: read_json(path) if path.exists() else None)
        if result is None:
            began = time.monotonic()
            self._sampler = with_config(self._sampler, self.config.sample_config(setting, num, seed))
            place = self._drawn(setting, seed)
            result = evaluate_sampler(self._sampler, self._reference, self._extractor, place, self.group, keep=True)
            self.group.on_rank0(lambda: write_json(path, result))
            self._images, self._seconds = self._images + fresh, self._seconds + time.monotonic() - began
        return self._measured(setting, num, seed, result)

    def _measured(self, setting: Setting, num: int, seed: int, result: dict[str, Any]) -> Measured:
        metric, metrics = self.config.metric, result["metrics"]
        if metrics[metric] is None:
            raise JLTError(f"{metric} cannot be measured with these features and this reference: choose another.")
        error = metrics.get(ERROR_OF.get(metric, "")) or 0.0
        point = Measured(setting, num, seed, metrics[metric], error, metric in LOWER_IS_BETTER, result)
        parts = result["jackknife"]
        return replace(point, without=tuple(parts[metric]), sizes=tuple(parts["sizes"])) if metric in parts else point

    def drop(self, setting: Setting) -> None:
        """Remove the features of a setting that is out."""
        self.group.on_rank0(lambda: shutil.rmtree(self._drawn(setting, self.config.sample.seed), ignore_errors=True))

    def _drawn(self, setting: Setting, seed: int) -> Path:
        folder = self.out / ".drawn" / f"{setting.name}-seed{seed}"
        require_unlinked(self.out, folder)
        return folder

    def _tell(self, where: str, point: Measured, images_left: int) -> None:
        if self.group.rank:
            return
        value = " ".join(with_error(point.value, point.error)) if point.error else f"{point.value:.4g}"
        left = ""
        if self._images and images_left:
            left = f"; about {format_seconds(images_left * self._seconds / self._images)} left"
        inform(f"{where}: {point.setting}: {self.config.metric.replace('_', ' ')} {value} of {point.num} images{left}")


def sweep(
    config: SweepConfig,
    path: Path,
    reference_words: str,
    extractor: FeatureExtractor,
    out: Path | None,
    device: str,
    group: Group,
    autoencoder_path: str | None = None,
    command: str = "jlt sweep",
    features_path: Path | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Search, confirm, and return the folder and what its `sweep.json` holds; the same call continues.

    JLTError before the first image for settings that cannot be drawn, a reference that does not fit, a folder of other
    words, processes that mean unlike work, or a disk without room for the first stage and for the last ones; more may
    be needed between them, and is asked for then. Stopped when any process was asked to end.
    """
    checkpoint = open_checkpoint(path)
    out = out or sweep_folder(checkpoint)
    for setting in config.settings():
        wanted = config.sample_config(setting, config.coarse_num, 0)
        check_guidance(checkpoint.config, wanted)
        if wanted.autoguided:
            check_guide(checkpoint, wanted)
    for ema in config.ema:
        require_ema(checkpoint, ema)
    first = config.sample_config(config.settings()[0], config.coarse_num, config.sample.seed)
    sampler = open_sampler(checkpoint, first, device, autoencoder_path)
    reference = open_reference(reference_words, extractor, sampler.resolution, group=group)
    words = {
        "schema": SCHEMA,
        "sweep": to_json(config),
        "checkpoint": checkpoint.sha256,
        "autoencoder": sampler.autoencoder.identity(),
        "extractor": extractor.identity(),
        "reference": reference.identity(),
        "versions": versions(),
    }
    require_same_arguments(group, words, "search")
    group.on_rank0(lambda: claim_folder(out, "plan.json", words, allowed={"report.html"}))
    with contextlib.ExitStack() as held:
        group.on_rank0(lambda: held.enter_context(lock_folder(out)))
        group.on_rank0(lambda: _require_room(config, extractor, out))
        sweeper = held.enter_context(Sweeper(config, out, sampler, reference, extractor, group))
        stages = search(config, sweeper.measure, sweeper.drop)
        confirmed = sweeper.confirm(to_confirm(config, stages[-1]))
        reproduce = evaluate_command(
            checkpoint,
            config.sample_config(confirmed[0].setting, config.sample.num, config.confirm_seed),
            reference_words,
            extractor.name,
            autoencoder_path,
            features_path,
        )
        told = {"command": command, "machine": machine(device), "latents": checkpoint.latents}
        result = {**told, **describe(config, checkpoint, stages, confirmed), "reproduce": reproduce}
        result = {
            "schema": SCHEMA,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **result,
        }
        group.on_rank0(lambda: write_json(out / "sweep.json", result))
        group.on_rank0(lambda: shutil.rmtree(out / ".drawn", ignore_errors=True))
    return out, result


def sweep_folder(checkpoint: Checkpoint) -> Path:
    """Return where a run keeps the sweep of a checkpoint; JLTError for a checkpoint outside of a run."""
    if not (checkpoint.run / "config.json").is_file():
        raise UsageError(f"{checkpoint.folder} lies in no run: say with --out where the sweep goes.")
    return checkpoint.run / "sweeps" / checkpoint.folder.name


def _require_room(config: SweepConfig, extractor: FeatureExtractor, out: Path) -> None:
    values = extractor.dimension + (extractor.num_classes or 0) + (extractor.spatial_dimension or 0)
    first = len(config.settings()) * config.coarse_num
    images = max(first, (1 + 2 * config.refine + config.confirm) * config.sample.num)
    require_space(out, images * (4 * values + 12), f"The features of {images} images")


def evaluate_command(
    checkpoint: Checkpoint,
    sample: SampleConfig,
    reference: str,
    features: str,
    autoencoder_path: str | None,
    features_path: Path | None = None,
) -> str:
    """Return the command that measures one setting."""
    words: list[Any] = ["jlt", "evaluate", "--checkpoint", checkpoint.folder, "--reference", reference]
    words += ["--features", features]
    if features_path:
        words += ["--features-path", features_path]
    if autoencoder_path:
        words += ["--autoencoder-path", autoencoder_path]
    for option, value in _options(sample):
        # A switch has no value.
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words += [f"--{option.replace('_', '-')}", *values]
    return shlex.join(map(str, words))


def _options(sample: SampleConfig) -> Iterator[tuple[str, Any]]:
    """Yield what has to be said of a sampling: a grid stands for steps and shift, and what is empty is left out."""
    for entry in fields(SampleConfig):
        value = getattr(sample, entry.name)
        if value is not False and value not in ("", ()) and not (sample.grid and entry.name in ("steps", "shift")):
            yield entry.name, value


def describe(
    config: SweepConfig, checkpoint: Checkpoint, stages: Sequence[Stage], confirmed: Sequence[Measured]
) -> dict[str, Any]:
    """Return what `sweep.json` says of the measurements."""
    best, shown = confirmed[0], stages[-1].measured[0]
    return {
        "title": f"Sweep of {checkpoint.config.name} at step {checkpoint.step:,}",
        "checkpoint": {"step": checkpoint.step, "sha256": checkpoint.sha256},
        "metric": config.metric,
        "lower_is_better": best.lower_is_better,
        "axes": {
            "cfg_scale": list(config.cfg_scale),
            "cfg_interval": [list(interval) for interval in config.cfg_interval],
            "ema": list(config.ema),
        },
        "rule": RULE,
        "search": {"seed": config.sample.seed, "coarse_num": config.coarse_num, "num": shown.num},
        "confirmation": {"seed": config.confirm_seed, "num": config.sample.num},
        "choice": _described(shown, shown),
        "confirmed": [_described(point, best) | {"protocol": point.result["protocol"]} for point in confirmed],
        "stages": [
            {
                "name": stage.name,
                "num": stage.measured[0].num,
                "kept": stage.kept,
                "points": [
                    _described(point, stage.measured[0]) | {"protocol": point.result["protocol"]}
                    for point in stage.measured
                ],
            }
            for stage in stages
        ],
    }


def _described(point: Measured, best: Measured) -> dict[str, Any]:
    return {
        "cfg_scale": point.setting.cfg_scale,
        "cfg_interval": list(point.setting.cfg_interval),
        "ema": point.setting.ema,
        "num": point.num,
        "seed": point.seed,
        "value": point.value,
        "error": point.error or None,
        "behind": None
        if point is best
        else {"difference": point.cost - best.cost, "error": point.difference_error(best) or None},
        "metrics": point.result["metrics"],
    }


def resolve_ema(checkpoint: Checkpoint, words: Sequence[str]) -> tuple[str, ...]:
    """Return the averages that words name; all that are stored where there are no words."""
    return tuple(words) or tuple(checkpoint.ema_names()) or (choose_name(checkpoint, ""),)
