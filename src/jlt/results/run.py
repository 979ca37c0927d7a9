"""The folder of a training run: configuration, log, evaluations and sample grid; it may still be under way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jlt.errors import JLTError
from jlt.results.evaluation import Evaluation
from jlt.results.files import read_result
from jlt.storage.files import read_json
from jlt.storage.folders import path_inside

Event = Mapping[str, Any]
OPTIONAL_NUMBERS = ("learning_rate", "grad_norm", "img_per_second", "mfu", "memory_gib", "waiting", "seconds")
"""Fields of a logged step that are numbers or None."""


@dataclass(frozen=True)
class LoggedStep:
    """One logged training step; None or empty where the log has no value."""

    step: int
    loss: float
    loss_by_time: tuple[float | None, ...] = ()
    """Mean loss in equal bins of t from 0 to 1, None for a bin without samples."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    """Before clipping."""
    ema_distance: Mapping[str, float] = field(default_factory=dict)
    """Relative L2 distance between the weights and each of their averages."""
    img_per_second: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    waiting: float | None = None
    """Share of the time spent waiting for data."""
    seconds: float | None = None
    """Time in training up to here, over all sessions."""


@dataclass(frozen=True)
class Log:
    """What a run has logged so far, by ascending step."""

    steps: tuple[LoggedStep, ...] = ()
    starts: tuple[int, ...] = ()
    """Steps from which training started or was resumed."""
    skipped: tuple[int, ...] = ()
    """Steps without an update, because a loss or gradient was not finite."""
    samples: tuple[tuple[int, str], ...] = ()
    """Steps of the sample grids, with their files relative to the run folder."""
    session: Mapping[str, Any] = field(default_factory=dict)
    """The start event of the latest session: processes, device and more."""
    ended: bool = False
    """Whether the run has reached its last step."""
    stopped: bool = False
    """Whether the run was stopped before its last step, and has not been resumed."""
    seconds: float | None = None
    """Time in training of a run that has ended."""

    @property
    def restarts(self) -> tuple[int, ...]:
        """Steps from which the run was resumed."""
        return tuple(step for step in self.starts if step > 0)

    def seconds_left(self, steps: int, batch_size: int) -> float | None:
        """Return the time that a run of `steps` updates still needs, None if it is unknown or the run has ended.

        The speed is that of the latest session, for a log without times its last images per second.
        """
        if not self.steps or self.ended:
            return None
        last, begun = self.steps[-1], max(self.starts, default=0)
        timed = [
            (entry.step, entry.seconds) for entry in self.steps if entry.step > begun and entry.seconds is not None
        ]
        if len(timed) > 1:
            (first_step, first), (last_step, latest) = timed[0], timed[-1]
            return (latest - first) / (last_step - first_step) * (steps - last.step)
        if last.img_per_second:
            return batch_size / last.img_per_second * (steps - last.step)
        return None


@dataclass(frozen=True)
class Run:
    """One training run, which may still be under way."""

    folder: Path
    seed: int
    config: Mapping[str, Any]
    """`config.json`, of this or another version."""
    log: Log
    evaluations: tuple[Evaluation, ...]
    """By ascending step."""
    grid: Path | None
    """The sample grid of its last checkpoint."""

    def at(self, step: int | None) -> Evaluation | None:
        """Return the evaluation at a step, or None."""
        return next((evaluation for evaluation in self.evaluations if evaluation.step == step), None)

    @property
    def reached(self) -> int:
        """The last step that was logged or evaluated, 0 before the first."""
        logged, evaluated = self.log.steps[-1:], self.evaluations[-1:]
        return max([0, *(entry.step for entry in logged), *(entry.step or 0 for entry in evaluated)])

    def file_of(self, evaluation: Evaluation) -> Path | None:
        """Return the file of an evaluation."""
        return next(
            (path for path in evaluation_files(self.folder) if read_result(Evaluation, path) == evaluation), None
        )


def evaluation_files(run: Path) -> list[Path]:
    """Return the evaluations of a run by name, so by step."""
    return sorted((run / "evaluations").glob("step_*.json"))


def read_run(folder: Path, seed: int) -> Run:
    """Read a run folder; log, samples and evaluations may be missing while it is under way."""
    evaluations = [read_result(Evaluation, path) for path in evaluation_files(folder)]
    grid = "samples/grid.png"
    return Run(
        folder=folder,
        seed=seed,
        config=read_json(folder / "config.json"),
        log=read_log(folder / "log.jsonl"),
        evaluations=tuple(sorted(evaluations, key=lambda evaluation: evaluation.step or 0)),
        grid=path_inside(folder, grid) if (folder / grid).exists() else None,
    )


def read_log(path: Path) -> Log:
    """Read a log; the steps that a resumed run repeats replace the earlier ones.

    A missing file is an empty log. JLTError for a damaged one; a torn last line is left out.
    """
    events = _history(_events(path))
    starts = [place for place, event in enumerate(events) if event["event"] == "start"]
    # A log without a start event counts as one session.
    session = events[starts[-1] :] if starts else events
    ends = [event for event in session if event["event"] == "end"]
    steps = {event["step"]: _logged_step(event) for event in _of_kind(events, "step") if _finite(event.get("loss"))}
    samples = {event["step"]: str(event.get("file")) for event in _of_kind(events, "sampled")}
    return Log(
        steps=tuple(steps[step] for step in sorted(steps)),
        starts=tuple(events[place]["step"] for place in starts),
        skipped=tuple(sorted({event["step"] for event in _of_kind(events, "skipped")})),
        samples=tuple(sorted(samples.items())),
        session=session[0] if starts else {},
        ended=bool(ends),
        stopped=bool(_of_kind(session, "stopped")) and not ends,
        seconds=_number(ends[-1].get("seconds")) if ends else None,
    )


def _of_kind(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def _history(events: Iterable[Event]) -> list[Event]:
    """Return the events that count: each start discards those of later steps."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "start":
            kept = [earlier for earlier in kept if earlier["step"] <= event["step"]]
        kept.append(event)
    return kept


def _events(path: Path) -> Iterator[Event]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return  # a run that is being written, or was killed while writing
            raise JLTError(f"{path}, line {number} is not JSON: the log is damaged.") from error
        for key in ("event", "step"):
            if not isinstance(event, Mapping) or key not in event:
                raise JLTError(f"{path}, line {number} has no {key!r}: the log is damaged or of another version.")
        yield event


def _logged_step(event: Event) -> LoggedStep:
    return LoggedStep(
        step=event["step"],
        loss=float(event["loss"]),
        loss_by_time=tuple(_number(value) for value in event.get("loss_by_time") or ()),
        ema_distance={name: value for name, value in (event.get("ema_distance") or {}).items() if _finite(value)},
        **{name: _number(event.get(name)) for name in OPTIONAL_NUMBERS},
    )


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: Any) -> float | None:
    return float(value) if _finite(value) else None
