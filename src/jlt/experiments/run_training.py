"""A training run as the command line starts it: in any number of processes, with those who watch it."""

from __future__ import annotations

import os
from pathlib import Path

from jlt.config import TrainConfig
from jlt.experiments.watchers import watchers_of
from jlt.latents.store import LatentStore
from jlt.runtime.environment import default_device
from jlt.runtime.processes import join_group
from jlt.runtime.progress import inform
from jlt.training.loop import train

LAUNCHER_SETTINGS = {"ACCELERATE_MIXED_PRECISION": "--precision", "ACCELERATE_USE_FSDP": "--parallel fsdp"}
"""What `accelerate launch` hands on to programs that are built on it, and our own words for it."""


def warn_ignored_settings() -> None:
    """Say which settings of a launcher have no effect here, where they ask for something."""
    for name, words in LAUNCHER_SETTINGS.items():
        if os.environ.get(name, "no").lower() not in ("no", "false", "0"):
            inform(f"The launcher's {name}={os.environ[name]} has no effect here: say {words}.")


def train_and_watch(config: TrainConfig, latents: Path, run: Path, verify: bool = False) -> Path:
    """Train a run, continuing what is there, and return the folder of its last checkpoint."""
    device = default_device()
    warn_ignored_settings()
    store = LatentStore.open(latents)
    with join_group(device) as group:
        if verify:
            group.on_rank0(lambda: LatentStore.open_verified(latents))
        watchers = watchers_of(config, store, device, group)
        return train(config, store, run, device, group, watchers)
