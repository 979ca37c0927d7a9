"""Successive halving over a grid of settings: which to measure next with how many images, and which to keep.

This module knows nothing of networks: a function that it is given measures the settings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from jlt.config import Metric, SampleConfig
from jlt.errors import UsageError
from jlt.evaluation.metrics import jackknife
from jlt.evaluation.suite import GROUPS
from jlt.ranges import require_ranges
from jlt.results.evaluation import Evaluation
from jlt.results.sweep import WHOLE_INTERVAL, Setting

ERRORS = 2.0
"""A setting is clearly worse if the difference exceeds this many of its standard errors."""
GROWTH = 2
"""By how much the images of a setting grow from stage to stage, while the number of settings halves."""
COARSE_SHARE = 20
COARSE_PER_DIMENSION = 2
"""The first stage draws a twentieth of the images, and at least twice the dimension of the features."""


@dataclass(frozen=True)
class SweepConfig:
    """The grid, the metric of the search, and how the choice is confirmed."""

    sample: SampleConfig
    """All other settings of the sampling; its `num` is that of the confirmation, its `seed` that of the search."""
    cfg_scale: tuple[float, ...]
    cfg_interval: tuple[tuple[float, float], ...]
    ema: tuple[str, ...]
    coarse_num: int
    """Images of each setting in the first stage."""
    confirm_seed: int
    refine: int = 1
    """Rounds that try the guidance scales halfway to the neighbours of the best."""
    confirm: int = 2
    """Largest number of confirmed settings: the best, and those that the search cannot distinguish from it."""
    metric: Metric = "frechet_distance"

    def __post_init__(self) -> None:
        require_ranges(self)
        for axis in ("cfg_scale", "cfg_interval", "ema"):
            points = getattr(self, axis)
            if not points or len(set(points)) < len(points):
                raise UsageError(f"{axis.replace('_', '-')} needs one value or more, each of them once.")
        if not GROUPS <= self.coarse_num <= self.sample.num:
            raise UsageError(f"--coarse-num must be between {GROUPS} and --num, not {self.coarse_num}.")
        if self.confirm_seed == self.sample.seed:
            raise UsageError("The seed of the confirmation must differ from the seed of the search.")
        if self.metric not in get_args(Metric):
            raise UsageError(f"--metric must be one of {', '.join(get_args(Metric))}.")
        for setting in self.settings():
            self.sample_config(setting, self.coarse_num, 0)

    def settings(self) -> list[Setting]:
        """Return the grid, average by average. Without guidance an interval has no effect, so it is measured once."""
        grid = itertools.product(self.ema, self.cfg_interval, self.cfg_scale)
        return list(dict.fromkeys(setting_of(scale, interval, ema) for ema, interval, scale in grid))

    def sample_config(self, setting: Setting, num: int, seed: int) -> SampleConfig:
        """Return how the images of a setting are drawn."""
        # Without guidance a guide has no effect, and is refused.
        base = replace(self.sample, autoguide="", autoguide_ema="") if setting.cfg_scale == 1 else self.sample
        scale, interval, ema = setting.cfg_scale, setting.cfg_interval, setting.ema
        return replace(base, num=num, seed=seed, cfg_scale=scale, cfg_interval=interval, ema=ema)


def setting_of(cfg_scale: float, cfg_interval: tuple[float, float], ema: str) -> Setting:
    """Return a point of the grid; unguided ones have the whole interval."""
    return Setting(cfg_scale, WHOLE_INTERVAL if cfg_scale == 1 else cfg_interval, ema)


def default_coarse_num(sample: SampleConfig, dimension: int) -> int:
    """Return the images of the first stage: few, and in whole batches, so that none is drawn twice."""
    wanted = max(GROUPS, sample.num // COARSE_SHARE, COARSE_PER_DIMENSION * dimension)
    return min(sample.num, math.ceil(wanted / sample.batch_size) * sample.batch_size)


@dataclass(frozen=True)
class Measured:
    """A setting with its value on `num` images; a smaller `cost` is better."""

    setting: Setting
    num: int
    seed: int
    value: float
    error: float
    lower_is_better: bool
    result: Evaluation
    without: tuple[float, ...] = ()
    """Values without one group of images each, for the error of differences; empty where the metric has none."""
    sizes: tuple[int, ...] = ()

    @property
    def cost(self) -> float:
        """The value, negative where larger values are better."""
        return self.value if self.lower_is_better else -self.value

    def difference_error(self, other: Measured) -> float:
        """Return the standard error of the difference of two measurements that start from the same noise.

        It is the jackknife over the differences, because images from the same noise become better or worse together.
        """
        if not self.without or self.sizes != other.sizes:
            return math.hypot(self.error, other.error)
        without = [mine - theirs for mine, theirs in zip(self.without, other.without, strict=True)]
        return jackknife(self.value - other.value, without, self.sizes)[0]

    def clearly_worse(self, other: Measured) -> bool:
        """Whether the difference is too large for chance."""
        return self.cost - other.cost > ERRORS * self.difference_error(other)


@dataclass(frozen=True)
class Round:
    """One step of the search: the kind of its stage, and its number among those of the kind."""

    kind: Literal["coarse", "halving", "refinement"]
    number: int = 1


@dataclass(frozen=True)
class Stage:
    """Measurements with equal counts, best first, and how many of them went on."""

    round: Round
    measured: tuple[Measured, ...]
    kept: int


Measure = Callable[[Round, Sequence[Setting], int], list[Measured]]
"""Measures settings on a number of images of the search, in a round."""


def keep(ranked: Sequence[Measured]) -> list[Measured]:
    """Return, of measurements that are sorted best first, the better half and all that are not clearly worse."""
    half = math.ceil(len(ranked) / 2)
    return [point for place, point in enumerate(ranked) if place < half or not point.clearly_worse(ranked[0])]


def search(config: SweepConfig, measure: Measure, drop: Callable[[Setting], None]) -> list[Stage]:
    """Return the stages of the search; the first point of the last one is the choice.

    `drop` is called with each setting that the search drops.
    """
    stages: list[Stage] = []
    left, num = config.settings(), config.coarse_num
    while True:
        round_ = Round("halving", len(stages)) if stages else Round("coarse")
        ranked = _ranked(measure(round_, left, num))
        kept = keep(ranked) if num < config.sample.num else ranked
        stages.append(Stage(round_, tuple(ranked), len(kept)))
        for point in ranked:
            if point not in kept:
                drop(point.setting)
        if len(kept) == 1 or num >= config.sample.num:
            break
        # Average by average, so that each network is opened once.
        left = sorted((point.setting for point in kept), key=lambda setting: config.ema.index(setting.ema))
        num = min(GROWTH * num, config.sample.num)
    for number in range(1, config.refine + 1):
        tried = {point.setting for stage in stages for point in stage.measured}
        between = midpoints(kept[0].setting, tried)
        if not between:
            break
        round_ = Round("refinement", number)
        kept = _ranked([*kept, *measure(round_, between, num)])
        stages.append(Stage(round_, tuple(kept), len(kept)))
    return stages


def _ranked(points: Sequence[Measured]) -> list[Measured]:
    return sorted(points, key=lambda point: point.cost)


def midpoints(best: Setting, tried: set[Setting]) -> list[Setting]:
    """Return the settings halfway between the best and the neighbouring guidance scales that were tried."""
    scales = sorted(setting.cfg_scale for setting in tried if setting.on_line(best.cfg_interval, best.ema))
    below = [scale for scale in scales if scale < best.cfg_scale][-1:]
    above = [scale for scale in scales if scale > best.cfg_scale][:1]
    halves = [round((scale + best.cfg_scale) / 2, 4) for scale in (*below, *above)]
    found = [setting_of(scale, best.cfg_interval, best.ema) for scale in halves]
    return [setting for setting in found if setting not in tried]


def to_confirm(config: SweepConfig, last: Stage) -> list[Measured]:
    """Return the choice, and the next settings that the search cannot distinguish from it."""
    best = last.measured[0]
    return [best, *(point for point in last.measured[1:] if not point.clearly_worse(best))][: config.confirm]


def images_after(config: SweepConfig, left: int, num: int, round_: Round) -> int:
    """Return the images still to draw after a round, if each stage drops half of the settings."""
    if round_.kind == "refinement":
        return (config.refine - round_.number) * 2 * num + config.confirm * config.sample.num
    more = 0
    while left > 1 and num < config.sample.num:
        left, before, num = math.ceil(left / 2), num, min(GROWTH * num, config.sample.num)
        more += left * (num - before)
    return more + config.refine * 2 * num + config.confirm * config.sample.num
