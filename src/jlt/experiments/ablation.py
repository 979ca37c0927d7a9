"""Matched ablations: the same run with another prediction, loss space, patch size or seed, and nothing else changed.

An ablation folder holds `runs/`, `reference.npz` and `ablation.json`, and `coordinates/` where the
geometry of the latents is an axis; every part of it that exists is kept when the same command is given again.
"""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jlt.config import LossSpace, Prediction, SampleConfig, TrainConfig
from jlt.errors import JLTError, UsageError
from jlt.evaluation.extractors import load_extractor
from jlt.experiments.ablation_progress import AblationProgress
from jlt.experiments.ablation_run import AblationRun
from jlt.experiments.checkpoint_evaluation import draw_grid, evaluate_run, images_of, save_reference
from jlt.experiments.coordinate_stores import store_in_coordinates
from jlt.experiments.recipes import vary
from jlt.geometry.forecast import Estimate, forecast
from jlt.geometry.tokens import token_estimates
from jlt.latents.store import LatentStore
from jlt.report.results import ABLATION, ABLATION_SCHEMA
from jlt.results.geometry import SettingForecast, TrainingModel
from jlt.runtime.environment import default_device, machine
from jlt.runtime.workers import run_jobs
from jlt.storage.codec import to_json
from jlt.storage.files import claim_folder, difference, lock_folder, read_json, write_json
from jlt.training.checkpoint import open_checkpoint, step_folder
from jlt.training.loop import train

WORKERS = {"cpu": 2, "cuda": 1}
"""Systems trained side by side. On two cores, two processes of one thread bear other programs, two threads do not."""
GROWING = {"prediction", "loss_space", "patch_size", "seed", "anisotropy", "width"}
"""Axes that may have more points when an ablation is continued."""
PREPARED = {"quickstart.json", "latents", "geometry.json"}
"""What may lie in a folder before its ablation begins."""
AXES = {"name", "prediction", "loss.space", "network.patch_size", "seed"}
"""Settings in which the systems of an ablation may differ."""
MOST_ANISOTROPY = 3.0
AXES_OF_WIDTH = {"network.hidden_size", "network.num_heads"}
AXES_OF_ANISOTROPY = ("latents.autoencoder.normalisation.coordinates", "latents.manifest_sha256")
"""What differs besides where width or anisotropy are axes; of the latter all that begins so."""


@dataclass(frozen=True)
class AblationConfig:
    """Which systems are compared, and how they are measured."""

    train: TrainConfig
    prediction: tuple[Prediction, ...]
    loss_space: tuple[LossSpace, ...]
    patch_size: tuple[int, ...]
    seed: tuple[int, ...]
    sample: SampleConfig
    evaluations: int
    """Points of each training curve; the last is the end of the training."""
    extractor: str
    reference: str
    """Real images, or an .npz of their statistics; empty takes the images that the store was made from."""
    title: str
    recipe: str
    features_path: str = ""
    """Where the extractor's weights are, if not in the usual place."""
    anisotropy: tuple[float, ...] = ()
    """Powers that the eigenvalues of the tokens are raised to, by other coordinates; none takes the latents as they
    are."""
    width: tuple[int, ...] = ()
    """Widths of the network; none takes that of the recipe."""

    def __post_init__(self) -> None:
        for axis in ("prediction", "loss_space", "patch_size", "seed", "anisotropy", "width"):
            points = getattr(self, axis)
            may_be_empty = axis in ("anisotropy", "width")
            # As folders are named by them.
            told = {f"{point:g}" if isinstance(point, float) else point for point in points}
            if not (points or may_be_empty) or len(told) < len(points):
                raise UsageError(f"{axis.replace('_', ' ')} needs one value or more, each of them once.")
        if any(not 0 <= power <= MOST_ANISOTROPY for power in self.anisotropy):
            raise UsageError(f"--anisotropy takes powers from 0 (whitened) to {MOST_ANISOTROPY:g}; 1 is untouched.")
        if self.train.sample_every or self.train.evaluate_every:
            raise UsageError("An ablation measures by itself: --evaluations says how often.")
        if self.evaluations < 1:
            raise UsageError("An ablation needs at least one evaluation.")


def systems_of(config: AblationConfig, latents: Path, out: Path, device: str) -> list[AblationRun]:
    """Return the runs of an ablation, the longest first so that the workers end together."""
    every = math.ceil(config.train.steps / config.evaluations)
    reference, systems = reference_path(config, out), []
    axes = itertools.product(
        config.seed,
        config.patch_size,
        config.width or (None,),
        config.anisotropy or (None,),
        config.loss_space,
        config.prediction,
    )
    for seed, patch_size, width, anisotropy, loss_space, prediction in axes:
        varied = vary(config.train, prediction, loss_space, patch_size, seed, width)
        # Checkpoints are what is measured, so all of them stay.
        varied = replace(varied, checkpoint_every=every, keep_last=0)
        told = "" if anisotropy is None else f"-a{anisotropy:g}"
        told += "" if width is None else f"-w{width}"
        run = out / "runs" / f"{prediction}-{loss_space}-p{patch_size}{told}-s{seed}"
        systems.append(
            AblationRun(
                config=varied,
                run=run,
                latents=latents if anisotropy is None else coordinates_folder(out, patch_size, anisotropy),
                reference=reference,
                extractor=config.extractor,
                sample=config.sample,
                device=device,
                features_path=config.features_path,
                anisotropy=anisotropy,
                width=width,
            )
        )
    return sorted(systems, key=lambda system: (system.config.network.patch_size, -system.config.network.hidden_size))


def coordinates_folder(out: Path, patch_size: int, anisotropy: float) -> Path:
    """Return where an ablation keeps the latents in other coordinates."""
    return out / "coordinates" / f"a{anisotropy:g}-p{patch_size}"


def run_system(system: AblationRun) -> None:
    """Train one system, measure it along its training and draw its sample grid; whatever exists is kept."""
    train(system.config, LatentStore.open(system.latents), system.run, system.device)
    extractor = load_extractor(system.extractor, system.device, system.features_path or None)
    evaluate_run(system.run, system.evaluated_steps, str(system.reference), extractor, system.sample, system.device)
    last = open_checkpoint(step_folder(system.run, system.config.steps))
    draw_grid(last, system.sample, system.device, system.run / "samples" / "grid.png")


def ablate(config: AblationConfig, latents: Path, out: Path, workers: int | None, command: str) -> dict[str, Any]:
    """Run an ablation whole, or what is missing of it, and return what `ablation.json` holds.

    `command` is how a reader repeats it. Raises JLTError where the runs are not matched, and Stopped when asked to end.
    """
    store, device = LatentStore.open(latents), default_device()
    systems = systems_of(config, latents, out, device)
    check_matched([to_json(system.config) for system in systems], config)
    for system in systems:
        # Words that nothing can be expected of are refused before anything is written.
        TrainingModel.of(system.config)
    workers = WORKERS[device] if workers is None else workers
    if workers < 1:
        raise UsageError(f"An ablation needs at least one worker, not {workers}.")
    claim(out, config, store)
    with lock_folder(out):
        images = config.reference or images_of(store)
        exif = (store.manifest.encoding or {}).get("exif", "ignore")
        extractor = load_extractor(config.extractor, device, config.features_path or None)
        save_reference(reference_path(config, out), images, extractor, store.manifest.resolution, exif)
        for patch_size, anisotropy in itertools.product(config.patch_size, config.anisotropy):
            store_in_coordinates(store, coordinates_folder(out, patch_size, anisotropy), patch_size, anisotropy)
        summary = {"command": command, **describe(config, systems, store, device)}
        summary["forecasts"] = forecasts(systems, _known_forecasts(out), device)
        # Written before the work too, so that an ablation under way can be reported on.
        write_json(out / ABLATION, summary)
        with AblationProgress(systems) as progress:
            run_jobs(run_system, systems, workers, progress.poll)
        summary |= prove_matched(systems, config)
        write_json(out / ABLATION, summary)
    return summary


def reference_path(config: AblationConfig, out: Path) -> Path:
    """Return where the reference statistics are, or will be once they are measured."""
    return Path(config.reference) if config.reference.endswith(".npz") else out / "reference.npz"


def check_matched(configs: Sequence[Mapping[str, Any]], ablation: AblationConfig) -> list[str]:
    """Return the settings in which runs differ; JLTError if any is not an axis of the ablation."""
    differs = set()
    for config in configs[1:]:
        differs |= {found.key for found in difference(configs[0], config)}
    axes = AXES | (AXES_OF_WIDTH if ablation.width else set())
    axes |= {name for name in differs if ablation.anisotropy and name.startswith(AXES_OF_ANISOTROPY)}
    if not differs <= axes:
        raise JLTError(f"The runs are not matched: they also differ in {', '.join(sorted(differs - axes))}.")
    return sorted(differs - {"name"})


def claim(out: Path, config: AblationConfig, store: LatentStore) -> None:
    """Make the folder this ablation's; JLTError if it holds other content, or an ablation with other settings.

    Predictions, loss spaces, patch sizes and seeds may be added to an ablation later: each is a run of its own.
    """
    settings = {key: value for key, value in to_json(config).items() if key not in GROWING}
    claim_folder(out, "plan.json", {"ablation": settings, "latents": store.identity()}, allowed=PREPARED)


def describe(config: AblationConfig, systems: Sequence[AblationRun], store: LatentStore, device: str) -> dict[str, Any]:
    """Return what `ablation.json` says of the systems, before the work is done."""
    return {
        "schema": ABLATION_SCHEMA,
        "title": config.title,
        "recipe": config.recipe,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "latents": store.identity(),
        "autoencoder_psnr": store.manifest.autoencoder.get("held_out_psnr"),
        "classifier_accuracy": load_extractor(config.extractor, "cpu", config.features_path or None).held_out_accuracy,
        "systems": [
            {
                "name": system.config.name,
                "prediction": system.config.prediction,
                "loss_space": system.config.loss.space,
                "patch_size": system.config.network.patch_size,
                "variant": system.variant,
                "anisotropy": system.anisotropy,
                "width": system.config.network.hidden_size,
                "seed": system.config.seed,
                "run": f"{system.run.parent.name}/{system.run.name}",
            }
            for system in systems
        ],
    }


def forecasts(
    systems: Sequence[AblationRun], known: Sequence[dict[str, Any]] = (), device: str = "cpu"
) -> list[dict[str, Any]]:
    """Return what is expected of x, eps and v in every geometry, network and loss, before anything is trained.

    `known` are those of the same ablation, with fewer points on its axes.
    """
    found = {(told["variant"], told["patch_size"], told["loss_space"]): told for told in known}
    new = [system for system in systems if system.setting not in found]
    trained = {system.setting for system in systems if system.run.exists()}
    for latents in dict.fromkeys(system.latents for system in new):
        there = [system for system in new if system.latents == latents]
        sizes = list(dict.fromkeys(system.config.network.patch_size for system in there))
        estimates = token_estimates(LatentStore.open(latents), sizes, device)
        for system in there:
            estimate = estimates[system.config.network.patch_size]
            found.setdefault(system.setting, to_json(_forecast(system, estimate, system.setting not in trained)))
    return [found[setting] for setting in dict.fromkeys(system.setting for system in systems)]


def _known_forecasts(out: Path) -> list[dict[str, Any]]:
    """Return what an ablation's folder says of earlier points on its axes, unless an earlier version has said it."""
    stored = read_json(out / ABLATION) if (out / ABLATION).exists() else {}
    return stored.get("forecasts", []) if stored.get("schema") == ABLATION_SCHEMA else []


def _forecast(system: AblationRun, estimate: Estimate, before_training: bool) -> SettingForecast:
    network, train = system.config.network, system.config
    found = forecast([estimate.in_units_of(train.noise_scale**2)], TrainingModel.of(train), [network.hidden_size])
    return SettingForecast.of(
        found,
        variant=system.variant,
        anisotropy=system.anisotropy,
        patch_size=network.patch_size,
        loss_space=train.loss.space,
        width=network.hidden_size,
        dimension=network.channels * network.patch_size**2,
        before_training=before_training,
    )


def prove_matched(systems: Sequence[AblationRun], config: AblationConfig) -> dict[str, Any]:
    """Return what was found equal in the finished runs, read back from them; JLTError if they are not matched."""
    ends = {system.run.name: open_checkpoint(step_folder(system.run, system.config.steps)) for system in systems}
    differs = check_matched([read_json(system.run / "config.json") for system in systems], config)
    states = {name: checkpoint.read_state() for name, checkpoint in ends.items()}
    draws = {name: state["draws"] for name, state in states.items()}
    weights = {name: state["initial_weights"] for name, state in states.items()}
    require_equal(systems, draws, "random draws", lambda system: system.config.seed)
    require_equal(systems, weights, "initial weights", lambda system: (system.config.seed, system.config.network))
    matched = {
        "checked": [
            "every other setting",
            f"initial weights at equal patch size{', width' if config.width else ''} and seed",
            "sample order, times, noise seeds and label drops at equal seed",
        ],
        "differs": differs,
        "initial_weights": weights,
        "draws": draws,
    }
    return {"seconds": sum(state["seconds"] for state in states.values()), "matched": matched}


def require_equal(systems: Sequence[AblationRun], hashes: dict[str, str], what: str, group: Any) -> None:
    """Raise a JLTError unless all runs of a group carry the same hash."""
    seen: dict[Any, tuple[str, str]] = {}
    for system in systems:
        name = system.run.name
        other, value = seen.setdefault(group(system), (name, hashes[name]))
        if value != hashes[name]:
            raise JLTError(f"The runs {other} and {name} are not matched: their {what} differ.")
