"""SIGTERM, Ctrl-C and SIGUSR1, by which clusters warn, as a request: finish the step, save, and leave."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_SECONDS = 1.0
_parent_asks: Callable[[], bool] = lambda: False  # noqa: E731


class Stopped(Exception):
    """Work that ended early on request, with everything saved; the same command continues it."""


class StopRequest:
    """Whether somebody has asked this process to stop."""

    def __init__(self) -> None:
        self.received = False

    def __bool__(self) -> bool:
        return self.received or _parent_asks()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold signals back for the duration of a block: processes begun in it are deaf until `follow_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(parent: int, asks: Callable[[], bool] = lambda: False) -> None:
    """In a worker process: leave the signals, which reach a whole group at once, to the parent process.

    Stop when `asks` says so, and end with a parent that was killed, so that no orphan works on beside its successor.
    """
    global _parent_asks
    _parent_asks = asks
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING_SIGNALS)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn a stopping signal into a request for the duration of a block; a second Ctrl-C acts at once.

    Others may come twice, from a cluster and from a launcher, while the work is saved. A signal that this process
    ignores stays ignored.
    """
    request = StopRequest()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in STOPPING_SIGNALS}
        previous = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def remember(number: int, frame: FrameType | None) -> None:
        del frame
        if request.received and number == signal.SIGINT:
            restore()
            signal.raise_signal(number)
        request.received = True

    for number in previous:
        signal.signal(number, remember)
    try:
        yield request
    finally:
        restore()


def until_stopped(items: Iterable[T]) -> Iterator[T]:
    """Yield items until somebody asks this process to stop, which raises Stopped."""
    with stop_on_signal() as stop:
        yield from until(items, lambda: bool(stop))


def until(items: Iterable[T], asked: Callable[[], bool]) -> Iterator[T]:
    """Yield items until `asked` says so, which raises Stopped: before the next one is made, which may take minutes."""
    waiting = iter(items)
    while not asked():
        try:
            item = next(waiting)
        except StopIteration:
            return
        yield item
    raise Stopped("Stopped on request.")
