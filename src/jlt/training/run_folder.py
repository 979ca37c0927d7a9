"""The run folder: its configuration, and the conditions for resuming it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlt.config import TrainConfig
from jlt.errors import JLTError
from jlt.storage.codec import to_json
from jlt.storage.files import claim_folder, difference, format_difference
from jlt.training.checkpoint import Checkpoint

FREE_TO_CHANGE = {
    *("name", "max_skipped", "micro_batch_size", "accumulation", "parallel", "compile", "gradient_checkpointing"),
    *("log_every", "checkpoint_every", "keep_last", "keep_every", "snapshot_every"),
    *("sample_every", "evaluate_every", "evaluation", "tensorboard", "wandb"),
}
"""Settings of how a run is executed, saved and watched; a resumed run may change them."""


def free_to_change(config: TrainConfig) -> set[str]:
    """Return the settings that a resumed run may change; a cosine schedule fixes the length."""
    return FREE_TO_CHANGE | ({"steps"} if config.optimizer.schedule == "constant" else set())


def resolved(config: TrainConfig, latents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a run: configuration and latents, as JSON values."""
    return json.loads(json.dumps({**to_json(config), "latents": dict(latents)}))


def prepare_run(run: Path, config: TrainConfig, latents: Mapping[str, Any]) -> None:
    """Create a run folder, or check that an existing one is of the same run; a JLTError shows the difference."""
    claim_folder(run, "config.json", resolved(config, latents), free=free_to_change(config))


def require_same_run(checkpoint: Checkpoint, config: TrainConfig, latents: Mapping[str, Any]) -> None:
    """Raise a JLTError if a checkpoint's configuration or latents are not those of the resumed run."""
    free = free_to_change(config)
    old, new = (
        {key: value for key, value in side.items() if key not in free}
        for side in (resolved(checkpoint.config, checkpoint.latents), resolved(config, latents))
    )
    if differences := difference(old, new):
        raise JLTError(f"{checkpoint.folder} is of another run, which differs in: {format_difference(differences)}.")
