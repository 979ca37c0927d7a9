"""The run folder: its configuration, its log, and what may be continued in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlt.config import TrainConfig, to_dict
from jlt.errors import JLTError
from jlt.files import claim_folder, difference, write_text
from jlt.training.checkpoint import Checkpoint

FREE_TO_CHANGE = {"name", "steps", "log_every", "checkpoint_every"}
"""Settings that do not enter the arithmetic of a step, so that a run may continue with others."""


def resolved(config: TrainConfig, latents: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that makes a run this run, as JSON values."""
    return json.loads(json.dumps({**to_dict(config), "latents": dict(latents)}))


def prepare_run(run: Path, config: TrainConfig, latents: Mapping[str, Any]) -> None:
    """Create a run folder, or make sure that an existing one is this same run; a JLTError shows what differs."""
    claim_folder(run, "config.json", resolved(config, latents), free=FREE_TO_CHANGE)


def require_same_run(checkpoint: Checkpoint, config: TrainConfig, latents: Mapping[str, Any]) -> None:
    """Raise a JLTError if a checkpoint's configuration or latents are not those of the run that wants to continue."""
    lines = difference(resolved(checkpoint.config, checkpoint.latents), resolved(config, latents))
    bound = [line for line in lines if line.partition(":")[0] not in FREE_TO_CHANGE]
    if bound:
        raise JLTError(f"{checkpoint.folder} is of another run, which differs in: {'; '.join(bound)}.")


class RunLog:
    """`log.jsonl`: one object per line, appended; lines after a resumed step are dropped first."""

    def __init__(self, run: Path, resumed_step: int) -> None:
        self.path = run / "log.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= resumed_step]
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, event: str, **values: Any) -> None:
        """Append one event."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        # The last line of a killed run may be torn.
        return float("inf")
