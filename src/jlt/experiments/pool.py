"""Side-by-side work in a few processes that live as long as their parent and pass its signals on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from jlt.training.signals import Stopped, stop_on_signal

POLL_SECONDS = 1.0


def run_jobs(job: Callable[[Any], None], arguments: Sequence[Any], workers: int, on_poll: Callable[[], None]) -> None:
    """Call `job` on each argument in `workers` processes, calling `on_poll` about once a second.

    The first failure cancels what has not begun and is raised. SIGTERM and Ctrl-C are passed to the workers, which
    save; then Stopped is raised.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with (
        stop_on_signal() as stop,
        ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(os.getpid(), threads)) as pool,
    ):
        waiting: set[Future[None]] = {pool.submit(job, argument) for argument in arguments}
        try:
            while waiting and not stop:
                done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                on_poll()
        except (BrokenProcessPool, Stopped):
            if not stop:
                raise
        finally:
            # After success nothing is waiting; otherwise the others save and leave.
            pool.shutdown(wait=False, cancel_futures=True)
            if waiting or stop:
                _terminate_children()
    if stop:
        raise Stopped("Stopped on request; everything up to here is saved.")


def _terminate_children() -> None:
    for process in multiprocessing.active_children():
        process.terminate()


def _begin_worker(parent: int, threads: int) -> None:
    import torch

    from jlt import progress

    torch.set_num_threads(threads)
    progress.silence()
    # Ctrl-C reaches the whole group, SIGTERM only the parent: the parent passes on what the workers then act upon.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()


def _leave_with_parent(parent: int) -> None:
    """End this process when its parent was killed, so that no orphan writes into a run that is started again."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
