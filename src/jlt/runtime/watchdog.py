"""Processes that work together hear each other's pulse, so that one that dies or hangs ends all of them.

Gloo notices a connection that breaks. A process that hangs does not break any, and a GPU waits for a dead one's part of
a sum; both are noticed here, by two threads. One beats in a store that all share and listens to the next process, so
that the load on the store does not grow with the square of their number. The other talks to nobody: it ends this
process where the store does not answer, or where the main thread has made no step for far longer than its steps take.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT_SECONDS = 5.0
SILENT_SECONDS = 40.0
"""What was not heard of for so long is taken for dead: all have ended within a minute."""
SLOWER = 5.0
"""A step that takes so many times the longest one before is taken for hanging, if that is beyond SILENT_SECONDS."""
ALARM = "jlt/silent"


class Pulse:
    """What the main thread tells of itself: that it made a step, that it is busy with something else, that it leaves.

    Before its second step, and while it is busy, it may take as long as it likes; who leaves is not ended any more.
    """

    def __init__(self) -> None:
        self._last = self._longest = 0.0
        self._busy = 0
        self.leaving = False

    def step(self) -> None:
        """Tell that a step was made."""
        now = time.monotonic()
        if self._last:
            self._longest = max(self._longest, now - self._last)
        self._last = now

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Tell of steps for the duration of a block, be it within `busy`; they are no measure of those around it."""
        longest, self._longest, last, self._last = self._longest, 0.0, self._last, 0.0
        busy, self._busy = self._busy, 0
        try:
            yield
        finally:
            # In this order: the watching thread looks at any moment.
            self._busy, self._last = busy, time.monotonic() if last else 0.0
            self._longest = longest

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Do something other than steps for the duration of a block, however long it takes."""
        self._busy += 1
        try:
            yield
        finally:
            self._last = time.monotonic() if self._last else 0.0
            self._busy -= 1

    def hanging(self) -> bool:
        """Whether the main thread has made no step for too long."""
        if self._busy or not self._longest:
            return False
        return time.monotonic() - self._last > max(SILENT_SECONDS, SLOWER * self._longest)


class Watchdog:
    """Two threads that beat, listen and watch for the duration of a block."""

    def __init__(self, store: Store, rank: int, size: int, pulse: Pulse) -> None:
        """`store` is a connection of its own: another thread's call may hold it for long."""
        self._store, self._rank, self._next, self._pulse = store, rank, (rank + 1) % size, pulse
        self._left = threading.Event()
        self._contact = time.monotonic()
        self._threads = [
            threading.Thread(target=work, name=f"jlt-{work.__name__.strip('_')}", daemon=True)
            for work in (self._beat, self._watch)
        ]

    def _beat(self) -> None:
        heard, since = -1, time.monotonic()
        while not self._left.wait(BEAT_SECONDS):
            try:
                self._store.add(f"jlt/beat/{self._rank}", 1)
                beats = self._store.add(f"jlt/beat/{self._next}", 0)
                alarm = self._store.get(ALARM).decode() if self._store.check([ALARM]) else ""
                now = self._contact = time.monotonic()
                if beats != heard:
                    heard, since = beats, now
                elif now - since > SILENT_SECONDS and not alarm:
                    alarm = f"process {self._next} has not been heard of for {SILENT_SECONDS:g} seconds"
                    self._store.set(ALARM, alarm)
            except RuntimeError:
                alarm = "the process that held the connections together has ended"
            if alarm:
                self._end(alarm)

    def _watch(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            if time.monotonic() - self._contact > SILENT_SECONDS:
                self._end(f"who holds the connections together has not answered for {SILENT_SECONDS:g} seconds")
            if self._pulse.hanging():
                self._end("its step takes far longer than any before, so it hangs, or waits for one that does")

    def _end(self, alarm: str) -> None:
        if self._left.is_set() or self._pulse.leaving:
            return
        print(f"[process {self._rank}] jlt: This process ends: {alarm}.", file=sys.stderr, flush=True)
        # The other threads may be waiting, for ever, for the one that is gone.
        os._exit(1)

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        for thread in self._threads:
            # Not for ever: the store may be what does not answer.
            thread.join(timeout=1)
