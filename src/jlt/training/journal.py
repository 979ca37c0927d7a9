"""What a run says of itself: to its log, to the person who watches it, and to trackers."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from jlt.config import TrainConfig
from jlt.runtime.progress import inform
from jlt.storage.files import open_unlinked, write_text
from jlt.training.display import TrainingDisplay, training_display
from jlt.training.trackers import open_trackers


class Journal:
    """Takes the events of a run in its first process; a context manager.

    `log.jsonl` gets one object per line, appended; lines after the step that the run continues from are dropped first.
    """

    def __init__(self, run: Path, config: TrainConfig, step: int) -> None:
        self._run, self._config = run, config
        self._path = run / "log.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            write_text(self._path, "".join(f"{line}\n" for line in kept))
        self._trackers = open_trackers(config, run, step)
        self._screen = contextlib.ExitStack()
        self._display: TrainingDisplay | None = None
        self._step = step

    def write(self, event: str, **values: Any) -> None:
        """Take an event; `values` holds its `step`."""
        descriptor = open_unlinked(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")
        self._track(event, values)
        self._show(event, values)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the screen to somebody else's progress for the duration of a block."""
        displayed = self._display is not None
        self._close_display()
        try:
            yield
        finally:
            if displayed:
                self._open_display()

    def show(self) -> None:
        """Begin to show the training."""
        self._open_display()

    def _track(self, event: str, values: Mapping[str, Any]) -> None:
        if event == "step":
            self._trackers.log(values["step"], {key: value for key, value in values.items() if key != "step"})
        elif event == "sampled":
            self._trackers.image(values["step"], "samples", self._run / values["file"])
        elif event == "evaluated":
            self._trackers.log(values["step"], {"evaluation": values["metrics"]})

    def _show(self, event: str, values: Mapping[str, Any]) -> None:
        if event == "step":
            self._step = values["step"]
            if self._display is not None:
                self._display.show(values)
        elif note := _note(event, values):
            (self._display.note if self._display is not None else inform)(note)

    def _open_display(self) -> None:
        shown = training_display(self._config.name, self._step, self._config.steps)
        self._display = self._screen.enter_context(shown)

    def _close_display(self) -> None:
        self._screen.close()
        self._display = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_display()
        self._trackers.close()


def _note(event: str, values: Mapping[str, Any]) -> str:
    """Return the line that stays on the screen for an event; empty where there is none."""
    if event == "saved":
        return f"Step {values['step']:,} is saved; training paused for {values['pause_seconds']:.2g} s."
    if event == "skipped":
        return f"{values['what']} The update is skipped."
    if event == "sampled":
        return f"Step {values['step']:,}: samples in {values['file']}"
    if event == "evaluated":
        return f"Step {values['step']:,}: Frechet distance {values['metrics']['frechet_distance']:.4g}"
    if event == "failed":
        return f"Step {values['step']:,}: {values['error']} The training goes on."
    return ""


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        # The last line of a killed run may be torn.
        return float("inf")
