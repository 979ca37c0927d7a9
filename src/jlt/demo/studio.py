"""What the page shows, without the page: drawings of one or two systems, within limits, with what they were made by."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from jlt.api.images import State, Trajectory
from jlt.api.model import Model, load
from jlt.config import Prediction, SampleConfig
from jlt.errors import JLTError, UsageError, unknown_name
from jlt.networks.transformer import count_parameters
from jlt.sampling.guidance import rows_evaluated
from jlt.sampling.labels import class_number
from jlt.sampling.sampler import ImageSampler, Start, decode_to_uint8
from jlt.sampling.save import require_same_noise, starts_between
from jlt.sampling.solvers import SOLVERS

EVERY, ANY = "every class, one a row", "random classes"
"""Choices of a class that are none."""
MOST_ROWS = 16
"""Classes of which one picture shows all."""
MOST_IMAGES, MOST_STEPS, MOST_EVALUATIONS = 16, 250, 20_000
"""Limits of one drawing: images, of each class where it shows every class, steps, and network evaluations."""
LAST_SEED = 2**53 - 1
"""The largest whole number that a browser represents exactly."""
KEPT = 4
"""Drawings that are kept, each with two latents for every image and step."""
SMALL = 5_000_000
"""Parameters up to which one thread of a CPU is faster than several."""
DEFAULTS = SampleConfig(num=8, steps=20)
QUICK_SECONDS = 10.0
"""A drawing that takes less begins with the opening of the page and the change of a field."""


class Stopped(JLTError):
    """A drawing ended before it was complete, on request."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """Numbered images of one system, and their states on the path by time."""

    sampler: ImageSampler
    trajectory: Trajectory
    pixels: UInt8[Tensor, "n hh ww 3"]
    captions: Sequence[str]
    seconds: float
    """Time for the latents and the images together."""

    def at(self, t: float) -> tuple[float, UInt8[Tensor, "n hh ww 3"], UInt8[Tensor, "n hh ww 3"]]:
        """Return the time of the state nearest to t, its clean predictions, and its z, both decoded."""
        state: State = self.trajectory[t]
        if state.t == 1:
            return 1.0, self.pixels, self.pixels
        clean, z = (_decoded(self.sampler, latents) for latents in (state.clean, state.z))
        return state.t, clean, z


@dataclass(frozen=True, eq=False)
class System:
    """A trained network, by the path that names it on the command line."""

    source: Path
    model: Model
    autoencoder_path: str | None = None
    title: str = ""

    @property
    def name(self) -> str:
        """What the page calls it, such as JLT-B/1."""
        return self.title or self.model.config.name

    @property
    def prediction(self) -> Prediction:
        """What its network outputs."""
        return self.model.prediction


class Studio:
    """Draws the images of one or two systems from the same noise; one thread at a time may draw."""

    def __init__(self, systems: Sequence[System]) -> None:
        if len({system.name for system in systems}) < len(systems):
            alike = len({system.source.name for system in systems}) < len(systems)
            places = [str(system.source) if alike else system.source.name for system in systems]
            systems = [replace(one, title=f"{one.name} ({place})") for one, place in zip(systems, places, strict=True)]
        self.systems = systems
        first = systems[0].model
        self.classes = first.classes
        stored = [[*system.model.checkpoint.ema_names(), "none"] for system in systems]
        self.averages = [name for name in stored[0] if all(name in names for names in stored)]
        self._usual_ema = stored[0][0] if len({names[0] for names in stored}) == 1 else None
        self.draw = lru_cache(maxsize=KEPT)(self._draw)
        self._stop = threading.Event()
        self._closed = False
        self._seconds_per_row = 0.0
        if first.device == "cpu" and all(count_parameters(s.model.network) < SMALL for s in systems):
            torch.set_num_threads(1)
        for other in systems[1:]:
            require_same_noise(*(system.model.sampler(DEFAULTS) for system in (systems[0], other)))
            if other.model.classes != self.classes:
                raise JLTError(
                    f"{systems[0].source} and {other.source} have different classes: show one of them at a time."
                )
        self._warm_up()
        self.initial = self._first_drawing()

    @classmethod
    def open(cls, sources: Sequence[Path], device: str, autoencoder_path: str | None = None) -> Studio:
        """Open what `jlt.load` opens; JLTError as it raises, and for two of different noise."""
        models = [load(path, device=device, autoencoder_path=autoencoder_path) for path in sources]
        pairs = zip(sources, models, strict=True)
        return cls([System(source, model, autoencoder_path) for source, model in pairs])

    def _warm_up(self) -> None:
        """Open autoencoders, and measure how long the network takes; what is missing is an error here."""
        for steps in (1, 4):
            self._draw(replace(DEFAULTS, num=4, steps=steps))

    def _first_drawing(self) -> dict[str, object]:
        """Return the fields as the page opens, and draw by them: fewer images where eight would take long."""
        low, high = DEFAULTS.cfg_interval
        values: dict[str, object] = {
            "label": self.classes[min(3, len(self.classes) - 1)],
            "seed": DEFAULTS.seed,
            "cfg_scale": DEFAULTS.cfg_scale,
            "low": low,
            "high": high,
            "steps": DEFAULTS.steps,
            "solver": DEFAULTS.solver,
            "ema": self.averages[0],
        }
        for num in (DEFAULTS.num, 4, 2, 1):
            values["num"] = num
            config = self.config_of(values)
            if self.expected_seconds(config) < QUICK_SECONDS:
                self.draw(config)
                break
        return values

    @property
    def class_choices(self) -> list[str]:
        """What can be drawn: rules for several classes, then the names of all classes."""
        return [*([EVERY] if len(self.classes) <= MOST_ROWS else []), ANY, *self.classes]

    def config_of(self, values: Mapping[str, object]) -> SampleConfig:
        """Return the settings that the fields of the page describe, whatever was typed.

        UsageError for what is no number, outside its range or unknown; JLTError for what would take too long.
        """
        label, per_class = values["label"], whole("Images", values["num"], 1, MOST_IMAGES)
        every = label == EVERY and EVERY in self.class_choices
        if not every and label != ANY:
            label = str(self._class_number(label))
        solver, ema = values["solver"], str(values["ema"] or "")
        if not isinstance(solver, str) or solver not in SOLVERS:
            raise unknown_name("solver", str(solver), SOLVERS)
        config = SampleConfig(
            num=per_class * len(self.classes) if every else per_class,
            labels="equal" if every else "random" if label == ANY else str(label),
            seed=whole("Seed", values["seed"], 0, LAST_SEED),
            steps=whole("Steps", values["steps"], 1, MOST_STEPS),
            solver=solver,
            cfg_scale=number("Guidance scale", values["cfg_scale"], 0, 100),
            cfg_interval=(
                number("Guidance after t", values["low"], 0, 1),
                number("Guidance until t", values["high"], 0, 1),
            ),
            ema="" if ema == self._usual_ema else ema,
        )
        if (rows := config.num * rows_evaluated(config)) > MOST_EVALUATIONS:
            raise JLTError(
                f"{config.num} images would take {rows:,} evaluations of the network, and one drawing may take "
                f"{MOST_EVALUATIONS:,}: choose fewer images or fewer steps."
            )
        return config

    def _class_number(self, label: object) -> int:
        if not isinstance(label, str) or not label.strip():
            raise UsageError("Choose a class.")
        # The name goes first: the classes of the digits are named by numbers.
        if self.classes.count(label) == 1:
            return self.classes.index(label)
        return class_number(label, self.classes, len(self.classes))

    def expected_seconds(self, config: SampleConfig) -> float:
        """Return how long a drawing would take at the speed of the last one, also for one that is kept."""
        return self._seconds_per_row * config.num * rows_evaluated(config)

    def _draw(self, config: SampleConfig) -> tuple[Drawing, ...]:
        """Draw the images of every system; `draw` keeps the last ones.

        JLTError for settings that a system does not know and for latents that are not finite; Stopped after `stop`.
        """
        self._stop.clear()
        begun = time.perf_counter()
        drawings = tuple(self._draw_one(system, config) for system in self.systems)
        self._seconds_per_row = (time.perf_counter() - begun) / (config.num * rows_evaluated(config))
        return drawings

    def _draw_one(self, system: System, config: SampleConfig) -> Drawing:
        begun = time.perf_counter()
        sampler = system.model.sampler(config)
        trajectory = Trajectory(sampler, self._watch)
        latents = trajectory[1.0].clean
        if not latents.isfinite().all():
            raise JLTError(f"Some images of {system.name} are not finite: choose a smaller guidance scale.")
        pixels = _decoded(sampler, latents)
        seconds = time.perf_counter() - begun
        labels = sampler.latent_sampler.start(range(config.num)).labels.tolist()
        return Drawing(sampler, trajectory, pixels, [self.classes[label] for label in labels], seconds)

    def interpolate(self, config: SampleConfig, seed: int) -> list[UInt8[Tensor, "n hh ww 3"]]:
        """Draw the way from image 0 of the seed in `config` to image 0 of another one, for every system.

        The class is that of the first, at both ends. Errors as for `draw`.
        """
        self._stop.clear()
        rows = []
        for system in self.systems:
            a, b = (system.model.sampler(replace(config, num=1, seed=one)) for one in (config.seed, seed))
            starts = starts_between(*(sampler.latent_sampler.start(range(1)) for sampler in (a, b)))
            joined = Start(
                torch.cat([start.noise for start in starts]),
                torch.cat([start.labels for start in starts]),
                partial(_repeated_noise, starts[0], len(starts)),
            )
            rows.append(_decoded(a, a.latent_sampler.flow(joined, lambda *_: self._watch())))
        return rows

    def stop(self, forever: bool = False) -> None:
        """End the present drawing at its next evaluation of the network; `forever`, all later ones too."""
        self._closed = self._closed or forever
        self._stop.set()

    def _watch(self) -> None:
        if self._stop.is_set() or self._closed:
            raise Stopped("Stopped.")

    def commands(self, config: SampleConfig) -> list[str]:
        """Return the command of each system that writes the same images as numbered PNG files."""
        folders = ["samples-1", "samples-2"] if len(self.systems) > 1 else ["samples"]
        return [sample_command(system, out, config) for system, out in zip(self.systems, folders, strict=True)]


def sample_command(system: System, out: str, config: SampleConfig) -> str:
    """Return the `jlt sample` of a system that draws by these settings."""
    usual, options = SampleConfig(), ["--num", str(config.num)]
    for field in fields(SampleConfig):
        value = getattr(config, field.name)
        if field.name != "num" and value != getattr(usual, field.name):
            texts = map(str, value) if isinstance(value, tuple) else [str(value)]
            options += [f"--{field.name.replace('_', '-')}", *texts]
    if system.autoencoder_path is not None:
        options += ["--autoencoder-path", system.autoencoder_path]
    return shlex.join(["jlt", "sample", "--checkpoint", str(system.source), "--out", out, *options])


def number(name: str, value: object, low: float, high: float) -> float:
    """Return the number in a field; UsageError for what is none, or outside low..high."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not valid:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}{_not(value)}.")
    return float(value)  # type: ignore[arg-type]


def whole(name: str, value: object, low: int, high: int) -> int:
    """Return the whole number in a field; UsageError for what is none, or outside low..high."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not valid or value != int(value):  # type: ignore[call-overload]
        raise UsageError(f"{name} must be a whole number from {low:,} to {high:,}{_not(value)}.")
    return int(value)  # type: ignore[call-overload]


def _not(value: object) -> str:
    return "" if value is None or value == "" else f", not {str(value)[:40]}"


def _decoded(sampler: ImageSampler, latents: Tensor) -> UInt8[Tensor, "n hh ww 3"]:
    return decode_to_uint8(sampler.autoencoder, latents.to(sampler.device)).cpu()


def _repeated_noise(start: Start, count: int, step: int) -> Float[Tensor, "n c h w"]:
    """Return the fresh noise of one image for each of several."""
    return start.fresh(step).expand(count, -1, -1, -1)
