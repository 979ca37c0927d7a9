"""Work in a thread while a loop goes on, and jobs in worker processes, which live no longer than their parent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from queue import Full, Queue
from typing import Any, Generic, TypeAlias, TypeVar

from jlt.errors import JLTError
from jlt.runtime import progress
from jlt.runtime.environment import cores
from jlt.runtime.processes import notice_dead_workers, spawn_context
from jlt.runtime.signals import POLL_SECONDS, Stopped, follow_parent, signals_blocked, stop_on_signal

T = TypeVar("T")
_END: Any = object()
PUT_SECONDS = 0.1
SharedSteps: TypeAlias = Any
"""A sequence of integers in shared memory, whose type ctypes makes."""
_stopping: Event | None = None
_steps: SharedSteps | None = None


class Abandoned(Exception):
    """Raised in the thread in place of the next item, after the loop that makes the items has failed."""


class BackgroundWorker(contextlib.AbstractContextManager["BackgroundWorker[Any]"], Generic[T]):
    """A thread that runs `use` on an iterator over the items that are put, up to `depth` of them in a queue.

    A context manager: leaving it waits until all items are used; leaving it by an exception ends the thread at its next
    item. An error in the thread is raised by the next `put`, or on leaving.
    """

    def __init__(self, use: Callable[[Iterator[T]], None], depth: int) -> None:
        self._queue: Queue[T] = Queue(depth)
        self._abandoned = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jlt-background")
        self._using = self._pool.submit(use, self._items())

    def put(self, item: T) -> None:
        """Add an item to the queue; wait while it is full."""
        while not self._using.done():
            with contextlib.suppress(Full):
                self._queue.put(item, timeout=PUT_SECONDS)
                return
        self._using.result()

    def _items(self) -> Iterator[T]:
        while (item := self._queue.get()) is not _END and not self._abandoned:
            yield item
        if self._abandoned:
            raise Abandoned

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._abandoned = error is not None
        with contextlib.suppress(Exception):
            self.put(_END)
        self._pool.shutdown(wait=True)
        if error is None:
            self._using.result()


def shared_steps(jobs: int) -> SharedSteps:
    """Return the steps that each of some jobs has made, in memory that their processes share; 0 at first."""
    return spawn_context().Array("q", jobs, lock=False)


def run_jobs(
    job: Callable[[Any], None],
    arguments: Sequence[Any],
    workers: int,
    on_poll: Callable[[], None],
    steps: SharedSteps | None = None,
) -> None:
    """Call `job` on each argument in `workers` processes, calling `on_poll` about once a second.

    The jobs write into `steps` how far their trainings are.
    After the first failure, or after SIGTERM or Ctrl-C, the other jobs save and stop. The failure or Stopped is raised.
    """
    context = spawn_context()
    stopping = context.Event()
    setup = (os.getpid(), max(1, cores() // workers), stopping, steps)
    with stop_on_signal() as stop:
        pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=setup)
        with signals_blocked():
            waiting: set[Future[None]] = {pool.submit(_run, job, *item) for item in enumerate(arguments)}
            notice_dead_workers(pool)
        try:
            while waiting and not stop:
                done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                on_poll()
        except BrokenProcessPool as error:
            raise JLTError(
                "A worker process was killed, most likely because memory ran out: try --workers 1. "
                "Run the same command again to resume."
            ) from error
        finally:
            # After a killed worker all futures are broken, yet the other workers still run.
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if stop:
            raise Stopped("Stopped on request; everything up to here is saved.")


def _run(job: Callable[[Any], None], place: int, argument: Any) -> None:
    # The pool cannot cancel a job that it has already handed out.
    if _stopping is not None and _stopping.is_set():
        raise Stopped("Stopped before the start.")
    if (steps := _steps) is not None:
        progress.report_steps(lambda done: steps.__setitem__(place, int(done)))
    job(argument)


def _begin_worker(parent: int, threads: int, stopping: Event, steps: SharedSteps | None) -> None:
    import torch

    global _stopping, _steps
    _stopping, _steps = stopping, steps
    torch.set_num_threads(threads)
    progress.silence()
    follow_parent(parent, stopping.is_set)
