"""Background work: order, bounds, and every way in which either side can fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from jlt.runtime.workers import Abandoned, BackgroundWorker


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("jlt-background")]


def test_all_is_used_in_order_before_the_block_is_left() -> None:
    used: list[int] = []

    def use(items: Iterator[int]) -> None:
        for item in items:
            time.sleep(0.001)
            used.append(item)

    with BackgroundWorker[int](use, depth=2) as behind:
        for item in range(50):
            behind.put(item)
    assert used == list(range(50))
    assert threads() == []


def test_no_more_than_the_depth_waits() -> None:
    go = threading.Event()

    def use(items: Iterator[int]) -> None:
        go.wait()
        for _ in items:
            pass

    put: list[int] = []
    with BackgroundWorker[int](use, depth=3) as behind:

        def fill() -> None:
            for item in range(10):
                behind.put(item)
                put.append(item)

        filling = threading.Thread(target=fill)
        filling.start()
        time.sleep(0.3)
        assert len(put) == 3
        go.set()
        filling.join()
    assert len(put) == 10


def test_what_the_thread_raises_comes_out_of_put() -> None:
    def use(items: Iterator[int]) -> None:
        for item in items:
            raise OSError(f"no room for {item}")

    begun = time.monotonic()
    with pytest.raises(OSError, match="no room for 0"):
        put_for_ever(use)
    assert time.monotonic() - begun < 5
    assert threads() == []


def test_a_failure_is_noticed_long_before_the_queue_is_full() -> None:
    def use(items: Iterator[int]) -> None:
        raise OSError("disk full")

    put: list[int] = []
    with pytest.raises(OSError, match="disk full"):
        put_slowly(use, put)
    assert len(put) < 1000


def put_slowly(use, put: list[int]) -> None:
    with BackgroundWorker[int](use, depth=100_000) as behind:
        for item in range(100_000):
            behind.put(item)
            put.append(item)
            time.sleep(0.001)


def test_what_waits_is_dropped_when_the_loop_fails() -> None:
    used: list[int] = []

    def use(items: Iterator[int]) -> None:
        for item in items:
            used.append(item)
            time.sleep(0.02)

    with pytest.raises(KeyError):
        fail_after(use, 200, depth=200)
    assert len(used) < 20


def put_for_ever(use) -> None:
    with BackgroundWorker[int](use, depth=1) as behind:
        while True:
            behind.put(0)


def test_what_the_thread_raises_at_the_end_comes_out_of_the_block() -> None:
    def use(items: Iterator[int]) -> None:
        assert list(items) == [1]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundWorker[int](use, depth=4) as behind:
        behind.put(1)


@pytest.mark.parametrize("waiting", [0, 2])
def test_a_failing_loop_ends_the_thread_which_cleans_up(waiting: int) -> None:
    """With an empty queue and with a full one."""
    ended: list[str] = []

    def use(items: Iterator[int]) -> None:
        try:
            for _ in items:
                time.sleep(0.05)
        except Abandoned:
            ended.append("abandoned")
            raise

    with pytest.raises(KeyError):
        fail_after(use, waiting)
    assert ended == ["abandoned"]
    assert threads() == []


def fail_after(use, waiting: int, depth: int = 2) -> None:
    with BackgroundWorker[int](use, depth) as behind:
        for item in range(waiting):
            behind.put(item)
        raise KeyError


def test_the_first_error_is_the_one_that_is_raised() -> None:
    """A loop that fails on a thread which has failed too reports its own failure, not the thread's."""

    def use(items: Iterator[int]) -> None:
        raise OSError("disk full")

    with pytest.raises(KeyError):
        fail_after(use, 0)
