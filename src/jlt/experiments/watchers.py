"""Those who look at a run while it goes on: grids of samples from the same noise, and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jlt.config import EvaluationConfig, TrainConfig
from jlt.errors import unknown_name
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.real_images import open_reference
from jlt.evaluation.suite import require_enough
from jlt.experiments.checkpoint_evaluation import (
    draw_grid,
    drawn_folder,
    evaluate_sampler,
    evaluation_path,
    images_of,
    remove_stale,
    sampler_protocol,
    write_evaluation,
)
from jlt.latents.store import LatentStore
from jlt.runtime.processes import Group, stop_together
from jlt.sampling.sampler import check_guidance, matching_autoencoder, open_sampler
from jlt.training.checkpoint import MANIFEST, average_names, open_checkpoint
from jlt.training.loop import Watcher
from jlt.training.power_ema import SIGMA_REL, parse_sigma_rel


def watchers_of(config: TrainConfig, store: LatentStore, device: str, group: Group) -> list[Watcher]:
    """Return those whom a run asks for; JLTError, said once, for a reference that cannot be had."""
    if config.sample_every or config.evaluate_every:
        group.on_rank0(lambda: check_sampling(config, store, device))
    watchers: list[Watcher] = []
    if config.sample_every:
        watchers.append(GridWatcher(config, device))
    if config.evaluate_every:
        watchers.append(EvaluationWatcher(config, device, store, group))
    return watchers


def check_sampling(config: TrainConfig, store: LatentStore, device: str) -> None:
    """Raise a JLTError if the samples that a run asks for cannot be drawn of it."""
    sample = config.evaluation.sample
    known = [*average_names(config), "none", ""]
    if sample.ema not in known and not (sample.ema.startswith(SIGMA_REL) and config.power_ema):
        raise unknown_name("EMA in this run", sample.ema, known[:-1])
    if sample.ema.startswith(SIGMA_REL):
        parse_sigma_rel(sample.ema)
    check_guidance(config, sample)
    if config.evaluate_every:
        require_enough(sample.num)
    if sample.autoguide:
        open_checkpoint(Path(sample.autoguide))
    matching_autoencoder(store.manifest.autoencoder, None, device)


class GridWatcher(Watcher):
    """Draws a grid of samples, from the same noise and labels each time."""

    def __init__(self, config: TrainConfig, device: str) -> None:
        self._every, self._last = config.sample_every, config.steps
        self._sample, self._device = config.evaluation.sample, device

    def due(self, step: int) -> bool:
        """Whether a grid is drawn at this step."""
        return step > 0 and (step % self._every == 0 or step == self._last)

    def look(self, checkpoint: Path, group: Group) -> dict[str, Any] | None:
        """Draw a checkpoint's grid into the run, unless it is there, in the first process."""
        return group.on_rank0(lambda: self._draw(checkpoint))

    def _draw(self, checkpoint: Path) -> dict[str, Any] | None:
        opened = open_checkpoint(checkpoint)
        path = opened.run / "samples" / f"{checkpoint.name}.png"
        if path.exists() and path.stat().st_mtime >= (checkpoint / MANIFEST).stat().st_mtime:
            return None
        draw_grid(opened, self._sample, self._device, path)
        return {"event": "sampled", "file": f"samples/{path.name}"}


class EvaluationWatcher(Watcher):
    """Measures samples against the reference, as `jlt evaluate` does, in all processes."""

    def __init__(self, config: TrainConfig, device: str, store: LatentStore, group: Group) -> None:
        """Measure or read the reference at once."""
        self._every, self._last, self._device = config.evaluate_every, config.steps, device
        self._config: EvaluationConfig = config.evaluation
        self._extractor = load_extractor(self._config.features, device, self._config.features_path or None)
        words = self._config.reference or images_of(store)
        exif = (store.manifest.encoding or {}).get("exif", "ignore")
        self._reference = open_reference(words, self._extractor, store.manifest.resolution, exif, group)

    def due(self, step: int) -> bool:
        """Whether the checkpoint of this step is measured."""
        return step > 0 and (step % self._every == 0 or step == self._last)

    def look(self, checkpoint: Path, group: Group) -> dict[str, Any] | None:
        """Measure a checkpoint and write the result into its run, unless it is there."""
        with stop_together(group):
            opened = open_checkpoint(checkpoint)
            sampler = open_sampler(opened, self._config.sample, self._device)
            path = evaluation_path(opened.run, opened.step, sampler_protocol(sampler, self._reference, self._extractor))
        group.on_rank0(lambda: remove_stale(opened.run, opened))
        if group.on_rank0(path.exists):
            return None
        result = evaluate_sampler(sampler, self._reference, self._extractor, drawn_folder(opened.run), group)
        group.on_rank0(lambda: write_evaluation(opened.run, result))
        return {"event": "evaluated", "file": f"evaluations/{path.name}", "metrics": result["metrics"]}
