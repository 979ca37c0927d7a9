"""Processes that work together hear each other's pulse, so that one that dies or hangs ends all of them.

Gloo notices a connection that breaks. A process that hangs does not break any, and a GPU waits for a dead one's part of
a sum; both are noticed here. Each process listens to the next one and tells all when that is silent, so that the load
on the store does not grow with the square of their number.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT_SECONDS = 5.0
SILENT_SECONDS = 40.0
"""A process that was not heard of for so long is taken for dead: all have ended within a minute."""
ALARM = "jlt/silent"


class Heartbeat:
    """A thread that beats and listens for the duration of a block, over a connection of its own to the store."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._next = store, rank, (rank + 1) % size
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jlt-heartbeat", daemon=True)

    def _run(self) -> None:
        beats, heard, since = -1, -1, time.monotonic()
        while not self._left.wait(BEAT_SECONDS):
            try:
                self._store.add(f"jlt/beat/{self._rank}", 1)
                beats = self._store.add(f"jlt/beat/{self._next}", 0)
                alarm = self._store.get(ALARM).decode() if self._store.check([ALARM]) else ""
            except RuntimeError:
                alarm = "the process that held the connections together has ended"
            now = time.monotonic()
            if beats != heard:
                heard, since = beats, now
            elif now - since > SILENT_SECONDS and not alarm:
                alarm = f"process {self._next} has not been heard of for {SILENT_SECONDS:g} seconds"
                self._store.set(ALARM, alarm)
            if alarm and not self._left.is_set():
                self._end(alarm)

    def _end(self, alarm: str) -> None:
        print(f"[process {self._rank}] jlt: This process ends: {alarm}.", file=sys.stderr, flush=True)
        # The other threads may be waiting, for ever, for the one that is gone.
        os._exit(1)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
