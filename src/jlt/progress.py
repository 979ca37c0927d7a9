"""Progress of long work on stderr: a live bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
PLAIN_INTERVAL_SECONDS = 10.0
_silent = False


def silence() -> None:
    """Show nothing from here on: for worker processes, whose parent shows the progress of all."""
    global _silent
    _silent = True


def say(message: str) -> None:
    """Print one line for a person on stderr; stdout is kept for results."""
    if not _silent:
        print(message, file=sys.stderr, flush=True)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate while showing how far the work is and how long it will take."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(description, total) as shown:
        for done, item in enumerate(iterable, 1):
            yield item
            shown.show(done)


def bar(description: str, total: float | None) -> Bar:
    """Return a context manager whose `show(done)` says how far the work is; nothing is shown in a silenced process."""
    if _silent:
        return Bar()
    return LiveBar(description, total) if sys.stderr.isatty() else PlainBar(description, total)


class Bar:
    """A bar that shows nothing: the contract of the others."""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def show(self, done: float, detail: str = "") -> None:
        """Say how much of the total is done, and what is being worked on."""


class LiveBar(Bar):
    """A bar that is redrawn in place."""

    def __init__(self, description: str, total: float | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeLeft

        columns: tuple[Any, ...] = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
            TextColumn("[dim]{task.fields[detail]}"),
        )
        # The window over which speed is taken is long: ablations mix fast and slow runs.
        self._progress = Progress(*columns, console=Console(stderr=True), speed_estimate_period=60.0)
        self._task = self._progress.add_task(description, total=total, detail="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, done: float, detail: str = "") -> None:
        """Redraw the bar."""
        self._progress.update(self._task, completed=done, detail=detail)


class PlainBar(Bar):
    """A line now and then, for logs."""

    def __init__(self, description: str, total: float | None) -> None:
        self.description, self.total = description, total
        self.start = self.last = time.monotonic()
        self.first_done: float | None = None

    def show(self, done: float, detail: str = "") -> None:
        """Print a line if the last one is some seconds old."""
        if self.first_done is None:
            self.first_done = done
        now = time.monotonic()
        if now - self.last < PLAIN_INTERVAL_SECONDS:
            return
        self.last = now
        words = [f"{self.description}: {done / self.total:.0%}" if self.total else f"{self.description}: {done:g}"]
        words.append(f"after {format_seconds(now - self.start)}")
        gained = done - self.first_done
        if self.total and gained > 0:
            words.append(f"{format_seconds((now - self.start) / gained * (self.total - done))} left")
        say(", ".join(words) + (f" ({detail})" if detail else ""))


def format_seconds(seconds: float) -> str:
    """Format a duration as a person says it: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
