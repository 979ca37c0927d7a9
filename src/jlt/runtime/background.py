"""Background work: a thread uses the items of a loop while the loop makes the next ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Full, Queue
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END: Any = object()
POLL_SECONDS = 0.1


class Abandoned(Exception):
    """Raised in the thread in place of the next item, after the loop that makes the items has failed."""


class BackgroundWorker(Generic[T]):
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
            try:
                self._queue.put(item, timeout=POLL_SECONDS)
            except Full:
                continue
            return
        self._using.result()

    def _items(self) -> Iterator[T]:
        while (item := self._queue.get()) is not _END and not self._abandoned:
            yield item
        if self._abandoned:
            raise Abandoned

    def __enter__(self) -> BackgroundWorker[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandoned = error is not None
        with contextlib.suppress(Exception):
            self.put(_END)
        self._pool.shutdown(wait=True)
        if error is None:
            self._using.result()
