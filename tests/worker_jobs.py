"""Jobs for worker processes, which import this module: nothing here takes long to import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from jlt.errors import JLTError
from jlt.runtime.progress import bar
from jlt.runtime.signals import Stopped, stop_on_signal, until_stopped


def begin_job(argument: tuple[Path, bool]) -> None:
    path, fails = argument
    path.touch()
    if fails:
        raise JLTError(f"{path.name} failed")
    time.sleep(0.3)


def die_or_wait(argument: tuple[Path, bool]) -> None:
    path, dies = argument
    path.touch()
    while dies and len(list(path.parent.iterdir())) < 2:
        time.sleep(0.05)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    with stop_on_signal() as stop:
        end = time.monotonic() + 30
        while not stop and time.monotonic() < end:
            time.sleep(0.05)
    raise Stopped("Saved.")


def count_and_wait(path: Path) -> None:
    """Make three steps, then an item that takes minutes; leave a file if it is abandoned before its end."""

    def items():
        with bar("training", 3, "step") as shown:
            for step in range(1, 4):
                shown.show(step)
        time.sleep(300)
        yield None

    try:
        list(until_stopped(items()))
    except Stopped:
        path.touch()
        raise
