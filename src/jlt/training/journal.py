"""The journal of a run: its events go to its log, as lines to the screen, and to TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlt.config import TrainConfig
from jlt.errors import JLTError
from jlt.results.run import LOG, log_line, read_lines
from jlt.runtime import processes
from jlt.runtime.progress import Bar, bar, inform
from jlt.storage.codec import to_json
from jlt.storage.files import recorded, work_of, write_text
from jlt.storage.folders import open_unlinked, require_unlinked

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
        self._log = run / LOG
        self._bar: Bar | None = None
        """The bar, while the training is on the screen."""
        self._shown = False
        if self._active:
            self._work = work_of(run)
            self._drop_later_lines()
            self._trackers = open_trackers(config, run, step)

    def _drop_later_lines(self) -> None:
        lines, torn = read_lines(self._log)
        if torn:
            inform(f"The last line of {self._log} is incomplete, as a kill leaves it, and removed.")
        kept = b"".join(line.text + b"\n" for line in lines if line.event.step <= self._step)
        if self._log.exists() and kept != self._log.read_bytes():
            write_text(self._log, kept.decode())

    def write(self, event: str, **values: Any) -> None:
        """Take an event; `values` holds its `step`."""
        if not self._active:
            return
        descriptor = open_unlinked(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(log_line({"event": event, **values}, self._work))
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

    def advance(self, step: int) -> None:
        """Show that a step is made, also where no line is logged."""
        self._step = step
        if self._bar is not None:
            self._bar.show(step)

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


@dataclass(frozen=True)
class Tracker:
    """A service that also receives the log: how it takes the numbers and pictures of a step, and ends."""

    name: str
    log: Callable[[int, Mapping[str, float]], object]
    image: Callable[[int, str, Path], object]
    close: Callable[[], object]


class Trackers:
    """The trackers that are on; their failures never stop a training. Steps must not decrease."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._on = list(trackers)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the numbers of nested mappings and lists, by the names of `flat_numbers`."""
        numbers = flat_numbers(values)
        self._each(lambda tracker: tracker.log(step, numbers))

    def image(self, step: int, name: str, path: Path) -> None:
        """Log a picture file."""
        self._each(lambda tracker: tracker.image(step, name, path))

    def close(self) -> None:
        """Write or send the rest, and switch all off."""
        self._each(lambda tracker: tracker.close())
        self._on = []

    def _each(self, act: Callable[[Tracker], object]) -> None:
        for tracker in list(self._on):
            try:
                act(tracker)
            except Exception as error:
                self._on.remove(tracker)
                _report_off(tracker.name, error)


def open_trackers(config: TrainConfig, run: Path, resumed_step: int) -> Trackers:
    """Open the trackers of a run in its first process; one that cannot be opened is reported and left out.

    Entries after `resumed_step`, from a session that did not save them, are removed or not logged twice.
    """
    wanted: list[tuple[str, str, Callable[[], Tracker]]] = []
    if config.tensorboard:
        wanted.append(("TensorBoard", "tensorboard", lambda: _tensorboard(run, resumed_step)))
    if config.wandb != "off":
        wanted.append(("Weights & Biases", "wandb", lambda: _wandb(config, run)))
    opened = []
    for name, package, open_tracker in wanted if processes.rank() == 0 else ():
        try:
            if importlib.util.find_spec(package) is None:
                raise JLTError(f"the package {package} is not installed (pip install -e '.[trackers]' brings it)")
            opened.append(open_tracker())
        except Exception as error:
            _report_off(name, error)
    return Trackers(opened)


def flat_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in nested mappings and lists by names with slashes: {"a": {"b": 1}} gives {"a/b": 1.0}."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, (list, tuple)):
            value = {str(place): entry for place, entry in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def _report_off(name: str, error: Exception) -> None:
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    inform(f"{name} is off for the rest of this training: {first.rstrip('.')}.")


def _tensorboard(run: Path, resumed_step: int) -> Tracker:
    """Open event files in a folder of the run."""
    from torch.utils.tensorboard import SummaryWriter

    folder = run / "tensorboard"
    purge_step = resumed_step + 1 if folder.exists() else None
    writer: Any = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def image(step: int, name: str, path: Path) -> None:
        import numpy as np

        from jlt.images.reading import read_image

        writer.add_image(name, np.asarray(read_image(path).convert("RGB")), step, dataformats="HWC")

    return Tracker("TensorBoard", log, image, writer.close)


def _wandb(config: TrainConfig, run: Path) -> Tracker:
    """Open one run of Weights & Biases, which a resumed training continues; its files are in RUN/wandb.

    It ignores steps that it already has: a resumed training repeats them bit for bit.
    """
    import wandb

    settings = wandb.Settings(
        silent=True,
        # Otherwise it replaces stdout and stderr.
        console="off",
        # The most seconds for an answer before training starts without it, and for the rest at the end.
        init_timeout=30.0,
        finish_timeout=20.0,
        # Never continue another unfinished run of this process.
        reinit="create_new",
    )
    wandb.setup(settings=settings)
    # Without a key, init would prompt for one on a terminal and wait.
    if config.wandb == "online" and not wandb.login(prompt=False):
        raise JLTError("there is no API key (wandb login stores one; --wandb offline needs none)")
    identity = run / "wandb" / "id"
    require_unlinked(run, identity)
    if not identity.exists():
        write_text(identity, secrets.token_hex(8))
    opened: Any = wandb.init(
        project="jlt",
        name=config.name,
        id=identity.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run),
        mode=config.wandb,
        config=recorded(to_json(config)),
        settings=settings,
    )
    return Tracker(
        "Weights & Biases",
        lambda step, values: opened.log(dict(values), step=step),
        lambda step, name, path: opened.log({name: wandb.Image(str(path))}, step=step),
        opened.finish,
    )
