"""Progress of long work on stderr: a live bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
PLAIN_INTERVAL_SECONDS = 10.0


def say(message: str) -> None:
    """Print one line for a person on stderr; stdout is kept for results."""
    print(message, file=sys.stderr, flush=True)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate while showing how far the work is, how fast it goes and how long it will take."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    return _live(iterable, description, total) if sys.stderr.isatty() else _plain(iterable, description, total)


def _live(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(iterable, total=total, description=description)


def _plain(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_SECONDS:
            last = now
            left = f", {format_seconds((now - start) / done * (total - done))} left" if total else ""
            say(f"{description}: {done}{f'/{total}' if total else ''} after {format_seconds(now - start)}{left}")


def format_seconds(seconds: float) -> str:
    """Format a duration as a person says it: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
