"""The price of a picture: the cheapest sampler whose distance is within the error of the published one's.

All settings draw the images of one seed. Images of another seed measure the choice and the published sampler once
more: of many settings, the cheapest that seems good enough is partly so by chance.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jlt.config import SAMPLERS, SampleConfig, Solver
from jlt.errors import UsageError
from jlt.evaluation.metrics import jackknife
from jlt.experiments.checkpoint_evaluation import warn_if_few
from jlt.experiments.measured_settings import SettingsFolder, Subject, default_folder, settings_folder
from jlt.ranges import require_ranges
from jlt.results.evaluation import Evaluation
from jlt.results.files import write_result
from jlt.results.price import Price, Priced, SamplerSetting
from jlt.results.sweep import SweptCheckpoint
from jlt.runtime.environment import machine, seconds_of
from jlt.runtime.processes import Group
from jlt.runtime.progress import inform
from jlt.sampling.guidance import rows_evaluated
from jlt.sampling.sampler import ImageSampler, with_config, with_numbered_labels
from jlt.storage.codec import to_json

_PUBLISHED = SAMPLERS["published"]
PUBLISHED: tuple[Solver, int, float] = (_PUBLISHED["solver"], _PUBLISHED["steps"], _PUBLISHED["shift"])
"""Solver, steps and shift of the published sampler (eq. 8)."""


@dataclass(frozen=True)
class PriceConfig:
    """The grid of samplers; the published one acts with guidance at the first of the intervals."""

    sample: SampleConfig
    """All other settings of the sampling; its `seed` is that of the search."""
    solver: tuple[Solver, ...]
    steps: tuple[int, ...]
    shift: tuple[float, ...]
    cfg_interval: tuple[tuple[float, float], ...]
    max_evaluations: int
    confirm_seed: int

    def __post_init__(self) -> None:
        require_ranges(self)
        for axis in ("solver", "steps", "shift", "cfg_interval"):
            points = getattr(self, axis)
            if not points or len(set(points)) < len(points):
                raise UsageError(f"--{axis.replace('_', '-')} needs one value or more, each of them once.")
        if self.confirm_seed == self.sample.seed:
            raise UsageError("The seed of the confirmation must differ from the seed of the search.")
        if not self.candidates():
            raise UsageError(f"No setting needs {self.max_evaluations} evaluations or fewer: raise --max-evaluations.")

    @property
    def published(self) -> SamplerSetting:
        """The sampler that the others are compared with."""
        return SamplerSetting(*PUBLISHED, self.cfg_interval[0])

    def candidates(self) -> list[SamplerSetting]:
        """Return the settings that are cheap enough, the cheapest first.

        Without guidance an interval has no effect, so the first one is measured alone.
        """
        intervals = self.cfg_interval if self.sample.cfg_scale != 1 else self.cfg_interval[:1]
        grid = itertools.product(self.solver, self.steps, self.shift, intervals)
        settings = [SamplerSetting(*point) for point in grid]
        affordable = [setting for setting in settings if self.evaluations(setting) <= self.max_evaluations]
        return sorted(affordable, key=self.evaluations)

    def evaluations(self, setting: SamplerSetting) -> int:
        """Return the evaluations of the network per image, both branches counted."""
        return rows_evaluated(self.sample_config(setting, self.sample.seed))

    def sample_config(self, setting: SamplerSetting, seed: int) -> SampleConfig:
        """Return how the images of a setting are drawn."""
        return replace(self.sample, **vars(setting), seed=seed)


def price(
    config: PriceConfig, subject: Subject, out: Path | None, device: str, group: Group, command: str = "jlt price"
) -> tuple[Path, Price]:
    """Measure the samplers and confirm the choice; return the folder and what its `price.json` holds.

    The same call resumes. JLTError before the first image for guidance that the network was not trained for, and as
    `settings_folder` raises it. Stopped if any process is to stop.
    """
    checkpoint, settings = subject.checkpoint, [config.published, *config.candidates()]
    config = replace(config, sample=with_numbered_labels(checkpoint, config.sample))
    out = out or default_folder(checkpoint, "price")
    first = config.sample_config(settings[0], config.sample.seed)
    plan = {"schema": Price.SCHEMA, "price": to_json(config)}
    with settings_folder(subject, first, out, plan, config.sample.num, device, group) as folder:
        points = _measure(config, folder, settings, config.sample.seed, "search")
        choice = next((point.setting for point in points[1:] if point.within), None)
        wanted = [config.published, choice] if choice else []
        confirmed = _measure(config, folder, wanted, config.confirm_seed, "confirmation")
        timed = [_timed(config, folder.sampler, point) for point in confirmed]
        if group.rank == 0:
            warn_if_few(points[0].metrics, subject.extractor)
        result = Price(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command,
            machine=machine(device),
            latents=checkpoint.latents,
            title=f"The price of a picture of {checkpoint.config.name} at step {checkpoint.step:,}",
            checkpoint=SweptCheckpoint(checkpoint.step, checkpoint.sha256),
            cfg_scale=config.sample.cfg_scale,
            num=config.sample.num,
            seed=config.sample.seed,
            confirm_seed=config.confirm_seed,
            points=tuple(points),
            choice=choice,
            confirmed=tuple(timed),
            reproduce=subject.evaluate_command(config.sample_config(choice or config.published, config.confirm_seed)),
        )
        group.on_rank0(lambda: write_result(out / Price.FILE, result))
        folder.finish()
    return out, result


def _measure(
    config: PriceConfig, folder: SettingsFolder, settings: Sequence[SamplerSetting], seed: int, name: str
) -> list[Priced]:
    """Measure settings on the images of a seed, the published sampler first."""
    points: list[Priced] = []
    published: Evaluation | None = None
    for place, setting in enumerate(settings, 1):
        result = folder.measure(setting.name, config.sample_config(setting, seed), config.sample.num)
        folder.drop(setting.name, seed)
        published = published or result
        points.append(_priced(setting, config.evaluations(setting), result, published))
        if folder.group.rank == 0:
            left = folder.time_left((len(settings) - place) * config.sample.num)
            value = f"Frechet distance {points[-1].value:.4g}, {points[-1].evaluations} evaluations{left}"
            inform(f"{name}, {place} of {len(settings)}: {setting.name}: {value}")
    return points


def _priced(setting: SamplerSetting, evaluations: int, result: Evaluation, published: Evaluation) -> Priced:
    metrics, other = result.metrics, published.metrics
    difference = metrics.frechet_distance - other.frechet_distance
    error = None
    if result.jackknife and published.jackknife and result is not published:
        pairs = zip(result.jackknife.frechet_distance, published.jackknife.frechet_distance, strict=True)
        error = jackknife(difference, [mine - theirs for mine, theirs in pairs], result.jackknife.sizes)[0]
    return Priced(
        **vars(setting),
        evaluations=evaluations,
        value=metrics.frechet_distance,
        error=metrics.frechet_distance_error,
        difference=difference,
        difference_error=error,
        within=difference <= (other.frechet_distance_error or 0.0),
        metrics=metrics,
        protocol=result.protocol,
    )


def _timed(config: PriceConfig, sampler: ImageSampler, point: Priced) -> Priced:
    """Time one batch after another that warms up."""
    latents = with_config(sampler, config.sample_config(point.setting, config.confirm_seed)).latent_sampler
    size = min(config.sample.num, config.sample.batch_size)
    draw = partial(latents.flow, latents.start(range(size)))
    draw()
    return replace(point, seconds=seconds_of(draw, sampler.device) / size)
