"""Matched ablations: the same run with another prediction, loss space, patch size or seed, and nothing else changed.

An ablation folder holds `runs/`, `reference.npz`, `ablation.json`, and `coordinates/` if the geometry of the latents is
an axis. Run the same command again to resume: every part that exists is kept.
"""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jlt.config import LossSpace, Prediction, SampleConfig, TrainConfig
from jlt.errors import JLTError, UsageError
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.reference import open_reference
from jlt.experiments.ablation_run import AblationProgress, AblationRun
from jlt.experiments.checkpoint_evaluation import draw_grid, evaluate_run, images_of
from jlt.experiments.coordinate_stores import store_in_coordinates
from jlt.experiments.recipes import vary
from jlt.geometry.forecast import Estimate, forecast
from jlt.geometry.tokens import token_estimates
from jlt.latents.store import LatentStore
from jlt.results.ablation import Ablation, Matched, SystemRun
from jlt.results.files import read_result, write_result
from jlt.results.geometry import SettingForecast, TrainingModel
from jlt.runtime.environment import default_device, machine
from jlt.runtime.progress import inform
from jlt.runtime.workers import run_jobs
from jlt.storage.codec import to_json
from jlt.storage.files import claim_folder, difference, lock_folder, read_json
from jlt.training.checkpoint import open_checkpoint, step_folder
from jlt.training.loop import train

WORKERS = {"cpu": 2, "cuda": 1}
"""Systems that are trained at once: two processes of one thread suffer less from other programs than two threads."""
GROWING = {"prediction", "loss_space", "patch_size", "seed", "anisotropy", "width"}
"""Axes that may get more points when the ablation is run again."""
PREPARED = {"quickstart.json", "latents", "geometry.json"}
"""What a folder may hold before its ablation begins."""
AXES = {"name", "prediction", "loss.space", "network.patch_size", "seed"}
"""Settings in which the systems of an ablation may differ."""
MOST_ANISOTROPY = 3.0
AXES_OF_WIDTH = {"network.hidden_size", "network.num_heads"}
AXES_OF_ANISOTROPY = ("latents.autoencoder.normalisation.coordinates", "latents.manifest_sha256")
"""Further settings that differ if width or anisotropy are axes; for anisotropy, all that begin with these names."""


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
    """Powers to which other coordinates raise the eigenvalues of the tokens; empty takes the latents unchanged."""
    width: tuple[int, ...] = ()
    """Widths of the network; empty takes that of the recipe."""

    def __post_init__(self) -> None:
        for axis in sorted(GROWING):
            points = getattr(self, axis)
            may_be_empty = axis in ("anisotropy", "width")
            # As in the names of folders.
            names = {f"{point:g}" if isinstance(point, float) else point for point in points}
            if not (points or may_be_empty) or len(names) < len(points):
                raise UsageError(f"{axis.replace('_', ' ')} needs one value or more, each of them once.")
        if any(not 0 <= power <= MOST_ANISOTROPY for power in self.anisotropy):
            raise UsageError(f"--anisotropy takes powers from 0 (whitened) to {MOST_ANISOTROPY:g}; 1 is untouched.")
        if self.train.sample_every or self.train.evaluate_every:
            raise UsageError("An ablation evaluates its runs itself: set --evaluations instead.")
        if self.evaluations < 1:
            raise UsageError("An ablation needs at least one evaluation.")


def systems_of(config: AblationConfig, latents: Path, out: Path, device: str) -> list[AblationRun]:
    """Return the runs of an ablation, the longest first, so that all workers end at about the same time."""
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
        # The evaluations need every checkpoint.
        varied = replace(varied, checkpoint_every=every, keep_last=0)
        further = "" if anisotropy is None else f"-a{anisotropy:g}"
        further += "" if width is None else f"-w{width}"
        run = out / "runs" / f"{prediction}-{loss_space}-p{patch_size}{further}-s{seed}"
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
    """Train one system, measure it along its training and draw its sample grid; what exists is kept."""
    train(system.config, LatentStore.open(system.latents), system.run, system.device)
    extractor = load_extractor(system.extractor, system.device, system.features_path or None)
    evaluate_run(system.run, system.evaluated_steps, str(system.reference), extractor, system.sample, system.device)
    last = open_checkpoint(step_folder(system.run, system.config.steps))
    draw_grid(last, system.sample, system.device, system.run / "samples" / "grid.png")


def ablate(config: AblationConfig, latents: Path, out: Path, workers: int | None, command: str) -> Ablation:
    """Run an ablation, or what is missing of it, and return what `ablation.json` holds.

    `command` repeats it. JLTError if the runs are not matched, Stopped on request.
    """
    store, device = LatentStore.open(latents), default_device()
    systems = systems_of(config, latents, out, device)
    check_matched([to_json(system.config) for system in systems], config)
    for system in systems:
        # Settings that no forecast covers are refused before anything is written.
        TrainingModel.of(system.config)
    workers = WORKERS[device] if workers is None else workers
    if workers < 1:
        raise UsageError(f"An ablation needs at least one worker, not {workers}.")
    claim(out, config, store)
    with lock_folder(out):
        images = config.reference or images_of(store)
        if not reference_path(config, out).exists():
            extractor = load_extractor(config.extractor, device, config.features_path or None)
            exif = (store.manifest.encoding or {}).get("exif", "ignore")
            open_reference(images, extractor, store.manifest.resolution, exif).save(reference_path(config, out))
        for patch_size, anisotropy in itertools.product(config.patch_size, config.anisotropy):
            store_in_coordinates(store, coordinates_folder(out, patch_size, anisotropy), patch_size, anisotropy)
        expected = forecasts(systems, _known_forecasts(out), device)
        ablation = replace(describe(config, systems, store, device), command=command, forecasts=expected)
        # Written before the work too, for reports on an ablation under way.
        write_result(out / Ablation.FILE, ablation)
        with AblationProgress(systems) as progress:
            run_jobs(run_system, systems, workers, progress.poll)
        seconds, matched = prove_matched(systems, config)
        ablation = replace(ablation, seconds=seconds, matched=matched)
        write_result(out / Ablation.FILE, ablation)
    return ablation


def reference_path(config: AblationConfig, out: Path) -> Path:
    """Return the file of the reference statistics, which may have to be measured first."""
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
    """Claim the folder for this ablation; JLTError if it holds other content, or an ablation with other settings.

    Points of the axes may be added later, because each is a run of its own.
    """
    settings = {key: value for key, value in to_json(config).items() if key not in GROWING}
    claim_folder(out, "plan.json", {"ablation": settings, "latents": store.identity()}, allowed=PREPARED)


def describe(config: AblationConfig, systems: Sequence[AblationRun], store: LatentStore, device: str) -> Ablation:
    """Return what is known of an ablation before its work is done."""
    return Ablation(
        title=config.title,
        recipe=config.recipe,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine(device),
        latents=to_json(store.identity()),
        autoencoder_psnr=store.manifest.autoencoder.get("held_out_psnr"),
        classifier_accuracy=load_extractor(config.extractor, "cpu", config.features_path or None).held_out_accuracy,
        systems=tuple(
            SystemRun(
                name=system.config.name,
                prediction=system.config.prediction,
                loss_space=system.config.loss.space,
                patch_size=system.config.network.patch_size,
                variant=system.variant,
                anisotropy=system.anisotropy,
                width=system.config.network.hidden_size,
                seed=system.config.seed,
                run=f"{system.run.parent.name}/{system.run.name}",
            )
            for system in systems
        ),
    )


def forecasts(
    systems: Sequence[AblationRun], known: Sequence[SettingForecast] = (), device: str = "cpu"
) -> tuple[SettingForecast, ...]:
    """Return what is expected of x, eps and v in every geometry, network and loss, before anything is trained.

    `known` are forecasts of the same ablation, which had fewer points on its axes.
    """
    found = {stored.setting: stored for stored in known}
    new = [system for system in systems if system.setting not in found]
    trained = {system.setting for system in systems if system.run.exists()}
    for latents in dict.fromkeys(system.latents for system in new):
        here = [system for system in new if system.latents == latents]
        sizes = list(dict.fromkeys(system.config.network.patch_size for system in here))
        estimates = token_estimates(LatentStore.open(latents), sizes, device)
        for system in here:
            estimate = estimates[system.config.network.patch_size]
            found.setdefault(system.setting, _forecast(system, estimate, system.setting not in trained))
    return tuple(found[setting] for setting in dict.fromkeys(system.setting for system in systems))


def _known_forecasts(out: Path) -> tuple[SettingForecast, ...]:
    """Return the forecasts that an ablation's folder holds for earlier points on its axes."""
    if not (out / Ablation.FILE).exists():
        return ()
    try:
        return read_result(Ablation, out / Ablation.FILE).forecasts
    except JLTError as error:
        inform(f"{error} The forecasts are computed again.")
        return ()


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


def prove_matched(systems: Sequence[AblationRun], config: AblationConfig) -> tuple[float, Matched]:
    """Return the seconds of all finished runs and what was found equal in them; JLTError if they are not matched."""
    ends = {system.run.name: open_checkpoint(step_folder(system.run, system.config.steps)) for system in systems}
    differs = check_matched([read_json(system.run / "config.json") for system in systems], config)
    states = {name: checkpoint.read_state() for name, checkpoint in ends.items()}
    draws = {name: state["draws"] for name, state in states.items()}
    weights = {name: state["initial_weights"] for name, state in states.items()}
    require_equal(systems, draws, "random draws", lambda system: system.config.seed)
    require_equal(systems, weights, "initial weights", lambda system: (system.config.seed, system.config.network))
    checked = (
        "every other setting",
        f"initial weights at equal patch size{', width' if config.width else ''} and seed",
        "sample order, times, noise seeds and label drops at equal seed",
    )
    seconds = sum(state["seconds"] for state in states.values())
    return seconds, Matched(checked, tuple(differs), weights, draws)


def require_equal(
    systems: Sequence[AblationRun], hashes: Mapping[str, str], what: str, group: Callable[[AblationRun], Hashable]
) -> None:
    """Raise a JLTError unless all runs of a group have the same hash."""
    seen: dict[Hashable, tuple[str, str]] = {}
    for system in systems:
        name = system.run.name
        other, value = seen.setdefault(group(system), (name, hashes[name]))
        if value != hashes[name]:
            raise JLTError(f"The runs {other} and {name} are not matched: their {what} differ.")
