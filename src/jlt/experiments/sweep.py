"""Which guidance and which average of the weights a checkpoint is best sampled with: a search, then a confirmation.

Few images of one seed find the region, more of them the best setting, and other images, of another seed, say how good
it is: the least of many noisy numbers is too small, so a number that was searched by is not one to report.

A sweep folder holds `plan.json`, `points/` with a file for every measurement, and `sweep.json` at the end; the same
words continue it. Features of images that are still to be continued lie in `.drawn/`.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from jlt.config import Metric, SampleConfig, to_dict
from jlt.errors import JLTError, WrongWordsError
from jlt.evaluation.features import FeatureExtractor
from jlt.evaluation.measure import GROUPS, Metrics, frechet_without_groups
from jlt.evaluation.metrics import jackknife
from jlt.evaluation.real import open_reference
from jlt.evaluation.reference import Reference
from jlt.experiments.drawn import open_table
from jlt.experiments.evaluate import evaluate_sampler, warn_if_few
from jlt.files import claim_folder, lock_folder, read_json, write_json
from jlt.processes import Group
from jlt.progress import format_seconds, say
from jlt.protocol import machine, versions
from jlt.report.wording import with_error
from jlt.rows import require_space
from jlt.sampling.sampler import ImageSampler, check_guidance, check_guide, open_sampler, with_config
from jlt.signals import Stopped, stop_on_signal
from jlt.training.averages import choose_name, require_ema
from jlt.training.checkpoint import Checkpoint, open_checkpoint

LOWER_IS_BETTER = frozenset({"frechet_distance", "spatial_frechet_distance", "kernel_distance"})
ERROR_OF = {"frechet_distance": "frechet_distance_error"}
"""Metrics with a standard error. The others have none, and are compared as they stand."""
ERRORS = 2.0
"""A setting is clearly worse from this many errors of the difference on."""
GROWTH = 2
"""By how much the images of a setting grow from stage to stage, while the settings become half as many."""
COARSE_SHARE = 20
COARSE_PER_DIMENSION = 2
"""The first stage takes a twentieth of the images, and no fewer than twice the dimension of the features."""
RULE = (
    f"Each stage goes on to {GROWTH} times as many images for the settings that are left. A setting is dropped if it "
    f"is in the worse half and worse than the best by more than {ERRORS:g} errors of the difference, where the metric "
    "has an error. That of the difference is small, since both start from the same noise."
)


@dataclass(frozen=True)
class Setting:
    """A point of the grid."""

    cfg_scale: float
    cfg_interval: tuple[float, float]
    ema: str

    @property
    def name(self) -> str:
        """Words for a file name."""
        low, high = self.cfg_interval
        return f"{self.ema}-cfg{self.cfg_scale:.6g}-from{low:.6g}to{high:.6g}"

    def __str__(self) -> str:
        low, high = self.cfg_interval
        within = "" if (low, high) == (0, 1) or self.cfg_scale == 1 else f" for t in {low:g} to {high:g}"
        return f"guidance {self.cfg_scale:g}{within}, EMA {self.ema}"


@dataclass(frozen=True)
class SweepConfig:
    """What is searched, by what, and how it is confirmed."""

    sample: SampleConfig
    """How images are drawn besides: its `num` confirm, its `seed` is that of the search."""
    cfg_scale: tuple[float, ...]
    cfg_interval: tuple[tuple[float, float], ...]
    ema: tuple[str, ...]
    coarse_num: int
    """Images of each setting in the first stage."""
    confirm_seed: int
    refine: int = 1
    """Rounds that try the guidance scales halfway to the neighbours of the best."""
    confirm: int = 2
    """Most settings that are confirmed: the best, and those that cannot be told from it."""
    metric: Metric = "frechet_distance"

    def __post_init__(self) -> None:
        for axis in ("cfg_scale", "cfg_interval", "ema"):
            points = getattr(self, axis)
            if not points or len(set(points)) < len(points):
                raise WrongWordsError(f"{axis.replace('_', '-')} needs one value or more, each of them once.")
        if not GROUPS <= self.coarse_num <= self.sample.num:
            raise WrongWordsError(f"--coarse-num must lie between {GROUPS} and --num, and is {self.coarse_num}.")
        if self.confirm_seed == self.sample.seed:
            raise WrongWordsError("The seed that confirms must be another than the one that chooses.")
        if self.confirm < 1 or self.refine < 0:
            raise WrongWordsError("--confirm must be 1 or more, --refine 0 or more.")
        if self.metric not in get_args(Metric):
            raise WrongWordsError(f"--metric must be one of {', '.join(get_args(Metric))}.")
        for setting in self.settings():
            self.sample_config(setting, self.coarse_num, 0)

    def settings(self) -> list[Setting]:
        """Return the grid, average by average. Without guidance an interval has no effect, so it is measured once."""
        found = [
            setting_of(scale, interval, ema)
            for ema in self.ema
            for interval in self.cfg_interval
            for scale in self.cfg_scale
        ]
        return list(dict.fromkeys(found))

    def sample_config(self, setting: Setting, num: int, seed: int) -> SampleConfig:
        """Return how the images of a setting are drawn."""
        # A guide has no effect there, and is refused.
        base = replace(self.sample, autoguide="", autoguide_ema="") if setting.cfg_scale == 1 else self.sample
        scale, interval, ema = setting.cfg_scale, setting.cfg_interval, setting.ema
        return replace(base, num=num, seed=seed, cfg_scale=scale, cfg_interval=interval, ema=ema)


def setting_of(cfg_scale: float, cfg_interval: tuple[float, float], ema: str) -> Setting:
    """Return a point of the grid; unguided ones have the whole interval."""
    return Setting(cfg_scale, (0.0, 1.0) if cfg_scale == 1 else cfg_interval, ema)


def default_coarse_num(sample: SampleConfig, dimension: int) -> int:
    """Return the images of the first stage: few, and whole batches, of which nothing has to be drawn twice."""
    wanted = max(GROUPS, sample.num // COARSE_SHARE, COARSE_PER_DIMENSION * dimension)
    return min(sample.num, math.ceil(wanted / sample.batch_size) * sample.batch_size)


# ---- the search, which knows nothing of networks ----


@dataclass(frozen=True)
class Measured:
    """A setting with what was found on so many images; a smaller `cost` is better."""

    setting: Setting
    num: int
    seed: int
    value: float
    error: float
    lower_is_better: bool
    result: dict[str, Any]
    without: tuple[float, ...] = ()
    """Values without one group of images each, for the error of differences; empty where the metric has none."""
    sizes: tuple[int, ...] = ()

    @property
    def cost(self) -> float:
        """The value, negative where larger values are better."""
        return self.value if self.lower_is_better else -self.value

    def difference_error(self, other: Measured) -> float:
        """Return the standard error of the difference of two measurements that start from the same noise.

        By the jackknife over the differences, for images that begin alike become better or worse together.
        """
        if not self.without or self.sizes != other.sizes:
            return math.hypot(self.error, other.error)
        without = [mine - theirs for mine, theirs in zip(self.without, other.without, strict=True)]
        return jackknife(self.value - other.value, without, self.sizes)[0]

    def clearly_worse(self, other: Measured) -> bool:
        """Whether the difference is larger than its error allows."""
        return self.cost - other.cost > ERRORS * self.difference_error(other)


@dataclass(frozen=True)
class Stage:
    """Measurements with equal counts, best first, and how many of them went on."""

    name: str
    measured: tuple[Measured, ...]
    kept: int


Measure = Callable[[str, Sequence[Setting], int], list[Measured]]
"""Measures settings on that many images of the search, in a stage of that name."""


def keep(ranked: Sequence[Measured]) -> list[Measured]:
    """Return, of measurements that are sorted best first, the better half and all that are not clearly worse."""
    half = math.ceil(len(ranked) / 2)
    return [point for place, point in enumerate(ranked) if place < half or not point.clearly_worse(ranked[0])]


def search(config: SweepConfig, measure: Measure, drop: Callable[[Setting], None]) -> list[Stage]:
    """Return the stages of the search; the first of the last one is the choice. `drop` hears of each that is out."""
    stages: list[Stage] = []
    left, num = config.settings(), config.coarse_num
    while True:
        ranked = _ranked(measure("coarse" if not stages else f"halving {len(stages)}", left, num))
        kept = keep(ranked) if num < config.sample.num else ranked
        stages.append(Stage("coarse" if not stages else "halving", tuple(ranked), len(kept)))
        for point in ranked:
            if point not in kept:
                drop(point.setting)
        if len(kept) == 1 or num >= config.sample.num:
            break
        left, num = _in_order(config, kept), min(GROWTH * num, config.sample.num)
    for round_ in range(config.refine):
        field = kept
        tried = {point.setting for stage in stages for point in stage.measured}
        between = midpoints(field[0].setting, tried)
        if not between:
            break
        ranked = _ranked([*field, *measure(f"refinement {round_ + 1}", between, num)])
        kept = ranked
        stages.append(Stage("refinement", tuple(ranked), len(ranked)))
    return stages


def _ranked(points: Sequence[Measured]) -> list[Measured]:
    return sorted(points, key=lambda point: point.cost)


def _in_order(config: SweepConfig, points: Sequence[Measured]) -> list[Setting]:
    """Return settings average by average, so that a network is opened once."""
    return sorted((point.setting for point in points), key=lambda setting: config.ema.index(setting.ema))


def midpoints(best: Setting, tried: set[Setting]) -> list[Setting]:
    """Return the settings halfway between the best and the neighbouring guidance scales that were tried."""
    scales = sorted(
        setting.cfg_scale
        for setting in tried
        if setting.ema == best.ema and (setting.cfg_scale == 1 or setting.cfg_interval == best.cfg_interval)
    )
    # The unguided setting has no interval of its own: there, the best may have any, and none is between.
    below = [scale for scale in scales if scale < best.cfg_scale][-1:]
    above = [scale for scale in scales if scale > best.cfg_scale][:1]
    halves = [round((scale + best.cfg_scale) / 2, 4) for scale in (*below, *above)]
    found = [setting_of(scale, best.cfg_interval, best.ema) for scale in halves]
    return [setting for setting in found if setting not in tried]


def to_confirm(config: SweepConfig, last: Stage) -> list[Measured]:
    """Return the choice, and the next ones that it cannot be told from."""
    best = last.measured[0]
    return [best, *(point for point in last.measured[1:] if not point.clearly_worse(best))][: config.confirm]


# ---- measuring ----


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
        result = self.group.on_first(lambda: read_json(path) if path.exists() else None)
        if result is None:
            began = time.monotonic()
            self._sampler = with_config(self._sampler, self.config.sample_config(setting, num, seed))
            place = self._drawn(setting, seed)
            result = evaluate_sampler(self._sampler, self._reference, self._extractor, place, self.group, keep=True)
            result |= {"without_groups": self.group.on_first(lambda: self._without_groups(place))}
            self.group.on_first(lambda: write_json(path, result))
            self._images, self._seconds = self._images + fresh, self._seconds + time.monotonic() - began
        return self._measured(setting, num, seed, result)

    def _without_groups(self, place: Path) -> dict[str, Any] | None:
        if self.config.metric not in ERROR_OF:
            return None
        table = open_table(self._sampler, self._extractor, place)
        found = frechet_without_groups(table.read()["pooled"], self._reference.gaussian)
        return {"frechet_distance": list(found.without), "sizes": list(found.sizes)}

    def _measured(self, setting: Setting, num: int, seed: int, result: dict[str, Any]) -> Measured:
        metric, metrics = self.config.metric, result["metrics"]
        if metrics[metric] is None:
            raise JLTError(f"{metric} cannot be measured with these features and this reference: choose another.")
        error = metrics.get(ERROR_OF.get(metric, "")) or 0.0
        point = Measured(setting, num, seed, metrics[metric], error, metric in LOWER_IS_BETTER, result)
        if parts := result["without_groups"]:
            point = replace(point, without=tuple(parts[metric]), sizes=tuple(parts["sizes"]))
        return point

    def drop(self, setting: Setting) -> None:
        """Remove the features of a setting that is out."""
        self.group.on_first(lambda: shutil.rmtree(self._drawn(setting, self.config.sample.seed), ignore_errors=True))

    def _drawn(self, setting: Setting, seed: int) -> Path:
        return self.out / ".drawn" / f"{setting.name}-seed{seed}"

    def _tell(self, where: str, point: Measured, images_left: int) -> None:
        if self.group.rank:
            return
        value = " ".join(with_error(point.value, point.error)) if point.error else f"{point.value:.4g}"
        left = ""
        if self._images and images_left:
            left = f"; about {format_seconds(images_left * self._seconds / self._images)} left"
        say(f"{where}: {point.setting}: {self.config.metric.replace('_', ' ')} {value} of {point.num} images{left}")


def images_after(config: SweepConfig, left: int, num: int, stage: str) -> int:
    """Return the images still to draw after a stage, if each stage drops half of the settings."""
    rounds = config.refine
    if stage.startswith("refinement"):
        rounds -= int(stage.split()[-1])
    more = 0
    while not stage.startswith("refinement") and left > 1 and num < config.sample.num:
        left, before, num = math.ceil(left / 2), num, min(GROWTH * num, config.sample.num)
        more += left * (num - before)
    return more + rounds * 2 * num + config.confirm * config.sample.num


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
    words or a disk without room; Stopped when any process was asked to end.
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
        "sweep": to_dict(config),
        "checkpoint": checkpoint.sha256,
        "autoencoder": sampler.autoencoder.identity(),
        "extractor": extractor.identity(),
        "reference": reference.identity(),
        "versions": versions(),
    }
    group.on_first(lambda: claim_folder(out, "plan.json", words, allowed={"report.html"}))
    with contextlib.ExitStack() as held:
        group.on_first(lambda: held.enter_context(lock_folder(out)))
        group.on_first(lambda: _require_room(config, extractor, out))
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
        result = {"schema": 1, "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **result}
        group.on_first(lambda: write_json(out / "sweep.json", result))
        group.on_first(lambda: shutil.rmtree(out / ".drawn", ignore_errors=True))
    return out, result


def sweep_folder(checkpoint: Checkpoint) -> Path:
    """Return where a run keeps the sweep of a checkpoint; JLTError for a checkpoint outside of a run."""
    if not (checkpoint.run / "config.json").is_file():
        raise WrongWordsError(f"{checkpoint.folder} lies in no run: say with --out where the sweep goes.")
    return checkpoint.run / "sweeps" / checkpoint.folder.name


def _require_room(config: SweepConfig, extractor: FeatureExtractor, out: Path) -> None:
    values = extractor.dimension + (extractor.num_classes or 0) + (extractor.spatial_dimension or 0)
    images = max(len(config.settings()) * config.coarse_num, config.sample.num)
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
