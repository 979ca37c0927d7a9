"""`jlt --processes N`: one command in several processes of this machine, through torchrun's API."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from jlt.errors import UsageError
from jlt.runtime import processes
from jlt.runtime.signals import STOPPING_SIGNALS
from jlt.runtime.streams import say

SHUTDOWN_SECONDS = 7 * 24 * 3600
"""How long stopped processes may take to save: a launcher must not kill one that writes a checkpoint."""
LAST_LINES = 5
PRINTED = "printed"
"""File that says that the first process has printed why it failed."""


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `jlt` with these arguments in `count` processes; return 0, 75 if they were stopped, or an exit code.

    The first process uses this terminal. What the others print is shown only if one of them
    fails and the first one has printed no error. Of several that failed by themselves, the lowest number counts.
    UsageError in a process that a launcher started.
    """
    if processes.world_size() > 1:
        raise UsageError("--processes starts all processes itself: leave it out under torchrun and other launchers.")
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from jlt.runtime.environment import cores

    # Its warnings would repeat at length what the sentence of the failed process says.
    logging.disable(logging.ERROR)
    # Threads of several processes must not compete for the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    with tempfile.TemporaryDirectory(prefix="jlt-processes-") as logs:
        os.environ[processes.LAUNCHED] = logs
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="jlt",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(logs, dict.fromkeys(range(1, count), Std.ALL)),
            signals_to_handle=",".join(number.name for number in STOPPING_SIGNALS),
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "jlt", *arguments)
        except SignalException:
            return os.EX_TEMPFAIL
        except ChildFailedError as error:
            return _report(Path(logs), {rank: failure.exitcode for rank, failure in error.failures.items()})
    return 0


def _report(logs: Path, exit_codes: Mapping[int, int]) -> int:
    """Print the end of a failed process's errors, unless the first process failed by itself; return the exit code."""
    # The others were ended by the launcher, or ended because one had.
    ended = (-signal.SIGTERM, os.EX_TEMPFAIL, processes.LOST)
    guilty = sorted(rank for rank, code in exit_codes.items() if code and code not in ended)
    if not guilty:
        return os.EX_TEMPFAIL
    rank = guilty[0]
    unseen = rank > 0 and not (logs / PRINTED).exists()
    for path in logs.glob(f"*/attempt_0/{rank}/stderr.log") if unseen else ():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        say("\n".join(lines[-LAST_LINES:]))
    if exit_codes[rank] < 0:
        say(f"jlt: Process {rank} was killed by signal {-exit_codes[rank]}.")
    return max(exit_codes[rank], 1)
