"""The log for TensorBoard and Weights & Biases; their failures never stop a training."""

from __future__ import annotations

import abc
import importlib.util
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jlt.config import TrainConfig
from jlt.errors import JLTError
from jlt.runtime import processes
from jlt.runtime.progress import inform
from jlt.storage.codec import to_json
from jlt.storage.files import require_unlinked, write_text

WANDB_PROJECT = "jlt"
INIT_SECONDS = 30.0
"""The most time for Weights & Biases to answer before training starts without it."""
FINISH_SECONDS = 20.0
"""The most time for it to send the rest at the end."""


class Tracker(abc.ABC):
    """A service that also receives the log; any error in it switches it off."""

    name: str

    @abc.abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""

    @abc.abstractmethod
    def image(self, step: int, name: str, path: Path) -> None:
        """Log a picture file of a step."""

    @abc.abstractmethod
    def close(self) -> None:
        """Write or send the rest."""


class Trackers:
    """The trackers that are on; their methods never raise an Exception. Steps must not decrease."""

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

    def _each(self, act: Callable[[Tracker], None]) -> None:
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
    wanted: dict[str, Callable[[], Tracker]] = {}
    if config.tensorboard:
        wanted[TensorBoard.name] = lambda: TensorBoard(run / "tensorboard", resumed_step)
    if config.wandb != "off":
        wanted[WeightsAndBiases.name] = lambda: WeightsAndBiases(config, run)
    opened = []
    for name, open_tracker in wanted.items() if processes.rank() == 0 else ():
        try:
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


def _require_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise JLTError(f"the package {name} is not installed (pip install 'jlt[trackers]' brings it)")


class TensorBoard(Tracker):
    """Event files in a folder of the run."""

    name = "TensorBoard"

    def __init__(self, folder: Path, resumed_step: int) -> None:
        _require_package("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        purge_step = resumed_step + 1 if folder.exists() else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write each number as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Write a picture."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write the rest and close the file."""
        self._writer.close()


class WeightsAndBiases(Tracker):
    """One run of Weights & Biases, which a resumed training continues; its files are in RUN/wandb.

    It ignores steps that it already has: a resumed training repeats them bit for bit.
    """

    name = "Weights & Biases"

    def __init__(self, config: TrainConfig, run: Path) -> None:
        _require_package("wandb")
        import wandb

        settings = wandb.Settings(
            silent=True,
            # Otherwise it replaces stdout and stderr.
            console="off",
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            # Never continue another unfinished run of this process.
            reinit="create_new",
        )
        wandb.setup(settings=settings)
        # Without a key, init would prompt for one on a terminal and wait.
        if config.wandb == "online" and not wandb.login(prompt=False):
            raise JLTError("there is no API key (wandb login stores one; --wandb offline needs none)")
        self._picture = wandb.Image
        self._run = wandb.init(
            project=WANDB_PROJECT,
            name=config.name,
            id=_wandb_id(run / "wandb" / "id"),
            resume="allow",
            dir=str(run),
            mode=config.wandb,
            config=to_json(config),
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log all numbers of a step at once."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Log a picture."""
        self._run.log({name: self._picture(str(path))}, step=step)

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()


def _wandb_id(path: Path) -> str:
    """Return the identity of the run that a file holds, or create the file; JLTError for a link."""
    require_unlinked(path.parent.parent, path)
    if not path.exists():
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()
