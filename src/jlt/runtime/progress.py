"""Progress of long work on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from jlt.runtime.streams import harmless, say

T = TypeVar("T")
PLAIN_INTERVAL_SECONDS = 10.0
BAR_WIDTH, NARROW_TERMINAL = 24, 64
FIGURES_WIDTH = 32
"""Columns of a terminal that steps and time left take, at most; the description gets the rest."""
_silent = False
_report: Callable[[float], None] | None = None


def silence() -> None:
    """Show nothing from here on: for worker processes, whose parent shows the progress of all."""
    global _silent
    _silent = True


def report_steps(report: Callable[[float], None]) -> None:
    """Hand the steps of every bar that counts to `report`, in a process that shows nothing itself."""
    global _report
    _report = report


def acknowledge(message: str) -> None:
    """Print one line at once, also from a signal handler that interrupted a print."""
    if not _silent:
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"{message}\n".encode())


def inform(message: str) -> None:
    """Print one line for a person on stderr; stdout is for results."""
    if not _silent:
        say(message)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate, and show how much of the work is done and the time left."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(description, total) as shown:
        for done, item in enumerate(iterable, 1):
            yield item
            shown.show(done)


def bar(description: str, total: float | None, unit: str = "") -> Bar:
    """Return a context manager whose `show(done)` shows progress; a silenced process shows nothing.

    With a `unit` such as "step" the bar counts; otherwise it shows a percentage of the total, or `done` without one.
    """
    if not _silent:
        return _ShownBar(description, total, unit)
    return _ReportedBar(_report) if unit and _report else Bar()


class Bar(contextlib.AbstractContextManager["Bar"]):
    """A bar that shows nothing, and the interface of the one that does."""

    def __exit__(self, *error: object) -> None: ...

    def show(self, done: float, detail: str = "", force: bool = False) -> None:
        """Show how much of the total is done, with a detail; `force` prints a plain line even soon after another."""


class _ReportedBar(Bar):
    """Hands the steps on, to the process that shows the progress of all."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report

    def show(self, done: float, detail: str = "", force: bool = False) -> None:  # noqa: ARG002
        self._report(done)


class _ShownBar(Bar):
    """On a terminal a bar that is redrawn in place, with its detail in a line below; elsewhere a line now and then."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        from rich import progress as rich_progress
        from rich.console import Console
        from rich.text import Text

        class WithDetail(rich_progress.Progress):
            """A bar and a line below it, which is cut at the edge of the terminal."""

            def get_renderables(self) -> Iterable[Any]:
                yield self.make_tasks_table(self.tasks)
                for task in self.tasks:
                    yield Text(task.fields["detail"], style="dim", no_wrap=True, overflow="ellipsis")

        console = Console(stderr=True)
        bar_width = BAR_WIDTH if console.width >= NARROW_TERMINAL else 1
        room = console.width - bar_width - FIGURES_WIDTH
        description = harmless(description)
        shortened = description if len(description) <= room else f"{description[: room - 1]}…"
        self._description, self._unit, self._live = description, unit, sys.stderr.isatty()
        # Started on a terminal only; elsewhere it measures the speed.
        self._progress = WithDetail(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(bar_width),
            rich_progress.MofNCompleteColumn() if unit else rich_progress.TaskProgressColumn(),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("left"),
            console=console,
            # From the whole session: a short window would jump at every checkpoint and evaluation.
            speed_estimate_period=math.inf,
            get_time=time.monotonic,
        )
        self._progress.add_task(shortened, total=total, detail="")
        (self._task,) = self._progress.tasks
        self._last = time.monotonic()

    def __enter__(self) -> Bar:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._progress.stop()

    def show(self, done: float, detail: str = "", force: bool = False) -> None:
        task, now = self._task, time.monotonic()
        # Without a new detail, the last one stays.
        self._progress.update(task.id, completed=done, detail=detail or task.fields["detail"])
        if self._live or (now - self._last < PLAIN_INTERVAL_SECONDS and not force):
            return
        self._last = now
        reached = f"{done:,.0f}" if self._unit or not task.total else f"{done / task.total:.0%}"
        if self._unit:
            reached = f"{self._unit} {reached} of {task.total:,.0f}"
        left = f", {format_seconds(task.time_remaining)} left" if task.time_remaining is not None else ""
        shown = f" ({detail})" if detail else ""
        inform(f"{self._description}: {reached}, after {format_seconds(task.elapsed or 0)}{left}{shown}")


def format_seconds(seconds: float) -> str:
    """Format a duration for a person: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
