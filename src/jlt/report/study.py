"""What one page shows: an ablation, a run or an analysis of latents, with evaluations of one protocol."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from jlt.config import LossSpace, Prediction
from jlt.errors import JLTError
from jlt.results.ablation import Ablation, SystemRun
from jlt.results.evaluation import SPREAD_OF, Evaluation
from jlt.results.files import read_result
from jlt.results.geometry import GEOMETRY, INSIDE, ErrorByDirection, Geometry, SettingForecast
from jlt.results.run import CONFIG, Run, read_config, read_run
from jlt.storage.files import without_paths
from jlt.storage.folders import path_inside

K = TypeVar("K")
V = TypeVar("V")
MEASUREMENTS = ("frechet_distance", "inception_score", "label_agreement")
"""The metrics of tables and curves, in their order."""


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean, smallest and largest value, and their count."""

    mean: float
    low: float
    high: float
    count: int
    error: float | None = None
    """Standard error of the mean from the errors of the single values, where they are known."""


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean and range of the values that are known, None if there are none."""
    known = [value for value in values if value is not None]
    return Spread(sum(known) / len(known), min(known), max(known), len(known)) if known else None


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Return the values of equal keys as one list, the keys in order of their first appearance."""
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


@dataclass(frozen=True)
class System:
    """What is compared: one prediction, loss space, network and patch size, with one run per seed."""

    name: str
    prediction: Prediction
    loss_space: LossSpace
    patch_size: int
    runs: tuple[Run, ...]
    variant: str = ""
    """The point on further axes (geometry, width) as text."""

    def measured(self, metric: str, step: int | None) -> Spread | None:
        """Return a metric over the seeds that were evaluated at a step, or None."""
        found = [evaluation.metrics for run in self.runs if (evaluation := run.at(step))]
        over_seeds = spread(metrics[metric] for metrics in found)
        errors = [metrics[SPREAD_OF[metric]] for metrics in found] if metric == "frechet_distance" else [None]
        if over_seeds is None or None in errors:
            return over_seeds
        return replace(over_seeds, error=math.hypot(*filter(None, errors)) / len(errors))

    def curve(self, metric: str) -> dict[int, Spread]:
        """Return a metric by training step."""
        return {step: value for step in self.evaluated_steps if (value := self.measured(metric, step))}

    @property
    def evaluated_steps(self) -> list[int]:
        """The steps at which any seed was evaluated, ascending."""
        return sorted({found.step or 0 for run in self.runs for found in run.evaluations})


@dataclass(frozen=True)
class Study:
    """Everything one page shows; a single run is one system."""

    folder: Path
    title: str
    systems: tuple[System, ...]
    ablation: Ablation | None = None
    geometry: Geometry | None = None
    inside: ErrorByDirection | None = None
    """The errors of trained networks, of an analysis that names some."""
    set_aside: tuple[tuple[Run, Evaluation], ...] = ()
    """Further evaluations of steps that have one, by another protocol; they are in no table or curve."""

    @property
    def runs(self) -> list[Run]:
        """All runs, system by system."""
        return [run for system in self.systems for run in system.runs]

    @property
    def notes(self) -> list[str]:
        """What the logs of the runs lack."""
        return [note for run in self.runs for note in run.log.notes]

    @property
    def seeds(self) -> int:
        """The largest number of runs of a system."""
        return max((len(system.runs) for system in self.systems), default=0)

    @property
    def several_losses(self) -> bool:
        """Whether systems differ in the space of their loss."""
        return len({system.loss_space for system in self.systems}) > 1

    @property
    def forecasts(self) -> tuple[SettingForecast, ...]:
        """What was expected of the settings of an ablation."""
        return self.ablation.forecasts if self.ablation else ()

    @property
    def latents(self) -> Mapping[str, Any]:
        """The identity of the latents, empty if no file names it."""
        recorded = [
            self.ablation.latents if self.ablation else None,
            *(run.config.get("latents") for run in self.runs),
            self.geometry.latents if self.geometry else None,
        ]
        return next((latents for latents in recorded if latents), {})

    @property
    def final_step(self) -> int | None:
        """The last step at which any system was evaluated: the one that the table compares."""
        return max((step for system in self.systems for step in system.evaluated_steps), default=None)

    @property
    def final_distances(self) -> list[tuple[System, Spread]]:
        """The systems that were evaluated at the final step, with their Frechet distances."""
        found = [(system, system.measured("frechet_distance", self.final_step)) for system in self.systems]
        return [(system, value) for system, value in found if value]

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The protocol that all evaluations share, empty without any."""
        return next((found.shared_protocol for run in self.runs for found in run.evaluations), {})


def read_study(folder: Path) -> Study:
    """Read an ablation (ablation.json), a run (config.json) or an analysis (geometry.json).

    JLTError for any other folder, a damaged file, and evaluations whose protocols differ.
    """
    if (folder / Ablation.FILE).exists():
        study = _read_ablation(folder)
    elif (folder / CONFIG).exists():
        study = _read_single(folder)
    elif (folder / GEOMETRY).exists():
        geometry = read_result(Geometry, folder / GEOMETRY)
        inside = read_result(ErrorByDirection, folder / INSIDE) if (folder / INSIDE).exists() else None
        if inside and inside.latents != geometry.latents:
            raise JLTError(f"{folder / INSIDE} is of other latents than {folder / GEOMETRY}.")
        study = Study(folder, "Target geometry", systems=(), geometry=geometry, inside=inside)
    else:
        if not folder.exists():
            raise JLTError(f"{folder} does not exist: name a run, an ablation, a sweep, a price or an analysis.")
        raise JLTError(
            f"{folder} holds neither an ablation (ablation.json) nor a training run (config.json) nor an analysis "
            "(geometry.json) nor a finished sweep (sweep.json) or price (price.json)."
        )
    return keep_one_protocol(study)


def keep_one_protocol(study: Study) -> Study:
    """Return the study with evaluations of one protocol, the most frequent; others are set aside.

    JLTError with the difference if another evaluation is the only one of a run's last step: without it the page would
    hide the result, and with it the page would compare numbers that cannot be compared.
    """
    everything = [(run, found) for run in study.runs for found in run.evaluations]
    if not everything:
        return study
    frequency = Counter(found.method for _, found in everything)
    main_run, main = max(everything, key=lambda item: (frequency[item[1].method], item[1].step or 0))
    aside = [(run, found) for run, found in everything if found.method != main.method]
    for run, found in aside:
        later = [other for other in run.evaluations if (other.step or 0) > (found.step or 0)]
        if not later and all(other.method != main.method for other in run.evaluations if other.step == found.step):
            key, *values = main.differences(found)[0]
            ours, theirs = ("missing" if value is None else json.dumps(value) for value in values)
            raise JLTError(
                f"{main_run.file_of(main)} and {run.file_of(found)} were evaluated differently and do not belong in "
                f"one table: {key} is {ours} in one and {theirs} in the other. Evaluate again with the "
                "same arguments."
            )

    def kept(run: Run) -> Run:
        return replace(run, evaluations=tuple(found for found in run.evaluations if found.method == main.method))

    systems = tuple(replace(system, runs=tuple(map(kept, system.runs))) for system in study.systems)
    return replace(study, systems=systems, set_aside=tuple(aside))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one level with dotted keys, for a page: without the folders of this machine."""
    if isinstance(value, Mapping) and (value or not prefix):
        return {
            dotted: leaf
            for key, inner in value.items()
            for dotted, leaf in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: without_paths(value)}


def _read_ablation(folder: Path) -> Study:
    ablation = read_result(Ablation, folder / Ablation.FILE)
    grouped: dict[tuple[str, Prediction, LossSpace, int, str], list[Run]] = {}
    for entry in ablation.systems:
        key = (entry.name, entry.prediction, entry.loss_space, entry.patch_size, entry.variant)
        run = path_inside(folder, entry.run)
        # A system whose training has not begun has no folder yet.
        grouped.setdefault(key, []).extend([_run_of(run, entry)] if (run / CONFIG).exists() else [])
    systems = tuple(System(*key[:4], tuple(runs), key[4]) for key, runs in grouped.items())
    geometry = read_result(Geometry, folder / GEOMETRY) if (folder / GEOMETRY).exists() else None
    if geometry and geometry.latents != ablation.latents:
        raise JLTError(f"{folder / GEOMETRY} is of other latents than {folder / Ablation.FILE}.")
    return Study(folder, ablation.title, systems, ablation, geometry)


def _run_of(folder: Path, entry: SystemRun) -> Run:
    """Read the run of a system; JLTError if the folder holds that of another one."""
    config, _ = read_config(folder)
    network = config.network
    found = (config.prediction, config.loss.space, network.patch_size, config.seed, network.hidden_size)
    wanted = (entry.prediction, entry.loss_space, entry.patch_size, entry.seed, entry.width or network.hidden_size)
    if found != wanted:
        raise JLTError(
            f"{folder} holds another run than {Ablation.FILE} says: {' '.join(map(str, found))} instead of "
            f"{' '.join(map(str, wanted))} (prediction, loss space, patch size, seed, width). Put the right one there."
        )
    return read_run(folder)


def _read_single(folder: Path) -> Study:
    config, _ = read_config(folder)
    run = read_run(folder)
    system = System(config.name, config.prediction, config.loss.space, config.network.patch_size, runs=(run,))
    return Study(folder, f"Training run {system.name}", systems=(system,))
