"""Progress of long work on stderr: a live bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
PLAIN_INTERVAL_SECONDS = 10.0
BAR_WIDTH = 24
_silent = False


def silence() -> None:
    """Show nothing from here on: for worker processes, whose parent shows the progress of all."""
    global _silent
    _silent = True


def inform(message: str) -> None:
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


def step_bar(description: str, total: int) -> Bar:
    """Return a bar for long work in steps with figures of its own, given as the detail of `show`.

    On a terminal it has the figures in a line below; elsewhere the first and the last step are always shown.
    """
    if _silent:
        return Bar()
    return LiveStepBar(description, total) if sys.stderr.isatty() else PlainStepBar(description, total)


class Bar:
    """A bar that shows nothing: the contract of the others."""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def show(self, done: float, detail: str = "", force: bool = False) -> None:
        """Say how much of the total is done, and what is being worked on; where that is rationed, `force` shows it."""


class LiveBar(Bar):
    """A bar that is redrawn in place."""

    def __init__(self, description: str, total: float | None) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeLeft

        columns: tuple[Any, ...] = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=BAR_WIDTH),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
            TextColumn("[dim]{task.fields[detail]}"),
        )
        # The window over which speed is taken is long: ablations mix fast and slow runs.
        self._progress = Progress(*columns, console=_console(), speed_estimate_period=60.0)
        self._task = self._progress.add_task(description, total=total, detail="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, done: float, detail: str = "", force: bool = False) -> None:  # noqa: ARG002
        """Redraw the bar."""
        self._progress.update(self._task, completed=done, detail=detail)


class LiveStepBar(Bar):
    """Two lines that are redrawn in place: how far the work is, and its figures."""

    def __init__(self, description: str, total: int) -> None:
        from rich.live import Live

        self.description, self.total = description, total
        self.pace = Pace(total)
        self._done, self._detail = 0.0, ""
        self._console = _console()
        self._live = Live(get_renderable=self._lines, console=self._console, refresh_per_second=2)

    def __enter__(self) -> Bar:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, done: float, detail: str = "", force: bool = False) -> None:  # noqa: ARG002
        """Redraw the lines, keeping the figures where there are no new ones."""
        self.pace.read(done)
        self._done, self._detail = done, detail or self._detail

    def _lines(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width, figures = self._console.width, Text(self._figures(), no_wrap=True, overflow="crop")
        name = Text(self.description)
        name.truncate(max(0, width - len(figures) - 2), overflow="ellipsis")
        # What the name leaves of the line is the bar's, if that is enough to see something.
        room = min(BAR_WIDTH, width - len(figures) - len(name) - 4)
        bars = [ProgressBar(self.total, self._done, width=room)] if room >= BAR_WIDTH // 3 else []
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(name, *bars, figures)
        return Group(line, Text(fitting(self._detail, width), style="dim"))

    def _figures(self) -> str:
        """Return percentage, step and time left in fields of fixed width, so that nothing moves while they change."""
        total = f"{self.total:,}"
        left = self.pace.seconds_left()
        words = f"{format_seconds(left)} left" if left is not None and self._done < self.total else ""
        percentage = math.floor(1000 * self._done / self.total) / 10
        return f"{percentage:5.1f}%  {self._done:>{len(total)},.0f}/{total}  {words:<16}"


class PlainBar(Bar):
    """A line now and then, for logs."""

    def __init__(self, description: str, total: float | None) -> None:
        self.description, self.total = description, total
        self.pace = Pace(total)
        self.last = time.monotonic()

    def show(self, done: float, detail: str = "", force: bool = False) -> None:
        """Print a line if the last one is some seconds old, or in any case."""
        self.pace.read(done)
        now = time.monotonic()
        if now - self.last < PLAIN_INTERVAL_SECONDS and not force:
            return
        self.last = now
        words = [f"{self.description}: {self.reached(done)}", f"after {format_seconds(self.pace.seconds())}"]
        left = self.pace.seconds_left()
        if left is not None:
            words.append(f"{format_seconds(left)} left")
        inform(", ".join(words) + (f" ({detail})" if detail else ""))

    def reached(self, done: float) -> str:
        """Say how far the work is."""
        return f"{done / self.total:.0%}" if self.total else f"{done:g}"


class PlainStepBar(PlainBar):
    """A line now and then with the figures of a step; the first and the last step are always shown."""

    def __init__(self, description: str, total: int) -> None:
        super().__init__(description, total)
        self._shown = False

    def show(self, done: float, detail: str = "", force: bool = False) -> None:
        """Print a line if there are figures and the last line is some seconds old, or in any case."""
        if not detail:
            self.pace.read(done)
            return
        super().show(done, detail, force or not self._shown or done == self.total)
        self._shown = True

    def reached(self, done: float) -> str:
        """Say which step it is."""
        return f"step {done:,.0f} of {self.total:,.0f}"


class Pace:
    """The speed since the first reading, and so the time left: what was done before it does not count."""

    def __init__(self, total: float | None) -> None:
        self._total = total
        self._made = self._begun = self._read = time.monotonic()
        self._first: float | None = None
        self._done = 0.0

    def read(self, done: float) -> None:
        """Take note of how much is done."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._begun = done, now
        self._done, self._read = done, now

    def seconds(self) -> float:
        """Return the time since the work began."""
        return time.monotonic() - self._made

    def seconds_left(self) -> float | None:
        """Return the time left, counted down since the last reading; None where nothing tells it."""
        if self._total is None or self._first is None or self._done <= self._first:
            return None
        per_unit = (self._read - self._begun) / (self._done - self._first)
        return max(0.0, per_unit * (self._total - self._done) - (time.monotonic() - self._read))


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def fitting(text: str, width: int) -> str:
    """Return as much of a list with commas as `width` columns hold, whole entries only."""
    while len(text) > width:
        text = text.rpartition(", ")[0]
    return text


def format_seconds(seconds: float) -> str:
    """Format a duration as a person says it: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
