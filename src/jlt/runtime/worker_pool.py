"""Side-by-side work in a few processes, which live no longer than their parent and stop when it asks them to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any

from jlt.errors import JLTError
from jlt.runtime.environment import cores
from jlt.runtime.processes import notice_dead_workers, spawn_context
from jlt.runtime.signals import POLL_SECONDS, Stopped, follow_parent, signals_blocked, stop_on_signal

_stopping: Event | None = None


def run_jobs(job: Callable[[Any], None], arguments: Sequence[Any], workers: int, on_poll: Callable[[], None]) -> None:
    """Call `job` on each argument in `workers` processes, calling `on_poll` about once a second.

    The first failure asks the other jobs to stop, which save, and is raised. So do SIGTERM and Ctrl-C, with Stopped.
    """
    context = spawn_context()
    stopping = context.Event()
    setup = (os.getpid(), max(1, cores() // workers), stopping)
    with stop_on_signal() as stop:
        pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=setup)
        with signals_blocked():
            waiting: set[Future[None]] = {pool.submit(_run, job, argument) for argument in arguments}
            notice_dead_workers(pool)
        try:
            while waiting and not stop:
                done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                on_poll()
        except BrokenProcessPool as error:
            raise JLTError(
                "A worker process was killed, most likely for want of memory: try --workers 1. "
                "The same words continue it."
            ) from error
        finally:
            # After success nobody is left to hear it. After a killed worker all futures break, yet others still work.
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if stop:
            raise Stopped("Stopped on request; everything up to here is saved.")


def _run(job: Callable[[Any], None], argument: Any) -> None:
    # A job that the pool had already handed out when the stop came cannot be cancelled, but need not begin.
    if _stopping is not None and _stopping.is_set():
        raise Stopped("Not begun.")
    job(argument)


def _begin_worker(parent: int, threads: int, stopping: Event) -> None:
    import torch

    from jlt.runtime import progress

    global _stopping
    _stopping = stopping
    torch.set_num_threads(threads)
    progress.silence()
    follow_parent(parent, stopping.is_set)
