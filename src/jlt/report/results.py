"""The result files that a report is made of, read into frozen data; unlike evaluations are kept apart here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jlt.errors import JLTError
from jlt.report.run_log import Log, read_log
from jlt.results.files import read_result
from jlt.results.geometry import GEOMETRY, INSIDE, ErrorByDirection, Geometry
from jlt.storage.files import path_inside, read_json

Protocol = Mapping[str, Any]

MEASUREMENTS = ("frechet_distance", "inception_score", "label_agreement")
"""The metrics that tables and curves show, in their order."""

ABLATION = "ablation.json"
ABLATION_SCHEMA = 2
OWN_TO_A_RUN = frozenset({"checkpoint", "ema_rebuilt"})
"""What a protocol says of the thing that was evaluated, not of how; everything else must agree within a table."""


def _shared(protocol: Protocol) -> dict[str, Any]:
    """Return what must agree within a table: all but what was evaluated, and the coordinates that it was trained in.

    Those are undone before anything is decoded, so images are compared with images.
    """
    kept = {key: value for key, value in protocol.items() if key not in OWN_TO_A_RUN}
    autoencoder = kept.get("autoencoder")
    normalisation = autoencoder.get("normalisation") if isinstance(autoencoder, Mapping) else None
    if isinstance(autoencoder, Mapping) and isinstance(normalisation, Mapping) and "coordinates" in normalisation:
        plain = {key: value for key, value in normalisation.items() if key != "coordinates"}
        kept["autoencoder"] = {**autoencoder, "normalisation": plain}
    return kept


@dataclass(frozen=True)
class Evaluation:
    """One evaluation file: the numbers and how they came about."""

    path: Path
    step: int
    metrics: Mapping[str, float | None]
    protocol: Protocol

    @property
    def method(self) -> str:
        """The protocol without what belongs to one checkpoint, as text that is equal for equal protocols."""
        kept = _shared(self.protocol)
        if kept.get("autoguide", {}).get("checkpoint") == self.protocol.get("checkpoint"):
            kept["autoguide"] = kept.get("autoguide", {}).get("ema")
        reference = kept.get("reference", {})
        if "images" in reference:
            # The last digits of its moments, and so their hash, depend on how many processes measured the same images.
            kept["reference"] = {key: value for key, value in reference.items() if key != "sha256"}
        return json.dumps(kept, sort_keys=True)


@dataclass(frozen=True)
class Run:
    """One training run, which may still be under way."""

    folder: Path
    seed: int
    config: Mapping[str, Any]
    log: Log
    evaluations: tuple[Evaluation, ...]
    grid: Path | None

    def at(self, step: int) -> Evaluation | None:
        """Return the evaluation at a step, or None."""
        return next((evaluation for evaluation in self.evaluations if evaluation.step == step), None)

    @property
    def reached(self) -> int:
        """The last step that was logged or evaluated, 0 before the first."""
        steps = [logged.step for logged in self.log.steps[-1:]] + [
            evaluation.step for evaluation in self.evaluations[-1:]
        ]
        return max(steps, default=0)


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean, smallest and largest value, and how many there are."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class System:
    """What is compared: one prediction, loss space, network and patch size, with one run per seed."""

    name: str
    prediction: str
    loss_space: str
    patch_size: int
    runs: tuple[Run, ...]
    variant: str = ""
    """Words for the point on further axes, geometry or width."""

    def measured(self, metric: str, step: int) -> Spread | None:
        """Return a metric over the seeds that have been evaluated at a step, or None."""
        found = [evaluation.metrics.get(metric) for run in self.runs if (evaluation := run.at(step))]
        return spread(value for value in found if value is not None)

    @property
    def evaluated_steps(self) -> list[int]:
        """The steps at which any seed was evaluated, ascending."""
        return sorted({evaluation.step for run in self.runs for evaluation in run.evaluations})


@dataclass(frozen=True)
class Study:
    """Everything one page shows: an ablation, a single run as an ablation of one system, or an analysis of latents."""

    folder: Path
    title: str
    systems: tuple[System, ...]
    facts: Mapping[str, Any]
    """ablation.json as it stands; empty otherwise."""
    geometry: Geometry | None
    inside: ErrorByDirection | None = None
    """The errors of trained networks, of an analysis that names some."""
    set_aside: tuple[Evaluation, ...] = ()
    """Further evaluations of steps that have one already, made in another way; in no table or curve."""

    @property
    def runs(self) -> list[Run]:
        """All runs, system by system."""
        return [run for system in self.systems for run in system.runs]

    @property
    def latents(self) -> Mapping[str, Any]:
        """The identity of the latents, empty where no file tells it."""
        told = [
            self.facts.get("latents"),
            *(run.config.get("latents") for run in self.runs),
            self.geometry.latents if self.geometry else None,
        ]
        return next((latents for latents in told if latents), {})

    @property
    def final_step(self) -> int | None:
        """The last step at which any system was evaluated: the one that the table compares."""
        return max((step for system in self.systems for step in system.evaluated_steps), default=None)

    @property
    def protocol(self) -> Protocol | None:
        """The protocol that all evaluations share, without what belongs to one checkpoint."""
        for run in self.runs:
            for evaluation in run.evaluations:
                return _shared(evaluation.protocol)
        return None


def spread(values: Iterable[float]) -> Spread | None:
    """Return mean and range of some numbers, None of none."""
    numbers = list(values)
    if not numbers:
        return None
    return Spread(sum(numbers) / len(numbers), min(numbers), max(numbers), len(numbers))


def read_study(folder: Path) -> Study:
    """Read an ablation (ablation.json), a run (config.json) or an analysis (geometry.json).

    Raises JLTError for any other folder, a damaged file, and evaluations whose protocols differ.
    """
    if (folder / ABLATION).exists():
        study = _read_ablation(folder)
    elif (folder / "config.json").exists():
        study = _read_single(folder)
    elif (folder / GEOMETRY).exists():
        geometry = read_result(Geometry, folder / GEOMETRY)
        inside = read_result(ErrorByDirection, folder / INSIDE) if (folder / INSIDE).exists() else None
        if inside and inside.latents != geometry.latents:
            raise JLTError(f"{folder / INSIDE} is of other latents than {folder / GEOMETRY}.")
        study = Study(folder, "Target geometry", systems=(), facts={}, geometry=geometry, inside=inside)
    else:
        raise JLTError(
            f"{folder} holds neither an ablation (ablation.json) nor a training run (config.json) nor an analysis "
            "(geometry.json) nor a finished sweep (sweep.json)."
        )
    return keep_one_protocol(study)


def keep_one_protocol(study: Study) -> Study:
    """Return the study with evaluations of one protocol, the most frequent; others are set aside.

    Raises JLTError naming the difference where an unlike evaluation is the only one of a run's last step: leaving it
    out would hide the result, and showing it would compare what is not comparable.
    """
    everything = [evaluation for run in study.runs for evaluation in run.evaluations]
    if not everything:
        return study
    frequency = Counter(evaluation.method for evaluation in everything)
    main = max(everything, key=lambda evaluation: (frequency[evaluation.method], evaluation.step))
    aside: list[Evaluation] = []
    systems = []
    for system in study.systems:
        runs = [_keep_method(run, main, aside) for run in system.runs]
        systems.append(replace(system, runs=tuple(runs)))
    return replace(study, systems=tuple(systems), set_aside=tuple(aside))


def _keep_method(run: Run, main: Evaluation, aside: list[Evaluation]) -> Run:
    kept = tuple(evaluation for evaluation in run.evaluations if evaluation.method == main.method)
    final = max((evaluation.step for evaluation in run.evaluations), default=0)
    for evaluation in run.evaluations:
        if evaluation.method == main.method:
            continue
        if evaluation.step == final and all(final != other.step for other in kept):
            key, ours, theirs = protocol_differences(main, evaluation)[0]
            raise JLTError(
                f"{main.path} and {evaluation.path} were evaluated differently and do not belong in one table: "
                f"{key} is {ours} in one and {theirs} in the other. Evaluate again with the same words."
            )
        aside.append(evaluation)
    return replace(run, evaluations=kept)


def protocol_differences(one: Evaluation, other: Evaluation) -> list[tuple[str, str, str]]:
    """Return every dotted key of the protocols that differs, with the two values as JSON or `missing`."""
    ours, theirs = flatten(_shared(one.protocol)), flatten(_shared(other.protocol))
    return [
        (key, _shown(ours, key), _shown(theirs, key))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one level with dotted keys."""
    if isinstance(value, Mapping) and (value or not prefix):
        return {
            dotted: leaf
            for key, inner in value.items()
            for dotted, leaf in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: value}


def _read_ablation(folder: Path) -> Study:
    path = folder / ABLATION
    facts = read_json(path)
    grouped: dict[tuple[str, str, str, int, str], list[Run]] = {}
    for entry in _get(facts, "systems", path):
        name, prediction, space, patch_size = (
            _get(entry, field, path) for field in ("name", "prediction", "loss_space", "patch_size")
        )
        run_folder = path_inside(folder, _get(entry, "run", path))
        runs = grouped.setdefault((name, prediction, space, patch_size, entry.get("variant", "")), [])
        # A system whose training has not begun has no folder yet.
        if (run_folder / "config.json").exists():
            runs.append(read_run(run_folder, _get(entry, "seed", path)))
    systems = tuple(
        System(name, prediction, space, patch_size, tuple(runs), variant)
        for (name, prediction, space, patch_size, variant), runs in grouped.items()
    )
    return Study(
        folder=folder,
        title=str(facts.get("title", folder.name)),
        systems=systems,
        facts=facts,
        geometry=read_result(Geometry, folder / GEOMETRY) if (folder / GEOMETRY).exists() else None,
    )


def _read_single(folder: Path) -> Study:
    path = folder / "config.json"
    config = read_json(path)
    system = System(
        name=str(_get(config, "name", path)),
        prediction=_get(config, "prediction", path),
        loss_space=_get(_get(config, "loss", path), "space", path),
        patch_size=_get(_get(config, "network", path), "patch_size", path),
        runs=(read_run(folder, _get(config, "seed", path)),),
    )
    return Study(folder=folder, title=f"Training run {system.name}", systems=(system,), facts={}, geometry=None)


def read_run(folder: Path, seed: int) -> Run:
    """Read a run folder; log, samples and evaluations may be missing while it is under way."""
    evaluations = [_read_evaluation(path) for path in sorted((folder / "evaluations").glob("step_*.json"))]
    grid = "samples/grid.png"
    return Run(
        folder=folder,
        seed=seed,
        config=read_json(folder / "config.json"),
        log=read_log(folder / "log.jsonl"),
        evaluations=tuple(sorted(evaluations, key=lambda evaluation: evaluation.step)),
        grid=path_inside(folder, grid) if (folder / grid).exists() else None,
    )


def _read_evaluation(path: Path) -> Evaluation:
    content = read_json(path)
    metrics = {name: None if value is None else float(value) for name, value in _get(content, "metrics", path).items()}
    return Evaluation(path, _get(content, "step", path), metrics, _get(content, "protocol", path))


def _get(mapping: Any, key: str, path: Path) -> Any:
    if not isinstance(mapping, Mapping) or key not in mapping:
        raise JLTError(f"{path} has no {key!r}: it is damaged or was written by another version.")
    return mapping[key]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "missing"
