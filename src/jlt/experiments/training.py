"""A training run as the command line starts it: in any number of processes, with those who watch it."""

from __future__ import annotations

from pathlib import Path

from jlt.config import TrainConfig, in_steps
from jlt.data.store import LatentStore
from jlt.experiments.watch import watchers_of
from jlt.processes import joined
from jlt.protocol import default_device
from jlt.training.loop import train


def train_and_watch(config: TrainConfig, latents: Path, run: Path, verify: bool = False) -> Path:
    """Train a run, continuing what is there, and return the folder of its last checkpoint."""
    device = default_device()
    store = LatentStore.open(latents)
    with joined(device) as group:
        if verify:
            group.on_first(lambda: LatentStore.open_verified(latents))
        config = in_steps(config, len(store))
        watchers = watchers_of(config, store, device, first=group.rank == 0)
        return train(config, store, run, device, group, watchers)
