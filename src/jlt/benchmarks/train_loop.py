"""The training loop against its bare update: speed, waiting for data, the pause of a save, and growth of memory."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlt.benchmarks.data import SHARD_ROWS, random_shards
from jlt.benchmarks.plan import count_network
from jlt.config import TrainConfig, in_steps
from jlt.errors import UsageError
from jlt.latents.store import LatentStore, write_store
from jlt.runtime.processes import Group
from jlt.runtime.progress import inform
from jlt.storage.rows import require_space
from jlt.training.loop import Watcher, train

WINDOWS = 4
"""Lines of the log. The first warms up, the next ones give the speed, and a checkpoint is saved at the last two."""
MOST_LATENTS = 4000


class SavesOnce(Watcher):
    """Requests a checkpoint at one step: training waits until it is written, so that the next one need not."""

    def __init__(self, step: int) -> None:
        self.step = step

    def due(self, step: int) -> bool:
        """Whether this is the step."""
        return step == self.step

    def look(self, checkpoint: Path, group: Group) -> None:
        """Do nothing."""


def benchmark_loop(config: TrainConfig, steps: int, bare: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Train on a temporary store of random latents, and read speed, waiting, pause and memory from the run's log.

    `bare` is what the update alone measured, with its `img_per_second`. The pause is that of the second save: the first
    may wait until its buffers are made. Errors are those of `jlt.training.loop.train`.
    """
    inform(f"training {config.name} for {steps} steps at batch size {config.batch_size}")
    config = loop_config(config, steps)
    with tempfile.TemporaryDirectory(prefix="jlt-benchmark-") as temporary:
        store = random_store(Path(temporary) / "latents", config)
        config = in_steps(config, len(store))
        train(config, store, Path(temporary) / "run", device, watchers=[SavesOnce(config.steps - config.log_every)])
        log = (Path(temporary) / "run" / "log.jsonl").read_text(encoding="utf-8")
    return loop_figures([json.loads(line) for line in log.splitlines()], bare["img_per_second"])


def loop_figures(log: Sequence[Mapping[str, Any]], bare_img_per_second: float) -> dict[str, Any]:
    """Return the figures of a log of `WINDOWS` lines with two saves.

    img_per_second, waiting (share of the time, 0 to 1) and ratio (loop over bare update) are those of the windows in
    which nothing was warmed up or saved; pauses are in seconds, and growth is that of resident memory in MiB from the
    first line to the last (None where the system does not say).
    """
    lines = [entry for entry in log if entry["event"] == "step"]
    saves = [entry for entry in log if entry["event"] == "saved"]
    undisturbed = lines[1:-1]
    # The windows are of equally many steps: their mean speed is a harmonic one, and their times go as its inverse.
    speed = statistics.harmonic_mean([line["img_per_second"] for line in undisturbed])
    waited = sum(line["waiting"] / line["img_per_second"] for line in undisturbed)
    first, last = (line.get("resident_gib") for line in (lines[0], lines[-1]))
    return {
        "steps": lines[-1]["step"],
        "img_per_second": speed,
        "ratio": speed / bare_img_per_second,
        "waiting": waited / sum(1 / line["img_per_second"] for line in undisturbed),
        "first_pause_seconds": saves[0]["pause_seconds"],
        "pause_seconds": saves[1]["pause_seconds"],
        "write_seconds": saves[1]["write_seconds"],
        "growth_mib": None if first is None or last is None else (last - first) * 1024,
        "growth_steps": lines[-1]["step"] - lines[0]["step"],
    }


def loop_config(config: TrainConfig, steps: int) -> TrainConfig:
    """Return a training of `WINDOWS` log lines that saves at its end; UsageError for fewer steps than that."""
    if steps < WINDOWS:
        raise UsageError(f"The training loop is measured over at least {WINDOWS} steps, or 0 to leave it out.")
    window = steps // WINDOWS
    total = window * WINDOWS
    return dataclasses.replace(
        config, steps=total, log_every=window, checkpoint_every=total, snapshot_every=total + 1, keep_last=1
    )


def random_store(folder: Path, config: TrainConfig) -> LatentStore:
    """Write random latents for a network, no more than its training reads, and open them."""
    network, count = config.network, _latents(config.batch_size, config.steps)
    shape = (network.channels, network.height, network.width)
    write_store(folder, random_shards(count, shape, SHARD_ROWS, network.num_classes), network.num_classes)
    return LatentStore.open(folder)


def require_room(configs: Sequence[TrainConfig], batch_sizes: Sequence[int], steps: int) -> None:
    """Raise a JLTError unless the disk has space for the largest store with two checkpoints, and steps suffice."""
    needed = 0
    for config in configs:
        network = loop_config(config, steps).network
        # Weights, two moments and the averages, twice: an old checkpoint is removed when the new one is complete.
        checkpoints = 2 * 4 * count_network(network).parameters * (3 + len(config.ema) + len(config.power_ema))
        latents = 2 * 2 * math.prod((network.channels, network.height, network.width))
        needed = max(needed, checkpoints + latents * _latents(max(batch_sizes), steps))
    what = "The files of the training loop (none with --loop-steps 0)"
    require_space(Path(tempfile.gettempdir()), needed, what)


def _latents(batch_size: int, steps: int) -> int:
    return min(MOST_LATENTS, batch_size * steps)
