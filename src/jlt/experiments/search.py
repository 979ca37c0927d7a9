"""Successive halving over a grid of settings: which to measure next by how many images, and which to keep.

It knows nothing of networks: a function measures, and this decides what it measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from jlt.config import Metric, SampleConfig
from jlt.errors import UsageError
from jlt.evaluation.metrics import jackknife
from jlt.evaluation.suite import GROUPS

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
                raise UsageError(f"{axis.replace('_', '-')} needs one value or more, each of them once.")
        if not GROUPS <= self.coarse_num <= self.sample.num:
            raise UsageError(f"--coarse-num must lie between {GROUPS} and --num, and is {self.coarse_num}.")
        if self.confirm_seed == self.sample.seed:
            raise UsageError("The seed that confirms must be another than the one that chooses.")
        if self.confirm < 1 or self.refine < 0:
            raise UsageError("--confirm must be 1 or more, --refine 0 or more.")
        if self.metric not in get_args(Metric):
            raise UsageError(f"--metric must be one of {', '.join(get_args(Metric))}.")
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
