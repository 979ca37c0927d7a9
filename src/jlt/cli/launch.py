"""`jlt --processes N`: one command in several processes of this machine, through torchrun's API."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jlt.errors import UsageError
from jlt.runtime import processes

SHUTDOWN_SECONDS = 7 * 24 * 3600
"""How long stopped processes may take to save: a launcher must not kill one that writes a checkpoint."""
LAST_LINES = 5


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `jlt` with these arguments in `count` processes and return the exit code of the first one that failed.

    The first process uses this terminal. What the others print is shown only if one of them fails before it.
    UsageError in a process that a launcher started.
    """
    if processes.world_size() > 1:
        raise UsageError("--processes starts all processes itself: leave it out under torchrun and other launchers.")
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its warnings would repeat at length what the sentence of the failed process says.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Threads of several processes must not compete for the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="jlt-processes-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="jlt",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(logs, dict.fromkeys(range(1, count), Std.ALL)),
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "jlt", *arguments)
        except SignalException:
            return os.EX_TEMPFAIL
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if rank:
                _print_end(Path(logs), rank)
            return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _print_end(logs: Path, rank: int) -> None:
    """Print the last lines of a process's errors."""
    for path in logs.glob(f"*/attempt_0/{rank}/stderr.log"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(lines[-LAST_LINES:]), file=sys.stderr, flush=True)
