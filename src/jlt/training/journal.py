"""The journal of a run: its events go to its log, to the screen and to trackers."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from jlt.config import TrainConfig
from jlt.runtime.progress import Bar, bar, inform
from jlt.storage.files import open_unlinked, write_text
from jlt.training.display import NOTES, figures
from jlt.training.trackers import open_trackers


class Journal:
    """Takes the events of a run in its first process, and ignores those of the others; a context manager.

    `log.jsonl` gets one object per line. Lines after the step from which the run resumes are dropped first.
    """

    def __init__(self, run: Path, config: TrainConfig, step: int, rank: int) -> None:
        self._run, self._config, self._step, self._active = run, config, step, rank == 0
        self._log = run / "log.jsonl"
        self._bar: Bar | None = None
        """The bar, while the training is on the screen."""
        self._shown = False
        if self._active:
            lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                write_text(self._log, "".join(f"{line}\n" for line in kept))
            self._trackers = open_trackers(config, run, step)

    def write(self, event: str, **values: Any) -> None:
        """Take an event; `values` holds its `step`."""
        if not self._active:
            return
        descriptor = open_unlinked(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")
        step = values["step"]
        if event == "step":
            self._step = step
            self._trackers.log(step, {key: value for key, value in values.items() if key != "step"})
            if self._bar is not None:
                # The first and the last step are shown wherever the output goes.
                self._bar.show(step, figures(values), force=not self._shown or step == self._config.steps)
                self._shown = True
        elif event == "sampled":
            self._trackers.image(step, "samples", self._run / values["file"])
        elif event == "evaluated":
            self._trackers.log(step, {"evaluation": values["metrics"]})
        if event in NOTES:
            inform(NOTES[event](values))

    def show(self) -> None:
        """Begin to show the training on the screen."""
        if self._active:
            self._bar = bar(self._config.name, self._config.steps, "step")
            self._bar.__enter__()
            self._bar.show(self._step)

    def hide(self) -> None:
        """Stop showing the training."""
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Leave the screen to other progress for the duration of a block."""
        shown = self._bar is not None
        self.hide()
        try:
            yield
        finally:
            if shown:
                self.show()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hide()
        if self._active:
            self._trackers.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        # The last line of a killed run may be incomplete.
        return float("inf")
