"""The folder of a training run: configuration, log, evaluations and sample grid; it may still be under way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jlt.config import TrainConfig
from jlt.errors import JLTError
from jlt.results.evaluation import Evaluation
from jlt.results.files import read_result
from jlt.storage.codec import Count, NonNegative, Size, from_file, from_json, known_fields
from jlt.storage.files import WORK, parse_json, read_marker, recorded, work_of
from jlt.storage.folders import path_inside
from jlt.storage.seals import require_sealed

CONFIG = "config.json"
LOG = "log.jsonl"
TAIL = 2**16
"""Bytes at the end of a log that hold its last lines."""
SEALED_LINE = re.compile(rb'(\{.*), "seal": "([0-9a-f]{16})"\}')


@dataclass(frozen=True)
class Event:
    """One line of the log, of a kind without further fields that are read."""

    step: Count


@dataclass(frozen=True)
class Session(Event):
    """The start of a training, or of one that was resumed."""

    processes: Size | None = None
    micro_batch_size: Count | None = None
    accumulation: Count | None = None
    parallel: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class SampleGrid(Event):
    """A grid of samples, its file relative to the run folder."""

    file: str


@dataclass(frozen=True)
class End(Event):
    """The last step of a run, and the time in training."""

    seconds: NonNegative | None = None


@dataclass(frozen=True)
class LoggedStep(Event):
    """One logged training step; None or empty where the log has no value."""

    loss: NonNegative
    loss_by_time: tuple[NonNegative | None, ...] = ()
    """Mean loss in equal bins of t from 0 to 1, None for a bin without samples."""
    learning_rate: NonNegative | None = None
    grad_norm: NonNegative | None = None
    """Before clipping."""
    ema_distance: Mapping[str, NonNegative] = field(default_factory=dict)
    """Relative L2 distance between the weights and each of their averages."""
    img_per_second: NonNegative | None = None
    mfu: NonNegative | None = None
    memory_gib: NonNegative | None = None
    waiting: NonNegative | None = None
    """Share of the time spent waiting for data."""
    seconds: NonNegative | None = None
    """Time in training up to here, over all sessions."""


EVENTS: Mapping[str, type[Event]] = {"start": Session, "step": LoggedStep, "sampled": SampleGrid, "end": End}
E = TypeVar("E", bound=Event)


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
    session: Session = Session(0)
    """The start of the latest session: processes, device and more."""
    ended: bool = False
    """Whether the run has reached its last step."""
    stopped: bool = False
    """Whether the run was stopped before its last step, and has not been resumed."""
    seconds: float | None = None
    """Time in training of a run that has ended."""
    reached: int = -1
    """The last step of which it has a line, -1 without any."""
    notes: tuple[str, ...] = ()
    """What is missing at its end, in sentences."""

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
    """`config.json`, with the identity of the latents."""
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
        return max([0, self.log.reached, *(entry.step or 0 for entry in self.evaluations[-1:])])

    def file_of(self, evaluation: Evaluation) -> Path | None:
        """Return the file of an evaluation."""
        return next(
            (path for path in evaluation_files(self.folder) if read_result(Evaluation, path) == evaluation), None
        )


def evaluation_files(run: Path) -> list[Path]:
    """Return the evaluations of a run by name, so by step."""
    return sorted((run / "evaluations").glob("step_*.json"))


def read_config(folder: Path) -> tuple[TrainConfig, Mapping[str, Any]]:
    """Read the `config.json` of a run: its settings, and all of it as JSON; JLTError if a value is not possible."""
    path = folder / CONFIG
    return parse_config(path, read_marker(path)[0])


def parse_config(path: Path, content: Mapping[str, Any]) -> tuple[TrainConfig, Mapping[str, Any]]:
    """Return the settings that a `config.json` holds, and its content; JLTError if a value is not possible."""
    settings = {key: value for key, value in content.items() if key not in ("latents", WORK)}
    return from_file(TrainConfig, path, settings), content


def read_run(folder: Path) -> Run:
    """Read a run folder; log, samples and evaluations may be missing while it is under way."""
    config, content = read_config(folder)
    evaluations = [read_result(Evaluation, path) for path in evaluation_files(folder)]
    log = _log_of(folder, config, evaluations)
    grid, work = "samples/grid.png", work_of(folder)
    for file in (*(file for _, file in log.samples), grid):
        if path_inside(folder, file).is_file():
            require_sealed(folder / file, work)
    return Run(
        folder=folder,
        seed=config.seed,
        config=content,
        log=log,
        evaluations=tuple(sorted(evaluations, key=lambda evaluation: evaluation.step or 0)),
        grid=path_inside(folder, grid) if (folder / grid).exists() else None,
    )


def _log_of(folder: Path, config: TrainConfig, evaluations: Iterable[Evaluation]) -> Log:
    """Read the log of a run, with a note if the run has results of later steps, whose lines may be lost."""
    path, log = folder / LOG, read_log(folder / LOG)
    names = [checkpoint.name.removeprefix("step_") for checkpoint in folder.glob("checkpoints/step_*")]
    steps = [evaluation.step or 0 for evaluation in evaluations] + [int(name) for name in names if name.isdecimal()]
    last = max(steps, default=-1)
    # Before anything is saved, the last step is logged, and the others at these intervals.
    logged = last if last >= config.steps else last - last % config.log_every
    notes = list(log.notes)
    if path.exists() and log.reached < logged:
        # After a damaged checkpoint is removed, the run resumes from the one before.
        notes.append(
            f"{path} ends before step {logged:,}, and the run has results of step {last:,}: its end is lost, or the "
            "run was resumed from an earlier checkpoint."
        )
    elif log.reached >= config.steps and not log.ended:
        notes.append(f"{path} ends without the end of the training.")
    return replace(log, notes=tuple(notes))


def newest_step(path: Path) -> int:
    """Return the step of the last line of a log that can be read, for progress; 0 without one."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().splitlines()
    for text in reversed(lines):
        with contextlib.suppress(JLTError):
            return parse_line(text, text, str(path)).event.step
    return 0


class Line(NamedTuple):
    """A line of a log: its bytes without the end, and what it says."""

    text: bytes
    kind: str
    event: Event


def log_line(event: Mapping[str, Any], work: str) -> str:
    """Return an event as a line of the log of a run with this identity, sealed by a hash.

    A value that is a number and not finite becomes None, since JSON has none; one inside a list is a ValueError.
    """
    bad = {key for key, value in event.items() if isinstance(value, float) and not math.isfinite(value)}
    text = json.dumps(recorded({**event, **dict.fromkeys(bad)}), allow_nan=False)
    return f'{text[:-1]}, "seal": "{_line_seal(text.encode(), work)}"}}\n'


def _line_seal(text: bytes, work: str) -> str:
    return hashlib.sha256(work.encode() + text).hexdigest()[:16]


def read_lines(path: Path) -> tuple[list[Line], bool]:
    """Read the lines of a log, and whether its last line was torn, as a kill leaves it; that one is left out.

    A missing file has no lines. JLTError names a line that is damaged, and one that is of another run.
    """
    content = path.read_bytes() if path.exists() else b""
    texts, work, torn = content.splitlines(), work_of(path.parent), False
    whole = not texts or content.endswith(b"\n")
    lines: list[Line] = []
    last = -1
    for number, text in enumerate(texts, 1):
        where = f"{path}, line {number}"
        found = SEALED_LINE.fullmatch(text)
        if found is None or found[2].decode() != _line_seal(found[1] + b"}", work):
            if number == len(texts) and not whole:
                torn = True
                break
            parse_json(text, where)
            if b'"seal"' not in text:
                raise JLTError(f"{where} carries no hash: `jlt verify {path.parent} --seal` accepts it as it is.")
            raise JLTError(f"{where} was changed or is of another run: remove the line, or move the file away.")
        lines.append(parse_line(found[1] + b"}", text, where))
        kind, event = lines[-1][1:]
        if kind == "step" and event.step <= last:
            raise JLTError(f"{where} is of step {event.step}, after step {last}: remove it, or move the file away.")
        last = event.step if kind in ("step", "start") else last
    return lines, torn


def parse_line(content: bytes, text: bytes, where: str) -> Line:
    """Return the event in a line of a log; JLTError names a field that is missing or has no possible value."""
    values = parse_json(content, where)
    kind = values.get("event")
    if not isinstance(kind, str):
        raise JLTError(f"{where} has no 'event': the log is damaged or of another version.")
    # Without a loss, all updates since the line before were skipped.
    shape = Event if values.get("loss", 0) is None else EVENTS.get(kind, Event)
    try:
        return Line(text, kind, from_json(shape, known_fields(shape, values)))
    except JLTError as error:
        raise JLTError(f"{where} is damaged or of another version: {error}") from error


def read_log(path: Path) -> Log:
    """Read a log; the steps that a resumed run repeats replace the earlier ones.

    A missing file is an empty log. JLTError for a damaged one; a torn last line is left out, with a note.
    """
    lines, torn = read_lines(path)
    kept = _history(lines)
    starts = [place for place, line in enumerate(kept) if line.kind == "start"]
    # A log without a start event counts as one session.
    session = kept[starts[-1] :] if starts else kept
    ends = _of_kind(session, "end", End)
    return Log(
        steps=tuple(_of_kind(kept, "step", LoggedStep)),
        starts=tuple(kept[place].event.step for place in starts),
        skipped=tuple(sorted({event.step for event in _of_kind(kept, "skipped", Event)})),
        samples=tuple(sorted({event.step: event.file for event in _of_kind(kept, "sampled", SampleGrid)}.items())),
        session=next(iter(_of_kind(session, "start", Session)), Session(0)),
        ended=bool(ends),
        stopped=bool(_of_kind(session, "stopped", Event)) and not ends,
        seconds=ends[-1].seconds if ends else None,
        reached=max((line.event.step for line in kept), default=-1),
        notes=(f"The last line of {path} is incomplete and left out.",) if torn else (),
    )


def _of_kind(lines: Sequence[Line], kind: str, shape: type[E]) -> list[E]:
    return [line.event for line in lines if line.kind == kind and isinstance(line.event, shape)]


def _history(lines: Iterable[Line]) -> list[Line]:
    """Return the lines that count: each start discards those of later steps."""
    kept: list[Line] = []
    for line in lines:
        if line.kind == "start":
            kept = [earlier for earlier in kept if earlier.event.step <= line.event.step]
        kept.append(line)
    return kept
