"""Matched ablations: the same run with another prediction, loss space, patch size or seed, and nothing else changed.

An ablation folder holds `plan.json`, `runs/`, `reference.npz`, `ablation.json`, and `coordinates/` if the geometry of
the latents is an axis. Run the same command again to resume: every part that exists is kept.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jlt.config import TrainConfig
from jlt.errors import JLTError, UsageError
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.reference import features_for
from jlt.evaluation.suite import require_enough
from jlt.experiments.ablation_plan import GROWING, AblationConfig, AblationRun, coordinates_folder, systems_of
from jlt.experiments.checkpoint_evaluation import draw_grid, evaluate_run, images_of, reference_of
from jlt.experiments.coordinate_stores import store_in_coordinates
from jlt.experiments.run_training import check_sampling
from jlt.geometry.forecast import Estimate, forecast
from jlt.geometry.tokens import token_estimates
from jlt.latents.manifest import StoreManifest
from jlt.latents.store import LatentStore
from jlt.networks.transformer import forward_flops, training_flops
from jlt.results.ablation import Ablation, Matched, SystemRun
from jlt.results.evaluation import Evaluation
from jlt.results.files import read_result, write_result
from jlt.results.geometry import SettingForecast, TrainingModel
from jlt.results.run import LOG, evaluation_files, newest_step, read_config
from jlt.runtime.environment import default_device, device_of_float64, machine
from jlt.runtime.progress import bar, inform
from jlt.runtime.workers import SharedSteps, run_jobs, shared_steps
from jlt.sampling.solvers import network_evaluations
from jlt.storage.codec import to_json
from jlt.storage.files import difference, read_marker, recorded, work_of
from jlt.storage.folders import Claim, require_unlinked
from jlt.storage.seals import is_intact
from jlt.training.checkpoint import open_checkpoint, step_folder
from jlt.training.loop import train

WORKERS = {"cpu": 2, "mps": 1, "cuda": 1}
"""Systems that are trained at once: two processes of one thread suffer less from other programs than two threads."""
PREPARED = {"quickstart.json", "latents", "geometry.json"}
"""What a folder may hold before its ablation begins."""
AXES = {"name", "prediction", "loss.space", "network.patch_size", "seed"}
"""Settings in which the systems of an ablation may differ."""
FURTHER_AXES = {
    "width": ("network.hidden_size", "network.num_heads"),
    "anisotropy": ("latents.autoencoder.normalisation.coordinates", "latents.manifest_sha256"),
    "weighting": ("loss.weighting",),
    "times": ("timesteps.distribution",),
}
"""Further settings that differ along optional axes: all that begin with these names."""


def run_system(system: AblationRun) -> None:
    """Train one system, measure it along its training and draw its sample grid; what exists is kept."""
    ablation, device = system.ablation, default_device()
    train(system.config, LatentStore.open(system.latents), system.run, device)
    extractor = load_extractor(ablation.extractor, device, ablation.features_path or None)
    evaluate_run(system.run, system.evaluated_steps, str(system.reference), extractor, ablation.sample, device)
    last = open_checkpoint(step_folder(system.run, system.config.steps))
    draw_grid(last, ablation.sample, device, system.run / "samples" / "grid.png")


@contextlib.contextmanager
def show_progress(systems: Sequence[AblationRun], steps: SharedSteps) -> Iterator[Callable[[], None]]:
    """Show how much of all arithmetic is done, from the steps and evaluations of all; yield what shows it again."""
    wanted = sum(system.config.steps for system in systems)
    total = sum(_work(system, system.config.steps, len(system.evaluated_steps)) for system in systems)
    with bar("training and evaluating", total) as shown:

        def show() -> None:
            done, made, active = 0.0, 0, []
            for place, system in enumerate(systems):
                step, evaluated = max(steps[place], newest_step(system.run / LOG)), _evaluated(system)
                done, made = done + _work(system, step, evaluated), made + step
                evaluations = len(system.evaluated_steps)
                if step == system.config.steps and evaluated < evaluations:
                    active.append(f"{system.config.name} evaluation {evaluated + 1}/{evaluations}")
                elif 0 < step < system.config.steps:
                    active.append(f"{system.config.name} {step}/{system.config.steps}")
            shown.show(done, ", ".join([f"step {made:,} of {wanted:,}", *active]))

        show()
        yield show


def _work(system: AblationRun, steps: int, evaluations: int) -> float:
    """Return the arithmetic of some steps and evaluations, in operations."""
    network, sample = system.config.network, system.ablation.sample
    evaluation = forward_flops(network) * network_evaluations(sample.solver, sample.steps) * sample.num
    return training_flops(network) * system.config.batch_size * steps + evaluation * evaluations


def _evaluated(system: AblationRun) -> int:
    """Return how many of the ablation's own steps are measured; the run may have further evaluations."""
    found = {path.name.partition("-")[0] for path in evaluation_files(system.run)}
    return len(found & {f"step_{step:07d}" for step in system.evaluated_steps})


def ablate(
    config: AblationConfig,
    latents: Path,
    out: Path,
    workers: int | None,
    command: str,
    check: Callable[[Sequence[TrainConfig], StoreManifest, str, int, int], None] | None = None,
) -> Ablation:
    """Run an ablation, or what is missing of it, and return what `ablation.json` holds.

    `command` repeats it. `check(configs, manifest, device, processes, workers)` may refuse the trainings.

    JLTError if the runs are not matched, and for a folder that holds other content or an ablation
    with other settings. Stopped on request.
    """
    store, device = LatentStore.open(latents), default_device()
    systems = systems_of(config, latents, out)
    check_matched([to_json(system.config) for system in systems], config)
    for system in systems:
        # Settings that no forecast covers are refused before anything is written.
        TrainingModel.of(system.config)
    real_images = lambda: config.reference or images_of(store.identity())  # noqa: E731
    config = replace(config, extractor=features_for(config.extractor, real_images))
    systems = systems_of(config, latents, out)
    # Points of the axes may be added later, because each is a run of its own.
    settings = {key: value for key, value in to_json(config).items() if key not in GROWING}
    plan = {"ablation": settings, "latents": store.identity()}
    if finished := _finished(out, systems, plan):
        return finished
    check_sampling(systems[0].config, config.sample, store, device)
    require_enough(config.sample.num)
    workers = worker_count(workers, device)
    if check is not None:
        check([system.config for system in systems], store.manifest, device, 1, workers)
    claim = Claim(out, "plan.json", plan, allowed=PREPARED)
    with claim.hold():
        extractor = load_extractor(config.extractor, device, config.features_path or None)
        place = config.reference_path(out)
        measured = place.exists()
        images = str(place) if measured else config.reference
        reference = reference_of(store.identity(), images, extractor, store.manifest.resolution)
        for folder in ("coordinates", "runs", *(f"runs/{system.run.name}" for system in systems)):
            require_unlinked(out, out / folder)
        claim.begin()
        if not measured:
            reference.save(place)
        for patch_size, anisotropy in itertools.product(config.patch_size, config.anisotropy):
            store_in_coordinates(store, coordinates_folder(out, patch_size, anisotropy), patch_size, anisotropy)
        expected = forecasts(systems, _known_forecasts(out), device_of_float64(device))
        ablation = replace(describe(config, systems, store, device), command=command, forecasts=expected)
        # Written before the work too, for reports on an ablation under way.
        write_result(out / Ablation.FILE, ablation)
        steps = shared_steps(len(systems))
        with show_progress(systems, steps) as show:
            run_jobs(run_system, systems, workers, show, steps)
        seconds, matched = prove_matched(systems, config)
        ablation = replace(ablation, seconds=seconds, matched=matched)
        write_result(out / Ablation.FILE, ablation)
    return ablation


def worker_count(workers: int | None, device: str) -> int:
    """Return how many systems are trained at once, by default those of the device; UsageError for fewer than one."""
    workers = WORKERS[device] if workers is None else workers
    if workers < 1:
        raise UsageError(f"An ablation needs at least one worker, not {workers}.")
    return workers


def _finished(out: Path, systems: Sequence[AblationRun], plan: Mapping[str, Any]) -> Ablation | None:
    """Return the result of an ablation of these systems if all its files exist; None if there is anything to do."""
    files = [out / "plan.json", out / Ablation.FILE]
    for system in systems:
        files += [step_folder(system.run, system.config.steps), system.run / "samples" / "grid.png"]
    if not all(path.exists() for path in files):
        return None
    try:
        if difference(read_marker(files[0])[0], recorded(plan)):
            return None
        found = read_result(Ablation, files[1])
        for system in systems:
            for path in evaluation_files(system.run):
                read_result(Evaluation, path)
            grid = system.run / "samples" / "grid.png"
            if not is_intact(grid, grid.name, work_of(system.run)):
                return None
    except JLTError:
        return None
    measured = all(_evaluated(system) == len(system.evaluated_steps) for system in systems)
    runs = {system.run for system in found.systems}
    if not (measured and found.matched and runs == {str(system.run.relative_to(out)) for system in systems}):
        return None
    inform(f"{out} is already finished.")
    return found


def check_matched(configs: Sequence[Mapping[str, Any]], ablation: AblationConfig) -> list[str]:
    """Return the settings in which runs differ; JLTError if any is not an axis of the ablation."""
    differs = set()
    for config in configs[1:]:
        differs |= {found.key for found in difference(configs[0], config)}
    further = tuple(name for axis, names in FURTHER_AXES.items() if getattr(ablation, axis) for name in names)
    axes = AXES | {name for name in differs if name.startswith(further)}
    if not differs <= axes:
        raise JLTError(f"The runs are not matched: they also differ in {', '.join(sorted(differs - axes))}.")
    return sorted(differs - {"name"})


def describe(config: AblationConfig, systems: Sequence[AblationRun], store: LatentStore, device: str) -> Ablation:
    """Return what is known of an ablation before its work is done."""
    return Ablation(
        title=config.title,
        recipe=config.recipe,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=machine(device),
        latents=to_json(store.identity()),
        autoencoder_psnr=None if config.sample.decoder else store.manifest.autoencoder.get("held_out_psnr"),
        classifier_accuracy=load_extractor(config.extractor, "cpu", config.features_path or None).held_out_accuracy,
        systems=tuple(
            SystemRun(
                name=system.config.name,
                prediction=system.config.prediction,
                loss_space=system.config.loss.space,
                patch_size=system.config.network.patch_size,
                variant=system.variant,
                anisotropy=system.point["anisotropy"],
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
    """Return what is expected of every prediction in every geometry, network and loss, before anything is trained.

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
    model = TrainingModel.of(train, system.ablation.prediction)
    found = forecast([estimate.in_units_of(train.noise_scale**2)], model, [network.hidden_size])
    return SettingForecast.of(
        found,
        variant=system.variant,
        anisotropy=system.point["anisotropy"],
        patch_size=network.patch_size,
        loss_space=train.loss.space,
        width=network.hidden_size,
        dimension=network.channels * network.patch_size**2,
        before_training=before_training,
    )


def prove_matched(systems: Sequence[AblationRun], config: AblationConfig) -> tuple[float, Matched]:
    """Return the seconds of all finished runs and what was found equal in them; JLTError if they are not matched."""
    ends = {system.run.name: open_checkpoint(step_folder(system.run, system.config.steps)) for system in systems}
    differs = check_matched([read_config(system.run)[1] for system in systems], config)
    states = {name: checkpoint.read_state() for name, checkpoint in ends.items()}
    draws = {name: state.draws for name, state in states.items()}
    weights = {name: state.initial_weights for name, state in states.items()}
    require_equal(systems, draws, "random draws", lambda system: (system.config.seed, system.config.timesteps))
    require_equal(systems, weights, "initial weights", lambda system: (system.config.seed, system.config.network))
    checked = (
        "every other setting",
        f"initial weights at equal patch size{', width' if config.width else ''} and seed",
        f"sample order, times, noise seeds and label drops at equal seed{' and distribution' if config.times else ''}",
    )
    seconds = sum(state.seconds for state in states.values())
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
