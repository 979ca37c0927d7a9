"""SIGTERM, Ctrl-C and SIGUSR1 (the warning of a cluster) as requests to finish the step, save and exit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

from jlt.runtime.progress import acknowledge

T = TypeVar("T")
STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PARENT_STOPS = signal.SIGUSR2
"""In a worker process: raised by itself when its parent stops it."""
STOPPING = "Stopping: what is done is saved first."
POLL_SECONDS = 1.0
_parent_stops: Callable[[], bool] = lambda: False  # noqa: E731
_abandonable = False
"""Whether the main thread makes an item that a request to stop may leave unfinished."""


class Stopped(Exception):
    """Work ended early on request, with everything saved; the same command resumes it."""


class StopRequest:
    """Whether this process has received a stopping signal, or its parent stops it."""

    def __init__(self) -> None:
        self.received = False

    def __bool__(self) -> bool:
        return self.received or _parent_stops()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block signals during a `with` block; processes that start in it ignore them until `follow_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(parent: int, stops: Callable[[], bool] = lambda: False) -> None:
    """In a worker process: ignore the signals, which reach a whole process group at once, and obey the parent process.

    Stop when `stops` returns True. End when the parent is gone, so that no orphan works next to its successor.
    """
    global _parent_stops
    _parent_stops = stops
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(PARENT_STOPS, _no_request)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING_SIGNALS)

    def leave_with_parent() -> None:
        requested = False
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
            if not requested and stops():
                requested = True
                # To the main thread, which may wait for something that only a signal of its own ends.
                signal.pthread_kill(threading.main_thread().ident or 0, PARENT_STOPS)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _no_request(number: int, frame: FrameType | None) -> None:
    """Receive a parent's request where no work is under way."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn a stopping signal into a request during a block, and acknowledge it; a second Ctrl-C acts at once.

    The other signals may arrive twice, from a cluster and from a launcher, while the work is saved. A signal that this
    process ignores stays ignored.
    """
    request = StopRequest()
    numbers = STOPPING_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    previous = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    if numbers and callable(parents := signal.getsignal(PARENT_STOPS)):
        previous[PARENT_STOPS] = parents

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if request.received and number == signal.SIGINT:
            restore()
            signal.raise_signal(number)
        if not request.received:
            acknowledge(STOPPING)
        request.received = True
        if _abandonable:
            raise Stopped("Stopped on request.")

    for number in previous:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()


def until_stopped(items: Iterable[T]) -> Iterator[T]:
    """Yield items; raise Stopped before the next one once this process is to stop."""
    with stop_on_signal() as stop:
        yield from until(items, lambda: bool(stop))


def until(items: Iterable[T], stop: Callable[[], bool]) -> Iterator[T]:
    """Yield items; raise Stopped once `stop` returns True, or at a signal while an item is made, which is abandoned."""
    iterator = iter(items)
    while not stop():
        try:
            with _abandoned_on_signal():
                item = next(iterator)
        except StopIteration:
            return
        yield item
    raise Stopped("Stopped on request.")


@contextlib.contextmanager
def _abandoned_on_signal() -> Iterator[None]:
    """Let a signal end a block at once, since an item may take minutes to make."""
    global _abandonable
    before, main = _abandonable, threading.current_thread() is threading.main_thread()
    _abandonable = before or main
    try:
        yield
    finally:
        _abandonable = before
