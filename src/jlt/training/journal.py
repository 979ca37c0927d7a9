"""The journal of a run: its events go to its log, as lines to the screen, and to trackers."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jlt.config import TrainConfig
from jlt.runtime.progress import Bar, bar, inform
from jlt.storage.files import open_unlinked, write_text
from jlt.training.trackers import open_trackers

FIGURES: Mapping[str, Callable[[float], str]] = {
    "loss": lambda loss: f"loss {loss:.4g}",
    "img_per_second": lambda speed: f"{speed:,.0f} img/s" if speed >= 10 else f"{speed:.2g} img/s",
    "mfu": lambda mfu: f"MFU {mfu:.0%}",
    "memory_gib": lambda memory: f"{memory:.1f} GiB",
    "learning_rate": lambda rate: f"learning rate {rate:.3g}",
    "grad_norm": lambda norm: f"gradient {norm:.3g}",
}
"""The numbers of a step that are shown, in order of importance: a narrow terminal cuts off the last."""

WAITING_SHARE = 0.05
"""From this share of the time on, the wait for data is shown, before everything else about speed."""

NOTES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "saved": lambda event: f"Step {event['step']:,} is saved; training paused for {event['pause_seconds']:.2g} s.",
    "skipped": lambda event: f"{event['what']} The update is skipped.",
    "sampled": lambda event: f"Step {event['step']:,}: samples in {event['file']}",
    "evaluated": lambda event: f"Step {event['step']:,}: Frechet distance {event['metrics']['frechet_distance']:.4g}",
    "failed": lambda event: f"Step {event['step']:,}: {event['error']} The training goes on.",
}
"""The line that stays on the screen, by event."""


def figures(values: Mapping[str, Any]) -> str:
    """Return the numbers of a logged step as one line, without those that are missing or None."""
    texts = {name: write(values[name]) for name, write in FIGURES.items() if values.get(name) is not None}
    if (waiting := values.get("waiting") or 0.0) >= WAITING_SHARE:
        speed = f"{texts['img_per_second']}, " if "img_per_second" in texts else ""
        texts["img_per_second"] = f"{speed}waiting for data {waiting:.0%}"
    return ", ".join(texts.values())


class Journal(contextlib.AbstractContextManager["Journal"]):
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

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.hide()
        if self._active:
            self._trackers.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        # The last line of a killed run may be incomplete.
        return float("inf")
