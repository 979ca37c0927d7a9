"""Computing ahead: what a loop will ask for next is made in a thread while the loop is still busy."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield the items of a generator, which runs in a thread and is up to `depth` items ahead.

    What it raises is raised in place of the item concerned. Leaving early closes the generator once its item in work
    is done; no thread survives.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="jlt-ahead")
    try:
        waiting = deque(pool.submit(next, items, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(Exception):
            items.close()
