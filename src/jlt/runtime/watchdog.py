"""The watchdog of a process that works with others: it ends the process if another one is gone, or if work hangs.

A process that dies breaks its connections, so the others fail at their next exchange. A frozen process breaks none,
and a process that computes for long makes no exchange. So a thread exchanges beats with all others in a process group
of its own, whose timeout bounds each exchange; the same thread compares the time of a step with earlier steps.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from jlt.runtime.streams import say

BEAT_SECONDS = 5.0
SILENT_SECONDS = 40.0
"""A process ends this long after the last beat that reached all processes."""
SLOWER = 5.0
"""A step hangs if it takes this many times as long as the longest one before, and longer than SILENT_SECONDS."""


class Pulse:
    """When the main thread made its last step, and how long its longest step took.

    `leaving` is True while the process ends on request: other processes may be gone already, and that is no fault.
    """

    def __init__(self) -> None:
        self.leaving = False
        # One tuple, since the watchdog reads it at any moment: time of the last step (0: none yet), longest step.
        self._steps = (0.0, 0.0)

    def step(self) -> None:
        """Record that a step is done."""
        now, (last, longest) = time.monotonic(), self._steps
        self._steps = (now, max(longest, now - last) if last else 0.0)

    @contextlib.contextmanager
    def other_work(self) -> Iterator[None]:
        """Measure a block apart from the steps around it: by its own steps, or not at all before its second one."""
        last, longest = self._steps
        self._steps = (0.0, 0.0)
        try:
            yield
        finally:
            self._steps = (time.monotonic() if last else 0.0, longest)

    def hanging(self) -> bool:
        """Return whether the present step takes far longer than any before it."""
        last, longest = self._steps
        return longest > 0 and time.monotonic() - last > max(SILENT_SECONDS, SLOWER * longest)


class Watchdog:
    """A thread that exchanges beats and watches the pulse for the duration of a block, in all processes."""

    def __init__(self, rank: int, size: int, pulse: Pulse) -> None:
        """Every process calls this at the same point, after `init_process_group`."""
        import torch.distributed as dist

        self._rank, self._size, self._pulse = rank, size, pulse
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENT_SECONDS))
        self._left = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._watch, name="jlt-watchdog", daemon=True)

    def _watch(self) -> None:
        last = time.monotonic()
        try:
            # Processes leave at different moments. All see in the same beat that the last one has left.
            while self._beat() < self._size:
                last = time.monotonic()
                self._left.wait(BEAT_SECONDS)
                if self._failed:
                    return
                if self._pulse.hanging():
                    self._end("a step takes far longer than any before it: it hangs, or it waits for one that hangs")
        except RuntimeError as error:
            # A main thread that waits for the lost process gets an error of its own, which names the step.
            if not self._left.wait(max(0.0, last + SILENT_SECONDS - time.monotonic())):
                self._end(f"another process has died or does not answer ({str(error).strip().splitlines()[0]})")

    def _beat(self) -> int:
        """Return how many processes have left the block; RuntimeError if one is gone or does not answer."""
        import torch
        import torch.distributed as dist

        left = torch.tensor(int(self._left.is_set()))
        dist.all_reduce(left, group=self._group)
        return int(left)

    def _end(self, reason: str) -> None:
        if not (self._left.is_set() or self._pulse.leaving):
            say(f"[process {self._rank}] jlt: This process ends: {reason}.")
            # The main thread may wait for ever.
            os._exit(1)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._failed = error is not None
        self._left.set()
        # After an error, other processes may be gone or may never leave.
        self._thread.join(timeout=1 if self._failed else None)
