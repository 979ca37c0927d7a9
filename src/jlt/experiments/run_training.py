"""A training run as the command line starts it, in any number of processes, with its watchers.

Watchers look at checkpoints during the training: they draw grids of samples from the same noise, and evaluate.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jlt.config import SampleConfig, TrainConfig
from jlt.errors import JLTError, unknown_name
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.suite import require_enough
from jlt.experiments.checkpoint_evaluation import GRID_COLUMNS, draw_grid, evaluate_once, grid_rows, reference_of
from jlt.latents.manifest import StoreManifest
from jlt.latents.store import LatentStore
from jlt.networks.transformer import forward_flops, training_flops
from jlt.runtime.environment import default_device
from jlt.runtime.processes import Group, join_group, stop_together
from jlt.runtime.progress import inform
from jlt.sampling.labels import number_labels
from jlt.sampling.sampler import check_guidance, matching_autoencoder, open_sampler
from jlt.sampling.solvers import network_evaluations
from jlt.storage.codec import to_json
from jlt.storage.files import work_of
from jlt.storage.seals import is_intact
from jlt.training.checkpoint import MANIFEST, average_names, open_checkpoint
from jlt.training.loop import Watcher, train
from jlt.training.power_ema import SIGMA_REL, parse_sigma_rel

LAUNCHER_SETTINGS = {"ACCELERATE_MIXED_PRECISION": "--precision", "ACCELERATE_USE_FSDP": "--parallel fsdp"}
"""Environment variables that `accelerate launch` sets, and the arguments of jlt that replace them."""


FAST_DECODERS = ("tiny", "taef2", "pixels")
"""Autoencoders that decode a grid in seconds on a CPU."""
CHEAP = 0.05
"""Share of the arithmetic of a training that sample grids may take by default."""


def warn_ignored_settings() -> None:
    """Print a warning for each setting of a launcher that has no effect."""
    for name, option in LAUNCHER_SETTINGS.items():
        if os.environ.get(name, "no").lower() not in ("no", "false", "0"):
            inform(f"The launcher's {name}={os.environ[name]} has no effect: use {option} instead.")


def train_and_watch(
    config: TrainConfig,
    latents: Path,
    run: Path,
    verify: bool = False,
    check: Callable[[StoreManifest, str, int], None] = lambda *_: None,
) -> Path:
    """Train a run, or resume it, and return the folder of its last checkpoint.

    `check` may refuse a training of these latents on a device, by so many processes, before anything is written.
    """
    device = default_device()
    warn_ignored_settings()
    store = LatentStore.open(latents)
    with join_group(device) as group:
        group.on_rank0(lambda: check(store.manifest, device, group.size))
        if verify:
            group.on_rank0(lambda: LatentStore.open_verified(latents))
        watchers = watchers_of(config, store, device, group)
        return train(config, store, run, device, group, watchers)


def watchers_of(config: TrainConfig, store: LatentStore, device: str, group: Group) -> list[Watcher]:
    """Return the watchers of a run's configuration; JLTError, printed once, for a reference that cannot be opened."""
    if not config.sample_every:
        config = dataclasses.replace(
            config, sample_every=group.on_rank0(lambda: affordable_grids(config, store, device))
        )
    if config.sample_every or config.evaluate_every:
        group.on_rank0(lambda: check_sampling(config, config.evaluation.sample, store, device))
        if config.evaluate_every:
            require_enough(config.evaluation.sample.num)
    watchers = [grid_watcher(config, device)] if config.sample_every else []
    return watchers + ([evaluation_watcher(config, device, store, group)] if config.evaluate_every else [])


def affordable_grids(config: TrainConfig, store: LatentStore, device: str) -> int:
    """Return the steps between sample grids that cost next to nothing: those of checkpoints, all steps, or 0 for none.

    A decoder that is missing, or slow on a CPU, means none.
    """
    if torch.device(device).type == "cpu" and store.manifest.autoencoder["name"] not in FAST_DECODERS:
        return 0
    sample = config.evaluation.sample
    images = GRID_COLUMNS * grid_rows(config.network)
    drawing = images * network_evaluations(sample.solver, sample.steps) * forward_flops(config.network)
    every = [min(config.checkpoint_every, config.steps), config.steps]
    a_step = config.batch_size * training_flops(config.network)
    affordable = next((steps for steps in every if drawing <= CHEAP * steps * a_step), 0)
    if affordable:
        try:
            check_sampling(config, sample, store, device)
        except JLTError:
            return 0
    return affordable


def check_sampling(config: TrainConfig, sample: SampleConfig, store: LatentStore, device: str) -> None:
    """Raise a JLTError if a run cannot be sampled with these settings."""
    labels = number_labels(sample.labels, store.class_names, config.network.num_classes)
    known = [*average_names(config), "none", ""]
    if sample.ema not in known and not (sample.ema.startswith(SIGMA_REL) and config.power_ema):
        raise unknown_name("EMA in this run", sample.ema, known[:-1])
    if sample.ema.startswith(SIGMA_REL):
        parse_sigma_rel(sample.ema)
    check_guidance(config, dataclasses.replace(sample, labels=labels))
    if sample.autoguide:
        open_checkpoint(Path(sample.autoguide))
    matching_autoencoder(store.manifest.autoencoder, None, device, sample.decoder, store.folder)


def grid_watcher(config: TrainConfig, device: str) -> Watcher:
    """Return what draws a grid of samples, from the same noise and labels each time, unless it exists."""

    def draw(checkpoint: Path) -> dict[str, Any] | None:
        opened = open_checkpoint(checkpoint)
        path = opened.run / "samples" / f"{checkpoint.name}.png"
        made = path.exists() and path.stat().st_mtime >= (checkpoint / MANIFEST).stat().st_mtime
        if made and is_intact(path, path.name, work_of(opened.run)):
            return None
        draw_grid(opened, config.evaluation.sample, device, path)
        return {"event": "sampled", "file": f"samples/{path.name}"}

    due = _at_intervals(config.sample_every, config.steps)
    return Watcher(due, lambda checkpoint, group: group.on_rank0(lambda: draw(checkpoint)))


def evaluation_watcher(config: TrainConfig, device: str, store: LatentStore, group: Group) -> Watcher:
    """Return what measures samples in all processes, as `jlt evaluate` does; measure or read the reference now."""
    settings = config.evaluation
    extractor = load_extractor(settings.features, device, settings.features_path or None)
    reference = reference_of(store.identity(), settings.reference, extractor, store.manifest.resolution, group)

    def evaluate(checkpoint: Path, group: Group) -> dict[str, Any] | None:
        with stop_together(group):
            sampler = open_sampler(open_checkpoint(checkpoint), settings.sample, device)
        found = evaluate_once(sampler, reference, extractor, group)
        if found is None:
            return None
        path, evaluation = found
        return {"event": "evaluated", "file": f"evaluations/{path.name}", "metrics": to_json(evaluation.metrics)}

    return Watcher(_at_intervals(config.evaluate_every, config.steps), evaluate)


def _at_intervals(every: int, last: int) -> Callable[[int], bool]:
    return lambda step: step > 0 and (step % every == 0 or step == last)
