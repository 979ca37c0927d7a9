"""Jobs for worker processes, which import this module: nothing here takes long to import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from jlt.errors import JLTError
from jlt.runtime.signals import Stopped, stop_on_signal


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
