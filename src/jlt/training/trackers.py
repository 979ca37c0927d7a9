"""The log for TensorBoard and Weights & Biases; their failures never stop a training."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Tracker:
    """A service that also receives the log: how it takes the numbers and pictures of a step, and ends."""

    name: str
    log: Callable[[int, Mapping[str, float]], object]
    image: Callable[[int, str, Path], object]
    close: Callable[[], object]


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
                raise JLTError(f"the package {package} is not installed (pip install 'jlt[trackers]' brings it)")
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
        from PIL import Image

        with Image.open(path) as picture:
            writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

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
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
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
        project=WANDB_PROJECT,
        name=config.name,
        id=identity.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run),
        mode=config.wandb,
        config=to_json(config),
        settings=settings,
    )
    return Tracker(
        "Weights & Biases",
        lambda step, values: opened.log(dict(values), step=step),
        lambda step, name, path: opened.log({name: wandb.Image(str(path))}, step=step),
        opened.finish,
    )
