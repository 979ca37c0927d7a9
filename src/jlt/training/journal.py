"""What a run says of itself: to its log, to the person who watches it, and to trackers."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from jlt.config import TrainConfig
from jlt.files import write_text


class Journal:
    """`log.jsonl`, one object per line, appended; lines after a resumed step are dropped first. A context manager."""

    def __init__(self, run: Path, config: TrainConfig, step: int) -> None:
        self._path = run / "log.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_text(self._path, "".join(f"{line}\n" for line in kept))

    def write(self, event: str, **values: Any) -> None:
        """Append one event; `values` holds its `step`."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        # The last line of a killed run may be torn.
        return float("inf")
