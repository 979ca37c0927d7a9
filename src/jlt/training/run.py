"""The run folder: its configuration, its log, and what may be continued in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlt.config import TrainConfig, difference, to_dict
from jlt.errors import JLTError
from jlt.files import read_json, write_json, write_text

FREE_TO_CHANGE = {"name", "steps", "log_every", "checkpoint_every"}
"""Settings that do not enter the arithmetic of a step, so that a run may continue with others."""


def prepare_run(run: Path, config: TrainConfig, latents: Mapping[str, Any]) -> None:
    """Create a run folder, or make sure that an existing one is this same run; a JLTError shows what differs."""
    path = run / "config.json"
    resolved = {**to_dict(config), "latents": dict(latents)}
    if path.is_file():
        stored = read_json(path)
        lines = difference(_arithmetic(stored), _arithmetic(resolved))
        if lines:
            raise JLTError(f"{run} holds another run, which differs in: {'; '.join(lines)}. Choose another folder.")
    elif run.exists() and any(run.iterdir()):
        raise JLTError(f"{run} exists and is not a run: choose an empty or new folder.")
    write_json(path, resolved)


def _arithmetic(resolved: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in resolved.items() if key not in FREE_TO_CHANGE}


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
